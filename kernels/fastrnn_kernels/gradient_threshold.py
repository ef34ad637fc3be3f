"""AutoClip's threshold on the device: a percentile of the norms so far, and what follows from it.

    threshold   = min(percentile of the finite norms recorded and of the present one, max_norm)
    coefficient = min(threshold / (norm + 1e-6), 1)

(Seetharaman et al. 2020, arXiv:2007.14469.) One launch of one program, which waits for nobody. It
finds the norm of a given rank bit by bit, from the highest: norms are not negative, so that as
floats they are in the order of their bits as integers. It reads the recorded norms 33 times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiler_options import compiler_options
from .gradient_kernel import coefficient_of, finite, record_step
from .gradient_norm import Ring
from .launch import assert_no_spill, launching
from .trust import HelperVariant, trusting

BLOCK = 1024
THREADS = 256


@triton.jit(do_not_specialize=["capacity"])
def threshold_kernel(
    rows_ptr,  # [capacity, 3] float32: norm, threshold and coefficient of the latest steps
    counts_ptr,  # [3] int64: see record_step
    total_ptr,  # [] the present norm
    threshold_ptr,  # [] float32
    coefficient_ptr,  # [], of the norm's dtype
    inverse_ptr,  # [] float32: 1 / coefficient
    capacity,
    max_norm,
    fraction,  # of the norms that lie below: percentile / 100
    NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Settles a step whose norm is known, and records it. One program."""
    norm_dtype: tl.constexpr = total_ptr.dtype.element_ty
    total = tl.load(total_ptr).to(tl.float32)
    is_finite = finite(total)
    recorded = tl.minimum(tl.load(counts_ptr), capacity).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    # The present norm is one more value; not finite, it is larger than any that is looked for.
    LARGEST: tl.constexpr = 0x7F800000
    present = tl.where(is_finite, total.to(tl.int32, bitcast=True), LARGEST)

    known = tl.where(is_finite, 1, 0)
    for start in range(0, recorded, BLOCK):
        values = tl.load(rows_ptr + (start + lanes) * 3, mask=start + lanes < recorded, other=-1.0)
        bits = values.to(tl.int32, bitcast=True)
        known += tl.sum(((bits >= 0) & (bits < LARGEST)).to(tl.int32), axis=0)
    place = tl.maximum(known - 1, 0).to(tl.float32) * fraction
    rank = place.to(tl.int32)

    # The largest number with at most `rank` norms below it is the norm of that rank.
    found = 0
    for step in range(31):
        candidate = found + (1 << (30 - step))
        below = tl.where(present < candidate, 1, 0)
        for start in range(0, recorded, BLOCK):
            values = tl.load(
                rows_ptr + (start + lanes) * 3, mask=start + lanes < recorded, other=-1.0
            )
            bits = values.to(tl.int32, bitcast=True)
            below += tl.sum(((bits >= 0) & (bits < candidate)).to(tl.int32), axis=0)
        found = tl.where((below <= rank) & (candidate < LARGEST), candidate, found)

    at_most = tl.where(present <= found, 1, 0)
    following = tl.where(present > found, present, LARGEST)
    for start in range(0, recorded, BLOCK):
        values = tl.load(rows_ptr + (start + lanes) * 3, mask=start + lanes < recorded, other=-1.0)
        bits = values.to(tl.int32, bitcast=True)
        at_most += tl.sum(((bits >= 0) & (bits <= found)).to(tl.int32), axis=0)
        above = tl.where(bits > found, bits, LARGEST)
        following = tl.minimum(following, tl.min(above, axis=0))
    lower = found.to(tl.float32, bitcast=True)
    upper = tl.where((at_most > rank + 1) | (following == LARGEST), found, following)
    upper = upper.to(tl.float32, bitcast=True)
    threshold = lower + (upper - lower) * (place - rank.to(tl.float32))
    threshold = tl.where(known > 0, tl.minimum(threshold, max_norm), max_norm)

    coefficient = coefficient_of(total, threshold, norm_dtype)
    if NONFINITE == "zero":
        coefficient = tl.where(is_finite, coefficient, 0.0)
    tl.store(threshold_ptr, threshold)
    tl.store(coefficient_ptr, coefficient.to(norm_dtype))
    tl.store(inverse_ptr, tl.div_rn(1.0, coefficient))
    if NONFINITE == "spare":
        coefficient = tl.where(is_finite, coefficient, float("nan"))
    record_step(rows_ptr, counts_ptr, capacity, total, threshold, coefficient, is_finite)


class Settled(NamedTuple):
    """What a step's norm leads to, on its device.

    threshold: in force [] float32.
    coefficient: by which gradients are to be multiplied [], of the norm's dtype.
    inverse: 1 / coefficient [] float32.
    """

    threshold: Tensor
    coefficient: Tensor
    inverse: Tensor


def launch_options(warp_size: int = 32) -> dict[str, object]:
    """The compiler's options."""
    return compiler_options(THREADS // warp_size)


def settle(
    total_norm: Tensor,
    ring: Ring,
    percentile: float,
    max_norm: float,
    *,
    zero_nonfinite: bool = False,
    spare_nonfinite: bool = False,
    trusted: bool = False,
) -> Settled:
    """Finds the threshold of a step and records it, in one launch, without a synchronisation.

    Args:
        total_norm: the step's [], as `clip_gradients` returns it.
        ring: what was recorded, and where this step is.
        percentile: 0 to 100; between two norms it is interpolated. If none is finite, max_norm
            holds alone.
        max_norm: the largest threshold.
        zero_nonfinite: whether the coefficient of a norm that is not finite is 0.
        spare_nonfinite: whether such a coefficient is recorded as NaN.
        trusted: whether the caller answers for the kernel; else it is checked first (trust.py).

    Raises:
        fastrnn_kernels.launch.CannotLaunch: a compiler, the driver or the GPU refuses it (nothing
            was recorded).
        fastrnn_kernels.trust.NotChecked: a CUDA graph is being captured, and this kernel has not
            been checked before.
    """
    nonfinite = "zero" if zero_nonfinite else "spare" if spare_nonfinite else "scale"
    variant = None
    if not trusted:
        options = (("norm_dtype", total_norm.dtype), ("nonfinite", nonfinite))
        variant = HelperVariant("threshold", total_norm.device, options)
    floats = torch.empty(2, dtype=torch.float32, device=total_norm.device)
    threshold, inverse = floats.unbind()
    coefficient = torch.empty_like(total_norm)
    with trusting(variant), launching(total_norm):
        compiled = threshold_kernel[(1,)](
            ring.rows,
            ring.counts,
            total_norm,
            threshold,
            coefficient,
            inverse,
            len(ring.rows),
            float(max_norm),
            percentile / 100,
            NONFINITE=nonfinite,
            BLOCK=BLOCK,
            **launch_options(32 if torch.version.hip is None else 64),
        )
    assert_no_spill(compiled)
    return Settled(threshold, coefficient, inverse)
