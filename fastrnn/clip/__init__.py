"""Clip the norm of gradients: torch's function, faster, and a clipper that remembers."""

from fastrnn.clip.clip_grad_norm import clip_grad_norm_
from fastrnn.clip.clipper import GradientClipper

__all__ = ["GradientClipper", "clip_grad_norm_"]
