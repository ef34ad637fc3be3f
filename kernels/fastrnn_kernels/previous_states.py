"""The hidden state that every row came with, h_{t-1}: what d_W_hh = d_gates^T h_{t-1} is made of.

Letters as in lstm_forward.py.

Limits: as in lstm_forward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .compiler_options import compiler_options
from .launch import launching
from .primitives import last_not_above
from .tiling import ceil_div
from .trust import HelperVariant, trusting

BLOCK_N = 32
MOST_UNITS = 128  # of a program: with 32 rows 32 numbers a thread


@triton.jit(do_not_specialize=["N", "S", "T"])
def previous_states_kernel(
    h_ptr,  # [N, D, H]
    h_0_ptr,  # [D, S, H]
    batch_sizes_ptr,  # [T] int64
    offsets_ptr,  # [T] int64
    previous_ptr,  # [D, N, H]
    N,
    S,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rows n of a program, in step t = step(n), of sequence s = n - offsets[t].

        previous[n] = h[offsets[t'] + s] if s is active in step t', else h_0[s]

    t' = t - 1, in direction 1 t + 1. Rows beyond the valid ones are zero.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    direction = tl.program_id(2)
    valid = tl.load(offsets_ptr + T - 1) + tl.load(batch_sizes_ptr + T - 1)
    used = row < valid
    step = last_not_above(offsets_ptr, T, row)
    sequence = row - tl.load(offsets_ptr + step)
    before = step - 1 + 2 * direction
    inside = (before >= 0) & (before < T)
    active = sequence < tl.load(batch_sizes_ptr + before, mask=inside, other=0)
    known = used & active
    source = tl.load(offsets_ptr + before, mask=inside, other=0) + sequence
    in_units = (units < H)[None, :]
    h = tl.load(
        h_ptr + ((source * D + direction) * H)[:, None] + units[None, :],
        mask=known[:, None] & in_units,
        other=0.0,
    )
    h_0 = tl.load(
        h_0_ptr + ((direction.to(tl.int64) * S + sequence) * H)[:, None] + units[None, :],
        mask=(used & (active == 0))[:, None] & in_units,
        other=0.0,
    )
    tl.store(
        previous_ptr + ((direction.to(tl.int64) * N + row) * H)[:, None] + units[None, :],
        tl.where(known[:, None], h, h_0),
        mask=(row < N)[:, None] & in_units,
    )


def previous_states(
    h: torch.Tensor,
    h_0: torch.Tensor,
    batch_sizes: torch.Tensor,
    offsets: torch.Tensor,
    *,
    trusted: bool = False,
) -> torch.Tensor:
    """The state before each row, in one launch on the current stream.

    Args:
        h: outputs of the layer, contiguous [N, D, H].
        h_0: initial hidden states, contiguous [D, S, H].
        batch_sizes: active sequences of each step, never growing [T], int64.
        offsets: first row of each step [T], int64.
        trusted: whether the caller answers for the kernel; else it is checked first (trust.py).

    Returns:
        [D, N, H], zero in rows beyond the valid ones; h_0 where a sequence begins.

    Raises:
        CannotLaunch: a compiler, the driver or the GPU refuses it, or a kernel of such a layer has
            failed its check (nothing was computed).
        NotChecked: a CUDA graph is being captured, and this kernel has not been checked before.
    """
    N, D, H = h.shape
    S, T = h_0.shape[1], batch_sizes.shape[0]
    previous = h.new_empty(D, N, H)
    if previous.numel() == 0:
        return previous
    if T == 0:
        return previous.zero_()
    BLOCK_H = min(MOST_UNITS, triton.next_power_of_2(H))
    variant = None
    if not trusted:
        options = (("H", H), ("D", D), ("dtype", h.dtype))
        variant = HelperVariant("previous", h.device, options)
    with trusting(variant), launching(h):
        previous_states_kernel[(ceil_div(N, BLOCK_N), ceil_div(H, BLOCK_H), D)](
            *(h, h_0, batch_sizes, offsets, previous, N, S, T),
            H=H,
            D=D,
            BLOCK_N=BLOCK_N,
            BLOCK_H=BLOCK_H,
            **compiler_options(),
        )
    return previous
