"""Who clips, and how each is called; every side works on the same parameters and gradients."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastrnn

# A side is given the parameters and the threshold, and returns the norm before clipping.
Clip = Callable[[Sequence[Tensor], float], Tensor]
EPSILON = 1e-6  # torch's, in max_norm / (norm + epsilon)

PACKAGES = {"apex": "apex", "transformer-engine": "transformer_engine"}
LABELS = {
    "fastrnn": "fastrnn",
    "foreach": "torch foreach",
    "loop": "torch loop",
    "apex": "apex",
    "transformer-engine": "TransformerEngine",
    "clip-then-step": "fastrnn, then step",
}
SHORT = LABELS | {
    "foreach": "foreach",
    "loop": "loop",
    "transformer-engine": "TE",
    "clip-then-step": "clip, step",
}


def installed(name: str) -> bool:
    """Whether a rival's package can be imported; it is not imported for that."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def _apex(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    from apex.contrib.clip_grad import clip_grad_norm_

    norm: Tensor = clip_grad_norm_(parameters, max_norm)
    return norm


def _transformer_engine(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """As Megatron-LM puts the two kernels together; it asks the GPU for the norm in between."""
    from transformer_engine.pytorch.optimizers import (
        multi_tensor_applier,
        multi_tensor_l2norm,
        multi_tensor_scale,
    )

    grads = [parameter.grad for parameter in parameters]
    overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
    norm, _ = multi_tensor_applier(multi_tensor_l2norm, overflow, [grads], False)
    coefficient = max_norm / (norm.item() + EPSILON)
    if coefficient < 1.0:
        multi_tensor_applier(multi_tensor_scale, overflow, [grads, grads], coefficient)
    return norm


CLIPS: dict[str, Clip] = {
    "fastrnn": fastrnn.clip_grad_norm_,
    "foreach": functools.partial(torch.nn.utils.clip_grad_norm_, foreach=True),
    "loop": functools.partial(torch.nn.utils.clip_grad_norm_, foreach=False),
    "apex": _apex,
    "transformer-engine": _transformer_engine,
}


def clips(device: torch.device) -> dict[str, Clip]:
    """The sides that can run here."""
    return {
        name: clip
        for name, clip in CLIPS.items()
        if name not in PACKAGES or (device.type == "cuda" and installed(name))
    }


class Step:
    """Clip and take a step of fused AdamW, in three ways.

    Args:
        parameters: that have gradients.
        max_norm: the threshold of every step.
    """

    NAMES = ("fastrnn", "clip-then-step", "foreach")

    def __init__(self, parameters: Sequence[Tensor], max_norm: float) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self._clipper = fastrnn.GradientClipper(parameters, max_norm)

    def side(self, name: str) -> Clip:
        """By name; "fastrnn" lets the scale ride into the step and rescales no gradient."""
        if name == "fastrnn":
            return self._into
        return functools.partial(self._after, CLIPS["foreach" if name == "foreach" else "fastrnn"])

    def _into(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        norm = self._clipper.clip_into(self.optimizer)
        self.optimizer.step()
        return norm

    def _after(self, clip: Clip, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        norm = clip(parameters, max_norm)
        self.optimizer.step()
        return norm
