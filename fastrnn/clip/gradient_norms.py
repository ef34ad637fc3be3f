"""Norms of this process's gradients, and their scaling in place: what every clip is made of.

:func:`clip_gradients` is the seam to the Triton kernel: it does in PyTorch what the kernel's
launcher does in one launch, and calls the launcher where :func:`can_run_kernel` knows no reason
against it. Gradients on the CPU are asked for their norm, which is free there, and what nothing has
to be done to is not written. DTensors are for `clipping`, which chooses between this and
`distributed`.

Everything here is to be called without autograd.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

# The order of torch's own groups is the order in which it sums norms of mixed dtypes.
from fastrnn import torch_private
from fastrnn.choosing.environment import forced_backend
from fastrnn.clip.tracing import has_value, values_unknown

# torch sums the squares of one float32 vector on one thread, in as many sums as a register has
# lanes. Relative error on standard normals (AVX2): 1e-5 at 2**20 elements, 8e-5 at 2**22, 4e-4 at
# 10 M, 4e-3 at 50 M; in chunks of 2**14 it stays below 2e-7. Time at 4 M elements (EPYC, 2 cores):
# 1.05 ms on one thread, 1.20 ms on two; in chunks 1.01 ms and 0.68 ms.
# Up to 2**22, which is weight_hh for 1024 hidden units, equal bits are worth more.
_LONG = 2**22
_CHUNK = 2**14

_dtype = operator.attrgetter("dtype")
_is_cpu = operator.attrgetter("is_cpu")
_first = operator.itemgetter(0)
_log = logging.getLogger("fastrnn")


class Clipped(NamedTuple):
    """What a clip found: tensors on the first gradient's device.

    total_norm: of all gradients as one vector, before clipping [].
    coefficient: `min(max_norm / (total_norm + 1e-6), 1)` [].
    norms: of each gradient, before clipping, in the order given [gradients].
    inverse: `1 / coefficient` [] float32, where the kernel has computed it.
    nonfinite: 1 where the total norm is not finite, else 0 [] float32; where the kernel has.
    recorded: whether the kernel has written the step to the ring that was offered.
    """

    total_norm: Tensor
    coefficient: Tensor
    norms: Tensor
    inverse: Tensor | None = None
    nonfinite: Tensor | None = None
    recorded: bool = False


# Called with a device, returns the tensors of a ring to which the kernel writes a step: see
# history.Ring.tensors_on.
Recorder: TypeAlias = Callable[[torch.device], tuple[Tensor, Tensor]]


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
    """Measure gradients, and scale them in place by `min(max_norm / (total_norm + 1e-6), 1)`.

    `fastrnn_kernels.gradient_norm.clip_gradients` has this meaning, for gradients on one device. A
    launch that was refused is not tried again. Nothing here waits for a device other than the CPU,
    but for `spare_nonfinite` where the kernel does not run.

    Args:
        grads: at least one, of any dtypes and devices.
        max_norm: the largest norm allowed.
        norm_type: the order of the norm.
        scale: whether to scale; if not, the gradients are only read.
        zero_nonfinite: whether a total norm that is not finite sets all gradients to zero (the
            coefficient is 0) instead of scaling them like any other.
        spare_nonfinite: whether such a norm leaves them as they are.
        norm_dtype: None rounds each norm to its gradient's own dtype, as torch does;
            `torch.float32` computes and returns those of 16-bit gradients in float32.
        ring: to which the kernel, where it runs, writes the step.
        checked: whether the caller has asked :func:`can_run_kernel` and got no reason.

    Returns:
        Total norm, coefficient, and each gradient's norm.
    """
    if checked or can_run_kernel(grads, norm_type) is None:
        options = {
            "scale": scale,
            "zero_nonfinite": zero_nonfinite,
            "spare_nonfinite": spare_nonfinite,
            "norm_dtype": norm_dtype,
        }
        found = _clip_by_kernel(grads, max_norm, norm_type, options, ring)
        if found is not None:
            return found
    norms, in_torchs_order = _each_norm(grads, norm_type, norm_dtype)
    total_norm: Tensor = torch.linalg.vector_norm(in_torchs_order, norm_type)
    if scale and spare_nonfinite and has_value(total_norm):
        scale = math.isfinite(total_norm.item())
    if scale:
        coefficient = scale_gradients(grads, total_norm, max_norm, zero_nonfinite)
    else:
        coefficient = clip_coefficient(total_norm, max_norm, zero_nonfinite)
    return Clipped(total_norm, coefficient, norms)


def _clip_by_kernel(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    options: dict[str, Any],
    ring: Recorder | None,
) -> Clipped | None:
    """Clip in one launch; None where this one is refused, which the kernel remembers."""
    from fastrnn_kernels.launch import CannotLaunch

    kernel = _kernel_module()
    recorded = {} if ring is None else {"ring": kernel.Ring(*ring(grads[0].device))}
    try:
        found = kernel.clip_gradients(grads, max_norm, norm_type, **options, **recorded)
    except CannotLaunch as error:  # which has changed nothing, and was warned of
        _log.info("gradients are clipped by torch's operations: %s", error)
        return None
    return Clipped(*found)._replace(recorded=ring is not None)


def settle_by_kernel(
    found: Clipped,
    percentile: float,
    max_norm: float,
    ring: Recorder,
    *,
    zero_nonfinite: bool,
    spare_nonfinite: bool,
) -> Clipped | None:
    """Record what the kernel has measured, under the threshold of a percentile, in one launch.

    Returns:
        It with the coefficient of that threshold; None where it was not the kernel that measured,
        or a launch is refused.
    """
    if found.inverse is None:
        return None
    module = importlib.import_module("fastrnn_kernels.gradient_threshold")
    from fastrnn_kernels.launch import CannotLaunch

    try:
        settled = module.settle(
            found.total_norm,
            module.Ring(*ring(found.total_norm.device)),
            percentile,
            max_norm,
            zero_nonfinite=zero_nonfinite,
            spare_nonfinite=spare_nonfinite,
        )
    except CannotLaunch as error:  # which was warned of, and is remembered
        _log.info("a percentile of norms is found by torch's operations: %s", error)
        return None
    return found._replace(coefficient=settled.coefficient, inverse=settled.inverse, recorded=True)


def multiply(grads: list[Tensor], found: Clipped, zero_nonfinite: bool) -> None:
    """Scale gradients on one device in place by the coefficient that was found for them."""
    if zero_nonfinite:
        nonfinite = found.total_norm.isfinite().logical_not()
        for grad in grads:
            grad.masked_fill_(nonfinite, 0.0)  # 0 * NaN is NaN
    for (tensors,), _ in torch_private.group_tensors([grads]).values():  # type: ignore[list-item]
        _multiply_(tensors, found.coefficient)  # type: ignore[arg-type]


def measure(grads: list[Tensor], norm_type: float, norm_dtype: torch.dtype | None) -> Tensor:
    """Return the norm of each gradient, as `clip_gradients` does, and nothing else."""
    if can_run_kernel(grads, norm_type) is None:
        found = clip_gradients(grads, math.inf, norm_type, scale=False, norm_dtype=norm_dtype)
        return found.norms
    return _each_norm(grads, norm_type, norm_dtype)[0]


def _each_norm(
    grads: list[Tensor], norm_type: float, norm_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return each norm, in the order given, and in that in which torch adds them up."""
    if (groups := cpu_groups(grads)) is not None and len(groups) == 1:
        stacked = torch.stack(tuple(tensor_norms(grads, norm_type, norm_dtype=norm_dtype)))
        return stacked, stacked
    norms: list[Tensor] = []
    order: list[int] = []
    grouped = torch_private.group_tensors([grads], with_indices=True)  # type: ignore[list-item]
    for (tensors,), indices in grouped.values():
        norms += tensor_norms(tensors, norm_type, norm_dtype=norm_dtype)  # type: ignore[arg-type]
        order += indices
    norms = [norm.to(grads[0].device) for norm in norms]
    stacked = torch.stack(norms)
    if len(grouped) == 1:
        return stacked, stacked
    # To index the stack would copy the indices to the device, and wait.
    return torch.stack([norm for _, norm in sorted(zip(order, norms), key=_first)]), stacked


def clip_coefficient(
    total_norm: Tensor, max_norm: float | Tensor, zero_nonfinite: bool = False
) -> Tensor:
    """Return `min(max_norm / (total_norm + 1e-6), 1)`; with `zero_nonfinite` 0 for inf and NaN."""
    coefficient = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    if zero_nonfinite:
        coefficient = coefficient.masked_fill(total_norm.isfinite().logical_not(), 0.0)
    return coefficient


def scale_gradients(
    grads: list[Tensor], total_norm: Tensor, max_norm: float | Tensor, zero_nonfinite: bool = False
) -> Tensor:
    """Scale gradients in place whose `total_norm` is known; return the coefficient `[]`."""
    if (groups := cpu_groups(grads)) is not None:
        if zero_nonfinite and not math.isfinite(total_norm.item()):
            for grad in grads:
                grad.zero_()
            return torch.zeros_like(total_norm)
        scaled_by = scale_cpu_groups_(groups, total_norm, float(max_norm))
        return torch.ones_like(total_norm) if scaled_by is None else scaled_by
    coefficient = clip_coefficient(total_norm, max_norm, zero_nonfinite)
    nonfinite = total_norm.isfinite().logical_not() if zero_nonfinite else None
    grouped = torch_private.group_tensors([grads])  # type: ignore[list-item]
    for (device, _), ((tensors,), _) in grouped.items():
        _multiply_(tensors, coefficient.to(device))  # type: ignore[arg-type]
        if nonfinite is not None:  # 0 * NaN is NaN
            for tensor in tensors:
                tensor.masked_fill_(nonfinite.to(device), 0.0)  # type: ignore[union-attr]
    return coefficient


def refuse_nonfinite(total_norm: Tensor, norm_type: float) -> None:
    """Raise where a norm is not finite. This waits for the device.

    Raises:
        RuntimeError: in torch's words.
    """
    if not math.isfinite(total_norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )


def can_run_kernel(grads: Sequence[Tensor], norm_type: float) -> str | None:
    """Why the Triton kernel cannot clip these gradients; None where it can. Never synchronises."""
    if not grads[0].is_cuda:  # so that Triton is imported for none but these
        return "the kernel runs on CUDA devices, and the first gradient is on another"
    if forced := forced_backend():
        return f"FASTRNN_BACKEND={forced} is set"
    if values_unknown():
        return "a graph is being recorded, or tensors are fake"
    if isinstance(kernel := _kernel_module(), str):
        return kernel
    reason: str | None = kernel.can_run(grads, norm_type)
    return reason


@functools.cache
def _kernel_module() -> Any:
    """Return the kernel's module, or why it cannot be imported."""
    try:
        return importlib.import_module("fastrnn_kernels.gradient_norm")
    except ImportError as error:
        return f"the kernel cannot be imported: {error}"


def cpu_groups(grads: list[Tensor]) -> list[list[Tensor]] | None:
    """Return the gradients by dtype.

    None where one of them is not a plain tensor on the CPU, or has no value to be asked for.
    """
    if set(map(type, grads)) != {Tensor} or not all(map(_is_cpu, grads)) or values_unknown():
        return None
    if len(set(map(_dtype, grads))) == 1:
        return [grads]
    groups = torch_private.group_tensors([grads])  # type: ignore[list-item]
    return [tensors for (tensors,), _ in groups.values()]  # type: ignore[misc]


def tensor_norms(
    grads: list[Tensor],
    norm_type: float,
    foreach: bool | None = None,
    norm_dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:
    """Return the norm of each gradient; they have one dtype and one device."""
    dtype = grads[0].dtype
    wider = None
    if norm_dtype not in (None, dtype) and not dtype.is_complex:
        dtype = wider = torch.promote_types(dtype, norm_dtype)
    if norm_type == 2.0 and dtype in (torch.float32, torch.float64):
        long = {id(g) for g in grads if g.numel() > _LONG and g.is_contiguous()}
        if long and grads[0].is_cpu:
            short = [g for g in grads if id(g) not in long]
            norms = iter(tensor_norms(short, norm_type, foreach, norm_dtype) if short else ())
            return [_long_norm(g, wider) if id(g) in long else next(norms) for g in grads]
    if foreach is False:  # differs in the words for an empty gradient's inf norm
        return [torch.linalg.vector_norm(g, norm_type, dtype=wider) for g in grads]
    if wider is None:
        return torch_private.foreach_norm(grads, norm_type)
    return torch_private.foreach_norm(grads, norm_type, dtype=wider)


def _long_norm(grad: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the 2-norm of a long contiguous gradient, from the norms of its chunks."""
    flat = grad.view(-1)
    whole = flat.numel() // _CHUNK * _CHUNK
    chunks = torch.linalg.vector_norm(flat[:whole].view(-1, _CHUNK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.cat((chunks, rest)))
    return norm


def scale_cpu_groups_(
    groups: list[list[Tensor]], total_norm: Tensor, max_norm: float
) -> Tensor | None:
    """Multiply the gradients by `max_norm / (total_norm + 1e-6)`, unless that is one or more.

    Returns:
        What they were multiplied by `[]`; None: they were not.
    """
    # Far below the threshold (and far from overflow) no rounding makes the coefficient less than
    # one, in any dtype. To compute it is a tenth to a fifth of a call with few small gradients.
    if (norm := total_norm.item()) < 1e30 and 2 * norm + 1e-5 < max_norm:
        coefficient = None
    else:
        coefficient = max_norm / (total_norm + 1e-6)
        # Far above it need not be asked for, either. NaN is not >= 1, and spreads to the gradients.
        if not 0.98 * norm > max_norm and coefficient.item() >= 1.0:
            coefficient = None
    for grads in groups:
        if coefficient is not None:
            _multiply_(grads, coefficient)
        elif _one_matters(grads):
            _multiply_(grads, torch.ones_like(total_norm))
        else:
            torch.autograd.graph.increment_version(grads)
    return coefficient


def _multiply_(grads: list[Tensor], coefficient: Tensor) -> None:
    """Multiply gradients of one device and dtype in place."""
    try:
        torch_private.foreach_mul_(grads, coefficient)
    except RuntimeError:
        # Before it does anything it refuses what is negated or conjugated only when it is read.
        if not any(grad.is_neg() or grad.is_conj() for grad in grads):
            raise
        for grad in grads:
            grad.mul_(coefficient)


def _one_matters(grads: list[Tensor]) -> bool:
    """Whether multiplying gradients of one dtype by one, in place, can have an effect.

    It moves the signs of complex zeros, and is an error where elements share memory (`expand`) or
    the tensor was made in inference mode.
    """
    if grads[0].is_complex() or any(map(Tensor.is_inference, grads)):
        return True
    if all(map(Tensor.is_contiguous, grads)):
        return False
    return any(0 in g.stride() and not g.is_contiguous() for g in grads)
