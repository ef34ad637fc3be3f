"""The packed layout of a padded batch whose lengths, mask and resets are on the GPU.

Three launches and a sort make what twenty to eighty operations of torch would, and nobody waits:
N = B T rows are allocated, the valid ones first.

Letters: B batch, T steps, S sequences of the layout (B, or B T places for them when resets cut),
N rows. A sequence's slot is its batch element, or b T + k where it begins with the k-th valid step
of element b; slots where none begins have length 0. Sorted by decreasing length, it has a rank.

Limits: B T < 2^31; one program reads the flags of a batch element, one all lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .compiler_options import compiler_options
from .launch import launching
from .tiling import ceil_div
from .trust import HelperVariant, trusting

BLOCK = 1024


class BoundedLayout(NamedTuple):
    """Where rows come from and go to, and states enter and leave.

    fits: whether all lengths lie in [0, T] [], bool.
    batch_sizes: active sequences of each step [T], int64.
    offsets: first row of each step [T], int64.
    gather: each row's place in the flattened input, 0 for unused ones [N], int64.
    valid: whether a row is used [N, 1], bool.
    spread: the row of each place of the input [N], int64; the last, unused one where it is invalid.
    owner: the batch element of each sequence [S], int64.
    enters: whether its initial state enters, forward and reverse [2, S], bool; None without resets.
    leaves: the sequence whose end state is the batch element's, forward and reverse, or one for
        both [1 or 2, B], int64.
    """

    fits: torch.Tensor
    batch_sizes: torch.Tensor
    offsets: torch.Tensor
    gather: torch.Tensor
    valid: torch.Tensor
    spread: torch.Tensor
    owner: torch.Tensor
    enters: torch.Tensor | None
    leaves: torch.Tensor


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _flag(flags_ptr, element, step, stride_b, stride_t, inside):
    offsets = element.to(tl.int64) * stride_b + step.to(tl.int64) * stride_t
    return tl.load(flags_ptr + offsets, mask=inside, other=0).to(tl.int32)


@triton.jit(
    do_not_specialize=["T", "mask_b", "mask_t", "resets_b", "resets_t"],
)
def find_segments_kernel(
    lengths_ptr,  # [B] int64, when HAS_LENGTHS
    mask_ptr,  # [B, T] uint8 by the strides mask_b, mask_t, when HAS_MASK
    resets_ptr,  # [B, T] uint8 by the strides resets_b, resets_t, when HAS_RESETS
    places_ptr,  # [B, T] int32: the steps of each element, valid ones first
    begins_ptr,  # [B, T] int32: the k at which the k-th valid step's segment begins, if HAS_RESETS
    counts_ptr,  # [B] int32: valid steps
    keeps_ptr,  # [B] int32: whether h_0 reaches the first of them, if HAS_RESETS
    slots_ptr,  # [S] int64: lengths by slot
    T,
    mask_b,
    mask_t,
    resets_b,
    resets_t,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Valid steps of one batch element, and the segments that resets cut them into.

    R[t] counts resets up to step t. A segment begins at a valid step whose R is not that of the
    valid step before it.
    """
    element = tl.program_id(0)
    row = element.to(tl.int64) * T
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + element)
    count = 0
    resets_so_far = 0
    last_resets = -1  # R of the last valid step before this block
    begin = 0
    keeps = 1
    for start in range(0, T, BLOCK):
        step = start + tl.arange(0, BLOCK)
        inside = step < T
        valid = (inside & (step < length)).to(tl.int32)
        if HAS_MASK:
            valid = valid & _flag(mask_ptr, element, step, mask_b, mask_t, inside)
        index = count + tl.cumsum(valid, 0) - valid
        # Valid steps from the left, the others from the right.
        place = tl.where(valid != 0, index, T - 1 - (step - index))
        tl.store(places_ptr + row + place, step, mask=inside)
        if HAS_RESETS:
            reset = _flag(resets_ptr, element, step, resets_b, resets_t, inside)
            resets = resets_so_far + tl.cumsum(reset, 0)
            earlier = step > start
            before = ((step - 1) < length).to(tl.int32)
            if HAS_MASK:
                before = before & _flag(
                    mask_ptr, element, step - 1, mask_b, mask_t, inside & earlier
                )
            was = tl.where(earlier & (before != 0), resets - reset, last_resets)
            was = tl.associative_scan(was, 0, _larger)
            starts = (valid != 0) & (was != resets)
            begins = tl.where(starts, index, begin)
            begins = tl.associative_scan(begins, 0, _larger)
            tl.store(begins_ptr + row + index, begins, mask=valid != 0)
            keeps = tl.where(tl.sum(starts & (index == 0) & (resets > 0), 0) > 0, 0, keeps)
            begin = tl.max(begins, 0)
            last_resets = tl.max(tl.where(valid != 0, resets, last_resets), 0)
            resets_so_far += tl.sum(reset, 0)
        count += tl.sum(valid, 0)
    # A length that does not fit is left for the next kernel to see, and nothing else of it.
    wrong = (length < 0) | (length > T)
    count = tl.where(wrong, 0, count)
    tl.store(counts_ptr + element, count)
    if HAS_RESETS:
        tl.store(keeps_ptr + element, keeps)
        tl.debug_barrier()  # what other threads stored of `begins` is read
        for start in range(0, T, BLOCK):
            index = start + tl.arange(0, BLOCK)
            valid = index < count
            begins = tl.load(begins_ptr + row + index, mask=valid, other=0)
            following = index + 1
            next_begins = tl.load(begins_ptr + row + following, mask=following < count, other=0)
            is_last = valid & ((following == count) | (next_begins == following))
            slot_length = (following - begins).to(tl.int64)
            tl.store(slots_ptr + row + begins, slot_length, mask=is_last)
            empty = (index < T) & ((valid == 0) | (begins != index))
            nothing = tl.where(wrong & (index == 0), -1, 0).to(tl.int64)
            tl.store(slots_ptr + row + index, nothing + tl.zeros_like(slot_length), mask=empty)
    else:
        tl.store(slots_ptr + element, tl.where(wrong, -1, count).to(tl.int64))


@triton.jit(do_not_specialize=["B", "T", "S"])
def rank_sequences_kernel(
    sorted_ptr,  # [S] int64: lengths, falling
    order_ptr,  # [S] int64: the slot of each
    begins_ptr,  # [B, T] int32, if HAS_RESETS
    counts_ptr,  # [B] int32, likewise
    keeps_ptr,  # [B] int32, likewise
    fits_ptr,  # [] uint8
    batch_sizes_ptr,  # [T] int64
    offsets_ptr,  # [T] int64
    ranks_ptr,  # [S] int32, by slot
    owner_ptr,  # [S] int64
    enters_ptr,  # [2, S] uint8, if HAS_RESETS
    leaves_ptr,  # [1 or 2, B] int64
    B,
    T,
    S,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rank of each slot; the first program also counts the sequences of each step."""
    program = tl.program_id(0)
    rank = program * BLOCK + tl.arange(0, BLOCK)
    inside = rank < S
    slot = tl.load(order_ptr + rank, mask=inside, other=0)
    tl.store(ranks_ptr + slot, rank, mask=inside)
    if HAS_RESETS:
        element = slot // T
        place = slot % T
        tl.store(owner_ptr + rank, element, mask=inside)
        count = tl.load(counts_ptr + element, mask=inside, other=0)
        last = inside & (count > 0)
        last_begin = tl.load(begins_ptr + element * T + count - 1, mask=last, other=0)
        first, last = place == 0, place == last_begin
        keeps = tl.load(keeps_ptr + element, mask=inside, other=0) != 0
        tl.store(enters_ptr + rank, (first & keeps).to(tl.uint8), mask=inside)
        tl.store(enters_ptr + S + rank, last.to(tl.uint8), mask=inside)
        tl.store(leaves_ptr + element, rank.to(tl.int64), mask=inside & last)
        tl.store(leaves_ptr + B + element, rank.to(tl.int64), mask=inside & first)
    else:
        tl.store(owner_ptr + rank, slot, mask=inside)
        tl.store(leaves_ptr + slot, rank.to(tl.int64), mask=inside)
    if program == 0:
        longest, shortest = tl.load(sorted_ptr), tl.load(sorted_ptr + S - 1)
        tl.store(fits_ptr, ((longest <= T) & (shortest >= 0)).to(tl.uint8))
        total = tl.zeros([], tl.int64)
        for start in range(0, T, BLOCK):
            step = start + tl.arange(0, BLOCK)
            size = count_above(sorted_ptr, S, step)
            size = tl.where(step < T, size, 0).to(tl.int64)
            offset = total + tl.cumsum(size, 0) - size
            tl.store(batch_sizes_ptr + step, size, mask=step < T)
            tl.store(offsets_ptr + step, offset, mask=step < T)
            total += tl.sum(size, 0)


@triton.jit
def count_above(falling_ptr, count, key):
    """For each key how many values are greater; the values never rise."""
    found = tl.zeros_like(key)
    span = 1
    while 2 * span <= count:
        span *= 2
    while span > 0:
        probe = found + span
        inside = probe <= count
        value = tl.load(falling_ptr + probe - 1, mask=inside, other=0)
        found = tl.where(inside & (value > key), probe, found)
        span //= 2
    return found


@triton.jit(do_not_specialize=["B", "T"])
def place_rows_kernel(
    lengths_ptr,  # [B] int64, unless HAS_PLACES or HAS_RESETS
    places_ptr,  # [B, T] int32, if HAS_PLACES
    begins_ptr,  # [B, T] int32, if HAS_RESETS
    counts_ptr,  # [B] int32, if HAS_PLACES
    batch_sizes_ptr,  # [T] int64
    offsets_ptr,  # [T] int64
    ranks_ptr,  # [S] int32
    gather_ptr,  # [N] int64
    valid_ptr,  # [N] uint8
    spread_ptr,  # [N] int64
    B,
    T,
    TIME_MAJOR: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each batch element's k-th step, valid steps before the others."""
    N = B * T
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    element = place // T
    index = place % T
    step = index
    begin = tl.zeros_like(index)
    slot = element
    if HAS_PLACES:
        step = tl.load(places_ptr + place, mask=inside, other=0)
        count = tl.load(counts_ptr + element, mask=inside, other=0)
    else:
        count = tl.load(lengths_ptr + element, mask=inside, other=0)
    valid = inside & (index < count)
    if HAS_RESETS:
        begin = tl.load(begins_ptr + place, mask=valid, other=0)
        slot = element * T + begin
    first_row = tl.load(offsets_ptr + index - begin, mask=valid, other=0)
    row = first_row + tl.load(ranks_ptr + slot, mask=valid, other=0)
    if TIME_MAJOR:
        entry = step * B + element
    else:
        entry = element * T + step
    row = tl.where(valid, row, N - 1)
    tl.store(gather_ptr + row, entry.to(tl.int64), mask=valid)
    tl.store(spread_ptr + entry, row, mask=inside)
    used = tl.load(offsets_ptr + T - 1) + tl.load(batch_sizes_ptr + T - 1)
    tl.store(valid_ptr + place, (place < used).to(tl.uint8), mask=inside)
    tl.store(gather_ptr + place, tl.zeros_like(row), mask=inside & (place >= used))


def bounded_layout(
    batch: int,
    steps: int,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    resets: torch.Tensor | None,
    *,
    time_major: bool,
    device: torch.device,
    trusted: bool = False,
) -> BoundedLayout:
    """The layout of a padded batch, without a synchronisation.

    Args:
        batch: B, at least 1.
        steps: T, at least 1.
        lengths: leading steps that are valid [B], int64. None: all.
        mask: which steps are valid, bool [B, T] with any strides. None: all.
        resets: before which steps the state is zeroed, likewise. None: before none.
        time_major: whether the flattened input is [T, B], or else [B, T].
        device: where all of it is.
        trusted: whether the caller answers for the kernels; else they are checked first (trust.py).

    Returns:
        See :class:`BoundedLayout`. Where `fits` is False the rest is within bounds, and wrong.

    Raises:
        CannotLaunch: a compiler, the driver or the GPU refuses a launch, or the kernels have failed
            their check (nothing was computed).
        NotChecked: a CUDA graph is being captured, and they have not been checked before.
    """
    variant = None
    if not trusted:
        given = {"lengths": lengths, "mask": mask, "resets": resets}
        has = [(f"has_{name}", flags is not None) for name, flags in given.items()]
        variant = HelperVariant("layout", device, (*has, ("time_major", time_major)))
    B, T, N = batch, steps, batch * steps
    has_resets = resets is not None
    has_places = mask is not None or has_resets
    S = N if has_resets else B

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    nothing = empty(0, dtype=torch.int32)
    places = begins = counts = keeps = nothing
    slots = lengths
    if lengths is None or has_places:
        has_places = True
        places, counts = empty(N, dtype=torch.int32), empty(B, dtype=torch.int32)
        if has_resets:
            begins, keeps = empty(N, dtype=torch.int32), empty(B, dtype=torch.int32)
        slots = empty(S)
        flags = [nothing if flag is None else flag.view(torch.uint8) for flag in (mask, resets)]
        strides = [(0, 0) if flag is None else flag.stride() for flag in (mask, resets)]
        with trusting(variant), launching(slots):
            find_segments_kernel[(B,)](
                slots if lengths is None else lengths,
                *(*flags, places, begins, counts, keeps, slots, T, *strides[0], *strides[1]),
                HAS_LENGTHS=lengths is not None,
                HAS_MASK=mask is not None,
                HAS_RESETS=has_resets,
                BLOCK=BLOCK,
                **compiler_options(),
            )
    falling, order = torch.sort(slots, descending=True, stable=True)
    fits, ranks = empty(1, dtype=torch.bool), empty(S, dtype=torch.int32)
    batch_sizes, offsets, owner = empty(T), empty(T), empty(S)
    enters = empty(2, S, dtype=torch.bool) if has_resets else None
    leaves = empty(2 if has_resets else 1, B)
    gather, valid, spread = empty(N), empty(N, 1, dtype=torch.bool), empty(N)
    with trusting(variant), launching(slots):
        rank_sequences_kernel[(ceil_div(S, BLOCK),)](
            *(falling, order, begins, counts, keeps, fits.view(torch.uint8)),
            *(batch_sizes, offsets, ranks, owner),
            *(nothing if enters is None else enters.view(torch.uint8), leaves, B, T, S),
            HAS_RESETS=has_resets,
            BLOCK=BLOCK,
            **compiler_options(),
        )
        place_rows_kernel[(ceil_div(N, BLOCK),)](
            *(slots, places, begins, counts, batch_sizes, offsets, ranks),
            *(gather, valid.view(torch.uint8), spread, B, T),
            TIME_MAJOR=time_major,
            HAS_PLACES=has_places,
            HAS_RESETS=has_resets,
            BLOCK=BLOCK,
            **compiler_options(),
        )
    return BoundedLayout(
        fits[0], batch_sizes, offsets, gather, valid, spread, owner, enters, leaves
    )
