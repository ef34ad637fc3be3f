"""The norm of gradients and their rescaling: the kernel and its device functions.

What it computes, what it costs and its limits: gradient_norm.py, which launches it.
"""

import triton
import triton.language as tl

from .grid_barrier import count_arrival, wait


@triton.jit
def contribution(x, NORM: tl.constexpr):
    """What values add to a norm; for inf |x| as an integer, of which NaN's is the largest."""
    if NORM == "2":
        added = x * x
    elif NORM == "1":
        added = tl.abs(x)
    else:
        added = tl.abs(x).to(tl.int32, bitcast=True)
    return added


@triton.jit
def nothing_yet(BLOCK: tl.constexpr, NORM: tl.constexpr):
    """The empty sum, or the smallest maximum."""
    if NORM == "inf":
        zeros = tl.zeros([BLOCK], dtype=tl.int32)
    else:
        zeros = tl.zeros([BLOCK], dtype=tl.float32)
    return zeros


@triton.jit
def merge(a, b, NORM: tl.constexpr):
    """Two sums, or two maxima."""
    if NORM == "inf":
        merged = tl.maximum(a, b)
    else:
        merged = a + b
    return merged


@triton.jit
def fold(values, NORM: tl.constexpr):
    """One float32 from a block."""
    if NORM == "inf":
        folded = tl.max(values, axis=0).to(tl.float32, bitcast=True)
    else:
        folded = tl.sum(values, axis=0)
    return folded


@triton.jit
def root(folded, NORM: tl.constexpr):
    """The norm from a sum of powers."""
    if NORM == "2":
        folded = tl.sqrt_rn(folded)
    return folded


@triton.jit
def fold_array(ptr, first, last, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Sum or maximum of what elements first ... last - 1 contribute."""
    found = nothing_yet(BLOCK, NORM)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        values = tl.load(ptr + index, mask=index < last, other=0.0).to(tl.float32)
        found = merge(found, contribution(values, NORM), NORM)
    return fold(found, NORM)


@triton.jit
def fold_partials(ptr, first, last, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Sum or maximum of partial results; they are not negative, so their 1-norm is their sum."""
    if NORM == "inf":
        folded = fold_array(ptr, first, last, "inf", BLOCK)
    else:
        folded = fold_array(ptr, first, last, "1", BLOCK)
    return folded


@triton.jit
def split_segment(address, elements, VECTOR: tl.constexpr):
    """How many elements come before the first whole 16 bytes, and how many are in whole ones."""
    head = ((-address) & 15).to(tl.int32) // (16 // VECTOR)
    head = tl.minimum(head, elements)
    return head, (elements - head) // VECTOR * VECTOR


@triton.jit
def find_segment(addresses_ptr, offsets_ptr, sizes_ptr, segment):
    """Address, elements and kind of a segment."""
    size = tl.load(sizes_ptr + segment)
    address = tl.load(addresses_ptr + (size >> 32)) + tl.load(offsets_ptr + segment)
    return address, ((size & 0xFFFFFFFF) >> 2).to(tl.int32), size & 3


@triton.jit
def edge_offsets(head, body, elements, VECTOR: tl.constexpr):
    """Offsets of the head, then of what follows the body, and which of them exist."""
    lane = tl.arange(0, 2 * VECTOR)
    in_head = lane < VECTOR
    offsets = tl.where(in_head, lane, lane + (head + body - VECTOR))
    return offsets, offsets < tl.where(in_head, head, elements)


@triton.jit
def fold_segment(
    address, elements, dtype: tl.constexpr, NORM: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    """Sum or maximum over a segment: 16 bytes at a time, its unaligned ends element by element."""
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    BLOCK: tl.constexpr = BLOCK_BYTES // 16 * VECTOR
    head, body = split_segment(address, elements, VECTOR)
    ptr = address.to(tl.pointer_type(dtype))
    lanes, mask = edge_offsets(head, body, elements, VECTOR)
    edges = tl.load(ptr + lanes, mask=mask, other=0.0).to(tl.float32)

    body_ptr = tl.multiple_of(ptr + head, 16)
    # As many sums as in float32: twice as many leave no registers for the loads.
    SUMS: tl.constexpr = BLOCK_BYTES // 4
    found = nothing_yet(SUMS, NORM)
    for start in range(0, body, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(body_ptr + offsets, mask=offsets < body, other=0.0).to(tl.float32)
        added = contribution(values, NORM)
        if SUMS < BLOCK:
            even, odd = tl.split(tl.reshape(added, (SUMS, 2)))
            added = merge(even, odd, NORM)
        found = merge(found, added, NORM)
    in_body = fold(found, NORM)
    at_edges = fold(contribution(edges, NORM), NORM)
    if NORM == "inf":
        folded = tl.maximum(at_edges, in_body, propagate_nan=tl.PropagateNan.ALL)
    else:
        folded = at_edges + in_body
    return folded


@triton.jit
def scale_block(ptr, mask, coefficient, is_finite, NONFINITE: tl.constexpr):
    """Multiplies elements by the coefficient, in float32."""
    wanted = mask
    if NONFINITE == "zero":
        # What is not read is 0, and stays it; 0 * NaN would not.
        wanted = mask & is_finite
    values = tl.load(ptr, mask=wanted, other=0.0)
    tl.store(ptr, (values.to(tl.float32) * coefficient).to(values.dtype), mask=mask)


@triton.jit
def scale_segment(
    address,
    elements,
    coefficient,
    is_finite,
    dtype: tl.constexpr,
    NONFINITE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Rescales a segment from its last block to its first: the last was read most recently."""
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    BLOCK: tl.constexpr = BLOCK_BYTES // 16 * VECTOR
    head, body = split_segment(address, elements, VECTOR)
    ptr = address.to(tl.pointer_type(dtype))
    body_ptr = tl.multiple_of(ptr + head, 16)
    blocks = tl.cdiv(body, BLOCK)
    for block in range(blocks):
        offsets = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        scale_block(body_ptr + offsets, offsets < body, coefficient, is_finite, NONFINITE)
    lanes, mask = edge_offsets(head, body, elements, VECTOR)
    scale_block(ptr + lanes, mask, coefficient, is_finite, NONFINITE)


@triton.jit
def record_step(rows_ptr, counts_ptr, capacity, total, max_norm, coefficient, is_finite):
    """Writes a step to a ring: norm, threshold, coefficient; and counts it.

    Counts are of steps, of those that were not finite, and of such that came last, in a row.
    """
    steps = tl.load(counts_ptr)
    row_ptr = rows_ptr + steps % capacity * 3
    tl.store(row_ptr, total)
    tl.store(row_ptr + 1, max_norm)
    tl.store(row_ptr + 2, coefficient)
    nonfinite = tl.where(is_finite, 0, 1)
    tl.store(counts_ptr, steps + 1)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + nonfinite)
    tl.store(counts_ptr + 2, (tl.load(counts_ptr + 2) + 1) * nonfinite)


@triton.jit
def coefficient_of(total, max_norm, norm_dtype: tl.constexpr):
    """min(max_norm / (total + 1e-6), 1) by torch's own steps, each rounded to the norm's dtype."""
    denominator = (total + 1e-6).to(norm_dtype).to(tl.float32)
    reciprocal = tl.div_rn(1.0, denominator).to(norm_dtype).to(tl.float32)
    coefficient = (reciprocal * max_norm).to(norm_dtype).to(tl.float32)
    return tl.where(coefficient >= 1.0, 1.0, coefficient)


@triton.jit
def finite(x):
    """Whether a float32 is neither infinite nor NaN, by its bits: NaN's are larger than inf's."""
    return tl.abs(x).to(tl.int32, bitcast=True) < 0x7F800000


@triton.jit(
    do_not_specialize=["segments", "gradients", "others", "max_norm", "capacity"],
    do_not_specialize_on_alignment=[
        "norms_ptr",
        "total_ptr",
        "coefficient_ptr",
        "inverse_ptr",
        "nonfinite_ptr",
        "rows_ptr",
        "counts_ptr",
    ],
)
def gradient_norm_kernel(
    table_ptr,  # int64: see Plan.template
    partials_ptr,  # [segments] float32
    other_norms_ptr,  # [others] norms that torch has computed
    failed_ptr,  # [1] int32 in the host's memory: 1 where a wait was given up
    norms_ptr,  # [gradients], of the norm's dtype
    total_ptr,  # [], of the norm's dtype
    coefficient_ptr,  # [], of the norm's dtype
    inverse_ptr,  # [] float32: 1 / coefficient
    nonfinite_ptr,  # [] float32: 1 where the norm is NaN or infinite, else 0
    rows_ptr,  # [capacity, 3] float32: norm, threshold and coefficient of the latest steps
    counts_ptr,  # [3] int64: see record_step
    segments,
    gradients,
    others,
    max_norm,
    capacity,
    NORM: tl.constexpr,
    ROUND_NORMS: tl.constexpr,
    SCALE: tl.constexpr,
    NONFINITE: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    COMBINE_BLOCK: tl.constexpr,
):
    """Norms of all gradients, and their rescaling.

    Program p owns the segments of share p: it sums |g|^p over each into `partials`, and after the
    barrier multiplies the same segments, last one first. Between the two every program computes the
    same total from all partials, in the same order, hence bit-equal. With ROUND_NORMS, which is
    what torch does to 16-bit gradients, the total is that of rounded norms: program p computes
    those of gradients p, p + programs, ..., and a second barrier follows.

    NONFINITE says what a norm that is not finite does: "scale" like any other, "zero" all
    gradients, or "spare" them, as a step that is not taken.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    arrivals_ptr = table_ptr.to(tl.pointer_type(tl.int32))
    addresses_ptr = table_ptr + 1
    offsets_ptr = addresses_ptr + gradients
    sizes_ptr = offsets_ptr + segments
    gradients_ptr = sizes_ptr + segments
    shares_ptr = gradients_ptr + gradients + 1
    first = tl.load(shares_ptr + program).to(tl.int32)
    last = tl.load(shares_ptr + program + 1).to(tl.int32)
    norm_dtype: tl.constexpr = total_ptr.dtype.element_ty

    for segment in range(first, last):
        address, elements, kind = find_segment(addresses_ptr, offsets_ptr, sizes_ptr, segment)
        if kind == 0:
            partial = fold_segment(address, elements, tl.float32, NORM, BLOCK_BYTES)
        elif kind == 1:
            partial = fold_segment(address, elements, tl.bfloat16, NORM, BLOCK_BYTES)
        else:
            partial = fold_segment(address, elements, tl.float16, NORM, BLOCK_BYTES)
        tl.store(partials_ptr + segment, partial)
    count_arrival(arrivals_ptr)
    wait(arrivals_ptr, programs, failed_ptr)

    for gradient in range(program, gradients, programs):
        row = tl.load(gradients_ptr + gradient)
        next_row = tl.load(gradients_ptr + gradient + 1)
        partial = fold_partials(
            partials_ptr, (row // 4).to(tl.int32), (next_row // 4).to(tl.int32), NORM, COMBINE_BLOCK
        )
        norm = root(partial, NORM)
        if ROUND_NORMS:
            kind = row % 4
            if kind == 1:
                norm = norm.to(tl.bfloat16).to(tl.float32)
            elif kind == 2:
                norm = norm.to(tl.float16).to(tl.float32)
        tl.store(norms_ptr + gradient, norm.to(norm_dtype))
    if ROUND_NORMS:
        count_arrival(arrivals_ptr)
        wait(arrivals_ptr, 2 * programs, failed_ptr)
        total = fold_array(norms_ptr, 0, gradients, NORM, COMBINE_BLOCK)
    else:
        total = fold_partials(partials_ptr, 0, segments, NORM, COMBINE_BLOCK)
    if others > 0:
        of_others = fold_array(other_norms_ptr, 0, others, NORM, COMBINE_BLOCK)
        if NORM == "inf":
            total = tl.maximum(total, of_others, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += of_others

    total = root(total, NORM).to(norm_dtype).to(tl.float32)
    coefficient = coefficient_of(total, max_norm, norm_dtype)
    is_finite = finite(total)
    if NONFINITE == "zero":
        coefficient = tl.where(is_finite, coefficient, 0.0)
    if program == 0:
        tl.store(total_ptr, total.to(norm_dtype))
        tl.store(coefficient_ptr, coefficient.to(norm_dtype))
        tl.store(inverse_ptr, tl.div_rn(1.0, coefficient))
        tl.store(nonfinite_ptr, tl.where(is_finite, 0.0, 1.0))
        if RECORD:
            recorded = coefficient
            if NONFINITE == "spare":
                recorded = tl.where(is_finite, coefficient, float("nan"))
            record_step(rows_ptr, counts_ptr, capacity, total, max_norm, recorded, is_finite)

    # NaN must scale too: it is not >= 1, and not < 1 either.
    wanted = not (coefficient >= 1.0)
    if NONFINITE == "spare":
        wanted = wanted & is_finite
    if SCALE and wanted:
        for back in range(last - first):
            segment = last - 1 - back
            address, elements, kind = find_segment(addresses_ptr, offsets_ptr, sizes_ptr, segment)
            if kind == 0:
                scale_segment(
                    address,
                    elements,
                    coefficient,
                    is_finite,
                    tl.float32,
                    NONFINITE,
                    BLOCK_BYTES,
                )
            elif kind == 1:
                scale_segment(
                    address,
                    elements,
                    coefficient,
                    is_finite,
                    tl.bfloat16,
                    NONFINITE,
                    BLOCK_BYTES,
                )
            else:
                scale_segment(
                    address,
                    elements,
                    coefficient,
                    is_finite,
                    tl.float16,
                    NONFINITE,
                    BLOCK_BYTES,
                )
