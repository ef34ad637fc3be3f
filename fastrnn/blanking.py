"""Zeros in the padding, whatever stands there.

``keep`` is an integer with all bits set for what is valid and none for padding. One ``bitwise_and``
with the numbers' bits makes zeros even of NaN, in the time of a copy; to fill the rows of an index
takes two to five times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_bits(empty: Tensor) -> Tensor:
    """``[..., 1]`` int32, of ``[...]`` bool, what is padding."""
    return empty.unsqueeze(-1).to(torch.int32) - 1


def blanked(x: Tensor, keep: Tensor) -> Tensor:
    """``[..., F]``, contiguous, zero in the padding; differentiable, as often as wanted.

    Args:
        x: ``[..., F]``, floating-point.
        keep: ``[..., 1]``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Blanked.apply(x, keep)
        return found
    return _blanked(x, keep)


def blank_(x: Tensor, keep: Tensor) -> Tensor:
    """The same in place and without autograd; returns ``x``."""
    integer = _INTEGERS[x.element_size()]
    x.detach().view(integer).bitwise_and_(_as(integer, keep))
    return x


def _blanked(x: Tensor, keep: Tensor) -> Tensor:
    integer = _INTEGERS[x.element_size()]
    bits = torch.empty(x.shape, dtype=integer, device=x.device)
    torch.bitwise_and(x.view(integer), _as(integer, keep), out=bits)
    return bits.view(x.dtype)


def _as(integer: torch.dtype, keep: Tensor) -> Tensor:
    """``keep`` in the same width: two widths at once would all be widened."""
    return keep if keep.dtype == integer else keep.to(integer)


class _Blanked(torch.autograd.Function):
    """:func:`blanked` as autograd has it; its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> Tensor:
        ctx.keep = keep
        return _blanked(x, keep)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return blanked(d_x, ctx.keep), None
