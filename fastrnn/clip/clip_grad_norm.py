"""Clip the global norm of gradients: `torch.nn.utils.clip_grad_norm_`, faster.

torch computes the norm, then multiplies every gradient by `min(max_norm / (norm + 1e-6), 1)`, even
by 1, because asking which it is would make a GPU wait. On the CPU asking is free: where nothing has
to be clipped, the gradients are read once and never written.

On the CPU results equal torch's bit by bit, with two exceptions:

- The 2-norm of a contiguous float32 or float64 gradient of more than 2**22 elements is summed in
  chunks: on all threads where torch uses one, and more accurately (figures at
  `gradient_norms._LONG`).
- What multiplying by one does to signalling NaNs, and to subnormal numbers under
  `torch.set_flush_denormal(True)`, does not happen where nothing is clipped.

On a GPU norms are summed in another order, so that they may differ by a rounding. And of mixed
dtypes torch's CUDA operations round the float32 coefficient to 16 bits before they multiply a
16-bit gradient by it (`_foreach_mul_` takes its slow path there, and that `mul_`, whose scalar is a
CUDA tensor, casts it to the gradient's dtype); the kernel multiplies in float32 and rounds once, as
torch does on the CPU.

Gradients on a CUDA device go to a Triton kernel, one launch for all of them, where
`gradient_norms.can_run_kernel` knows no reason against it; DTensors to `distributed`, where
`why_torch` knows none. Limits: everything else, and every graph that is being recorded (`tracing`),
go to torch's own function, unchanged. FSDP1's flat parameters look like any others and are sharded
all the same: as torch's function does, this one takes each process's part for the whole. There,
call `FullyShardedDataParallel.clip_grad_norm_`; FSDP2 needs nothing.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_ as _torch_clip_grad_norm_

from fastrnn.clip import clipping, gradient_norms
from fastrnn.clip.gradient_norms import cpu_groups, scale_cpu_groups_, tensor_norms

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    `grad = grad * min(max_norm / (total_norm + 1e-6), 1)`, where `total_norm` is the norm of all
    gradients as one vector. Arguments, result, warnings and errors are those of
    `torch.nn.utils.clip_grad_norm_`. Every gradient's version counter rises whether or not it is
    scaled, as it does there. Deterministic for a given number of threads. Under FSDP1 call
    `FullyShardedDataParallel.clip_grad_norm_` instead: of its flat parameters each process would
    find a norm of its own, here as in torch.

    Args:
        parameters: a tensor or an iterable of tensors whose `.grad` is clipped; those without a
            gradient are passed over. A generator is consumed once. A tensor that comes twice counts
            twice and is scaled twice.
        max_norm: the largest norm allowed.
        norm_type: the order p of the norm, `inf` for the largest magnitude. Default: 2.
        error_if_nonfinite: whether a norm that is NaN or infinite is an error. If not, it scales
            like any other: inf to zeros, NaN to NaNs. Default: False.
        foreach: whether to use torch's foreach operations. On the CPU the result is the same.
            Default: None, where the device has them.

    Returns:
        The norm before clipping: a tensor of shape `[]`, of the gradients' dtype (its real part's,
        promoted where they are mixed), on the first one's device; `tensor(0.)` without gradients.
        A replicated DTensor where all gradients are DTensors of one mesh, as torch's.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set (nothing is scaled), or
            `foreach=True` on a device that has no foreach operations.
    """
    if torch.compiler.is_compiling():  # a graph cannot branch on the norm
        return _torch_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
            )
    grads = [grad for p in parameters if (grad := p.grad) is not None]
    if not grads:
        float(norm_type), float(max_norm)  # torch's error for what is no number
        return torch.tensor(0.0)
    with torch.no_grad():
        groups = cpu_groups(grads)
        if groups is None:
            if clipping.why_torch(grads, float(norm_type)) is not None:
                return _torch_clip_grad_norm_(
                    parameters, max_norm, norm_type, error_if_nonfinite, foreach
                )
            return _clip_elsewhere(grads, float(max_norm), float(norm_type), error_if_nonfinite)
        norm_type = float(norm_type)
        total_norm = _total_norm(groups, norm_type, foreach)
        if error_if_nonfinite:
            gradient_norms.refuse_nonfinite(total_norm, norm_type)
        scale_cpu_groups_(groups, total_norm, float(max_norm))
    return total_norm


def _total_norm(groups: list[list[Tensor]], norm_type: float, foreach: bool | None) -> Tensor:
    """Return the norm of the gradients' norms."""
    norms: list[Tensor] = []
    for grads in groups:
        norms.extend(tensor_norms(grads, norm_type, foreach))
    total_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total_norm


def _clip_elsewhere(
    grads: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Clip by the kernel, or DTensors by their local parts."""
    total_norm = clipping.clip_gradients(
        grads, max_norm, norm_type, scale=not error_if_nonfinite, checked=True
    ).total_norm
    if error_if_nonfinite:
        gradient_norms.refuse_nonfinite(total_norm, norm_type)
        clipping.scale_gradients(grads, total_norm, max_norm)
    return clipping.as_torch_returns(total_norm, grads)
