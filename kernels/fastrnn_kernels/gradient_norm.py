"""The norm of all gradients and their rescaling, in one launch; one pass where nothing is clipped.

    norm        = (sum |g|^p)^(1/p) over all elements of all gradients, p = 1, 2 or inf
    coefficient = min(max_norm / (norm + 1e-6), 1)
    g           = g * coefficient, unless coefficient >= 1

That is `torch.nn.utils.clip_grad_norm_`, edge by edge: NaN and negative coefficients scale, norm =
max_norm = 1 scales, and norms are rounded where torch rounds them. Deterministic: sums are combined
in an order that only the gradients' sizes and alignment and the number of programs decide.

Cost, for gradients of G bytes in s segments (at most gradients + programs of them):

- not clipped: G bytes read. Clipped: 2 G read, G written; what the second reading finds in the L2
  cache it need not fetch. torch: 2 G read, G written in both cases, in at least 10 launches.
- At 4.3 TB/s, which a copy reaches on an H200 (bytes read plus bytes written), 1 GiB of gradients
  takes at least 0.25 ms not clipped and 0.75 ms clipped.
- One barrier, two where 16-bit norms are rounded. After it each program reads 4 s bytes.

These are floors and counts. No time of this kernel has been measured.

Limits: one device; p = 1, 2, inf; float32, bfloat16 and float16 gradients that fill a stretch of
memory, in any order of dimensions. Other gradients of the same call are left to torch, and their
norms join the total. `can_run` says what is refused.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .compiler_options import compiler_options
from .gradient_kernel import gradient_norm_kernel
from .gradient_table import COLD, KINDS, Plans
from .launch import CannotLaunch, assert_no_spill, launching
from .trust import NormVariant, norm_refusal, trusting

THREADS = 256
# What a program reads at a time: 64 bytes per thread, four loads.
BLOCK_BYTES = 16_384
COMBINE_BLOCK = 1024
# With at most 64 registers a thread, four programs fit a multiprocessor of every NVIDIA chip since
# sm_80; gradient_table.PROGRAMS_PER_MULTIPROCESSOR asks for half of that, so that it has 32 KB
# under way, and room for what else is resident. AMD's compiler has no such option, and 128
# registers a thread for as many programs.
MAX_REGISTERS = 64
NORMS = {1.0: "1", 2.0: "2", math.inf: "inf"}


class Clipping(NamedTuple):
    """What a clip measured, all on the gradients' device.

    total_norm: before clipping [].
    coefficient: what the gradients were, or are to be, multiplied by []; of the norm's dtype.
    norms: of each gradient, before clipping [gradients]; of the norm's dtype.
    inverse: 1 / coefficient [] float32, what fused optimizers take as `grad_scale`.
    nonfinite: 1 where the total norm is not finite, else 0 [] float32: their `found_inf`.
    """

    total_norm: Tensor
    coefficient: Tensor
    norms: Tensor
    inverse: Tensor
    nonfinite: Tensor


class Ring(NamedTuple):
    """Where a launch writes what it did.

    rows: norm, threshold and coefficient of the latest steps [capacity, 3] float32; step s is
        written to row s % capacity.
    counts: of steps, of those that were not finite, and of such that came last, in a row [3] int64.
    """

    rows: Tensor
    counts: Tensor


_plans = Plans()
_dtype = operator.attrgetter("dtype")
_device = operator.attrgetter("device")
_layout = operator.attrgetter("layout")
_is_cuda = operator.attrgetter("is_cuda")


def can_run(grads: Sequence[Tensor], norm_type: float = 2.0) -> str | None:
    """Why `clip_gradients` cannot take these gradients; None where it can. Never synchronises.

    Args:
        grads: the gradients.
        norm_type: the order of the norm.
    """
    if not grads:
        return "there are no gradients"
    if norm_type not in NORMS:
        return f"the kernel has norms of order 1, 2 and inf, not {norm_type}"
    if (types := set(map(type, grads))) != {Tensor}:
        names = ", ".join(sorted(t.__name__ for t in types - {Tensor}))
        return f"the kernel takes plain tensors, not {names}"
    if set(map(_layout, grads)) != {torch.strided}:
        return "the kernel takes dense gradients, not sparse ones"
    if _on_several_devices(grads):
        devices = set(map(_device, grads))
        return f"the gradients are on several devices: {', '.join(sorted(map(str, devices)))}"
    if (reason := _cannot_run_on(grads[0].device)) is not None:
        return reason
    for dtype in set(map(_dtype, grads)):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
            return f"the kernel's norm is float32, too short for gradients of {dtype}"
    if norm_type == math.inf and not all(map(Tensor.numel, grads)):
        return "an empty gradient has no norm of order inf"
    if any(map(Tensor.is_inference, grads)):
        return "gradients made in inference mode have no version counter"
    if _is_capturing(grads[0].device):
        plan = _plans.find(grads)
        if plan is None or plan.spare is None:
            return COLD
    return norm_refusal(grads[0].device)


def _on_several_devices(grads: Sequence[Tensor]) -> bool:
    if grads[0].is_cuda and all(map(_is_cuda, grads)):  # half the time of making all devices
        return len(set(map(Tensor.get_device, grads))) > 1
    return len(set(map(_device, grads))) > 1


@functools.cache
def _cannot_run_on(device: torch.device) -> str | None:
    interpreted = not isinstance(gradient_norm_kernel, triton.JITFunction)
    if device.type != "cuda":
        return None if interpreted else f"the kernel runs on GPUs, not on {device}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"the kernel needs compute capability 8.0, and {device} has {capability}"
    return None


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def launch_options(warp_size: int = 32, is_nvidia: bool = True) -> dict[str, object]:
    """The compiler's options. Why cooperative: see Tile.options in tiling.py."""
    return compiler_options(
        THREADS // warp_size,
        num_stages=1,
        cooperative=True,
        max_registers=MAX_REGISTERS if is_nvidia else None,
    )


def clip_gradients(
    grads: Sequence[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    scale: bool = True,
    zero_nonfinite: bool = False,
    spare_nonfinite: bool = False,
    norm_dtype: torch.dtype | None = None,
    found_inf: Tensor | None = None,
    ring: Ring | None = None,
    programs: int | None = None,
) -> Clipping:
    """Measures the norm of all gradients, and scales them in place; one launch, no synchronisation.

    coefficient = min(max_norm / (total_norm + 1e-6), 1), as in `torch.nn.utils.clip_grad_norm_`;
    gradients are written to only unless coefficient >= 1. Their version counters rise either way,
    as they do there. A gradient that comes twice counts twice and is scaled twice. Deterministic.

    Args:
        grads: gradients on one device, for which `can_run` gives no reason. They are not kept.
        max_norm: the largest norm allowed.
        norm_type: the order of the norm: 1, 2 or inf.
        scale: whether to scale; if not, only the norms and the coefficient are computed.
        zero_nonfinite: whether a total norm that is NaN or infinite makes all gradients zero, and
            the coefficient too. If not, it scales like any other: inf to zeros, NaN to NaNs.
        spare_nonfinite: whether such a norm leaves all gradients as they are, and the coefficient
            recorded is NaN: for steps that are not taken then.
        norm_dtype: None rounds as torch does: the norm of each gradient to its dtype, the total and
            the coefficient to the dtype they are promoted to. torch.float32 rounds nothing.
        found_inf: float32 tensor of one element on the same device that receives 1 where the total
            norm is not finite, else 0; by default a new one.
        ring: where the step is recorded; None: nowhere.
        programs: how many programs share the work; by default as many as are resident at once, or
            fewer where there is little to do, after a check (trust.py).

    Returns:
        The total norm and what follows from it, and the norms of the gradients, in the order given;
        of the dtype torch's total norm would have, or `norm_dtype`.

    Raises:
        ValueError: the gradients are not such (nothing was computed).
        RuntimeError: a CUDA graph is being captured and there is no memory for its table.
        fastrnn_kernels.launch.CannotLaunch: a compiler, the driver or the GPU refuses it (nothing
            was scaled).
        fastrnn_kernels.failed_waits.BarrierTimeout: an earlier launch on this device has failed.
    """
    if norm_dtype not in (None, torch.float32):
        raise ValueError(f"norm_dtype must be None or torch.float32, got {norm_dtype}")
    if not grads:
        raise ValueError("expected at least one gradient, got none")
    norm_type = float(norm_type)
    if norm_type not in NORMS:
        raise ValueError(f"norm_type must be 1, 2 or inf, got {norm_type}")

    def check() -> None:
        reason = can_run(grads, norm_type)
        if reason not in (None, COLD):  # of the latter tells the plan
            raise ValueError(f"these gradients cannot be clipped by the kernel: {reason}")

    if norm_type == math.inf:  # there may be a plan from a norm of another order
        check()
    device = grads[0].device
    if programs is None and (refused := norm_refusal(device)) is not None:
        raise CannotLaunch(refused)
    plan, table = _plans.locate(grads, programs, check)
    rounds = norm_dtype is None and not plan.dtypes <= {torch.float32, torch.complex64}
    if norm_dtype is None:
        norm_dtype = functools.reduce(torch.promote_types, plan.dtypes).to_real()
    variant = None
    if programs is None:
        options: dict[str, object] = {"scale": scale, "zero_nonfinite": zero_nonfinite}
        if spare_nonfinite:
            options["spare_nonfinite"] = True
        if not rounds:
            options["norm_dtype"] = torch.float32
        if ring is not None:
            options["record"] = True
        kinds = tuple(sorted(plan.dtypes & KINDS.keys(), key=str)) or (torch.float32,)
        variant = NormVariant(device, norm_type, kinds, tuple(options.items()))
    other_grads = [grads[i] for i in plan.others]
    own_grads = [grads[i] for i in plan.own] if other_grads else grads
    with trusting(variant), launching(grads[0]) as failed:
        table = plan.upload(table, device, _is_capturing(device))
        floats = torch.empty(plan.segments + 2, dtype=torch.float32, device=device)
        inverse, nonfinite = floats[plan.segments :].unbind()
        nonfinite = nonfinite if found_inf is None else found_inf
        found = torch.empty(plan.gradients + 2, dtype=norm_dtype, device=device)
        norms, total_norm, coefficient = found[2:], found[0], found[1]
        other_norms = floats
        if other_grads:
            other_norms = _norms_by_torch(other_grads, norm_type, norm_dtype, rounds)
        nvidia = torch.version.hip is None
        compiled = gradient_norm_kernel[(plan.programs,)](
            table,
            floats,
            other_norms,
            failed,
            norms,
            total_norm,
            coefficient,
            inverse,
            nonfinite,
            floats if ring is None else ring.rows,
            table if ring is None else ring.counts,
            plan.segments,
            plan.gradients,
            len(other_grads),
            float(max_norm),
            0 if ring is None else len(ring.rows),
            NORM=NORMS[norm_type],
            ROUND_NORMS=rounds,
            SCALE=scale,
            NONFINITE="zero" if zero_nonfinite else "spare" if spare_nonfinite else "scale",
            RECORD=ring is not None,
            BLOCK_BYTES=BLOCK_BYTES,
            COMBINE_BLOCK=COMBINE_BLOCK,
            **launch_options(32 if nvidia else 64, nvidia),
        )
    assert_no_spill(compiled)
    if scale:
        torch.autograd.graph.increment_version(own_grads)
        for grad in other_grads:
            if spare_nonfinite:
                grad.copy_(torch.where(total_norm.isfinite(), grad * coefficient, grad))
                continue
            grad.mul_(coefficient)
            if zero_nonfinite:
                grad.masked_fill_(~total_norm.isfinite(), 0)
    if other_grads:
        places = (*plan.own, *plan.others)
        by_place = dict(zip(places, (*norms.unbind(), *other_norms.unbind()), strict=True))
        norms = torch.stack([by_place[place] for place in range(len(grads))])
    return Clipping(total_norm, coefficient, norms, inverse, nonfinite)


def _norms_by_torch(
    grads: Sequence[Tensor], norm_type: float, norm_dtype: torch.dtype, rounds: bool
) -> Tensor:
    """Norms of gradients whose memory the kernel cannot walk."""
    norms = []
    for grad in grads:
        longer = None if rounds or grad.is_complex() else norm_dtype
        norms.append(torch.linalg.vector_norm(grad, norm_type, dtype=longer).to(norm_dtype))
    return torch.stack(norms)
