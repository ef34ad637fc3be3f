"""Clip gradients of any kind: DTensors by `distributed`, all others by `gradient_norms`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastrnn.clip import gradient_norms
from fastrnn.clip.gradient_norms import Clipped, Recorder


def why_torch(grads: Sequence[Tensor], norm_type: float) -> str | None:
    """Why torch's own function has to clip gradients that are not all on the CPU; None if not."""
    if (distributed := _distributed(grads)) is not None:
        reason: str | None = distributed.why_torch(grads, norm_type)
        return reason
    return gradient_norms.can_run_kernel(grads, norm_type)


def clip_gradients(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    *,
    scale: bool = True,
    zero_nonfinite: bool = False,
    spare_nonfinite: bool = False,
    norm_dtype: torch.dtype | None = None,
    ring: Recorder | None = None,
    checked: bool = False,
) -> Clipped:
    """Measure gradients and scale them in place; see `gradient_norms.clip_gradients`.

    `checked` is for who has got no reason from :func:`why_torch`.

    Raises:
        NotImplementedError: DTensors of a kind that `distributed` does not take.
    """
    return (_distributed(grads) or gradient_norms).clip_gradients(  # type: ignore[no-any-return]
        grads,
        max_norm,
        norm_type,
        scale=scale,
        zero_nonfinite=zero_nonfinite,
        spare_nonfinite=spare_nonfinite,
        norm_dtype=norm_dtype,
        ring=ring,
        checked=checked,
    )


def scale_gradients(
    grads: list[Tensor], total_norm: Tensor, max_norm: float | Tensor, zero_nonfinite: bool = False
) -> Tensor:
    """Scale gradients in place whose `total_norm` is known; return the coefficient `[]`."""
    return (_distributed(grads) or gradient_norms).scale_gradients(  # type: ignore[no-any-return]
        grads, total_norm, max_norm, zero_nonfinite
    )


def as_torch_returns(total_norm: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Return the total norm in the form in which torch's function returns it."""
    if (distributed := _distributed(grads)) is None:
        return total_norm
    returned: Tensor = distributed.as_torch_returns(total_norm, grads)
    return returned


def _distributed(grads: Sequence[Tensor]) -> ModuleType | None:
    """Return `distributed` where a gradient is a DTensor."""
    if set(map(type, grads)) == {Tensor}:
        return None
    dtensor = sys.modules.get("torch.distributed.tensor")  # not imported: there can be none
    if dtensor is None or not any(isinstance(grad, dtensor.DTensor) for grad in grads):
        return None
    return importlib.import_module("fastrnn.clip.distributed")
