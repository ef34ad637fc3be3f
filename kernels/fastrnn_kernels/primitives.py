"""Device functions that the forward and the backward kernel share.

The gate functions are free of NaN over the whole float32 range (infinities included) and pass a NaN
on.
Limits: float32 arguments only; callers convert.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). exp overflows to inf for x < -88, and 1 / inf is the right answer, 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """The hyperbolic tangent within 2e-7 (relative) in float32.

    Below 0.6 an odd polynomial (least squares on Chebyshev nodes, relative error 3e-9 before
    rounding), because `1 - 2 / (exp(2|x|) + 1)` cancels there. Above it that form, which needs |x|:
    with the sign left in, `(e - 1) / (e + 1)` becomes inf / inf for large x.
    """
    square = x * x
    series = -0.05378329300049249 + square * (0.02079461771075183 - square * 0.005893945304062985)
    series = -0.3333329751012874 + square * (0.1333191529881638 + square * series)
    series = x + x * (square * series)
    magnitude = tl.abs(x)
    tail = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    tail = tl.where(x < 0, -tail, tail)
    return tl.where(magnitude < 0.6, series, tail)


@triton.jit
def split_gates(gates, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Takes [BLOCK_B, 4 * BLOCK_H], column n = 4 * unit + gate, apart into i, f, g, o."""
    pairs = tl.reshape(gates, (BLOCK_B, BLOCK_H, 2, 2))
    even, odd = tl.split(pairs)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def grouped_range(GROUPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """0 ... BLOCK_K - 1 as [GROUPS, BLOCK_K / GROUPS].

    With GROUPS > 1 a product [BLOCK_B, BLOCK_K] x [BLOCK_K, n] is made as GROUPS products, each
    over its part of K, and one group is a warp's. A narrow product has too few columns to go round:
    without groups all warps would make the same one, read all of W, and wait for a chain of BLOCK_K
    / 16 dependent matrix instructions.
    """
    PART: tl.constexpr = BLOCK_K // GROUPS
    return tl.arange(0, GROUPS)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def exchange_block(
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr
):
    """Offsets of the first BLOCK_K columns of a tile of the exchange [BLOCK_B, WIDTH]."""
    rows = tl.arange(0, BLOCK_B)
    if GROUPS == 1:
        offsets = rows[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]
    else:
        offsets = rows[None, :, None] * WIDTH + grouped_range(GROUPS, BLOCK_K)[:, None, :]
    return offsets


@triton.jit
def zero_product(BLOCK_B: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """The accumulator of a product, by groups if there are some."""
    if GROUPS == 1:
        product = tl.zeros([BLOCK_B, COLUMNS], dtype=tl.float32)
    else:
        product = tl.zeros([GROUPS, BLOCK_B, COLUMNS], dtype=tl.float32)
    return product


@triton.jit
def add_neighbours(product):
    """Halves the last axis of three: elements 0 and 1, 2 and 3, ... are added."""
    HALF: tl.constexpr = product.shape[2] // 2
    pairs = tl.reshape(product, (product.shape[0], product.shape[1], HALF, 2))
    even, odd = tl.split(pairs)
    return even + odd


@triton.jit
def sum_groups(product, GROUPS: tl.constexpr):
    """The product [BLOCK_B, columns] from its groups, always added up in the same order.

    Split apart, all groups of an element come to one thread, 16 bytes of shared memory at a time.
    tl.sum across warps takes each number through shared memory by itself, at an address of its own,
    and ptxas keeps so many of these in registers from step to step that it spills.
    """
    if GROUPS > 1:
        BLOCK_B: tl.constexpr = product.shape[1]
        COLUMNS: tl.constexpr = product.shape[2]
        product = tl.permute(product, (1, 2, 0))
        for _ in tl.static_range(GROUPS):  # at most: the axis is halved until one group is left
            if product.shape[2] > 1:
                product = add_neighbours(product)
        product = tl.reshape(product, (BLOCK_B, COLUMNS))
    return product


@triton.jit
def count_steps(batch_sizes_ptr, T, first_row):
    """The number of steps in which sequence `first_row`, the longest of its batch tile, is active.

    batch_sizes never grows, so these are steps 0 ... count - 1.
    """
    count = 0
    for start in range(0, T, 1024):
        step = start + tl.arange(0, 1024)
        sizes = tl.load(batch_sizes_ptr + step, mask=step < T, other=0)
        count += tl.sum((sizes > first_row).to(tl.int32))
    return count


@triton.jit
def last_not_above(values_ptr, count, key):
    """For each key the last index whose value is <= key; 0 where none is.

    The values never fall; `count` is at least 1.
    """
    low = tl.zeros_like(key).to(tl.int32)
    span = 1
    while 2 * span < count:
        span *= 2
    while span > 0:
        probe = low + span
        inside = probe < count
        value = tl.load(values_ptr + probe, mask=inside, other=0)
        low = tl.where(inside & (value <= key), probe, low)
        span //= 2
    return low


@triton.jit
def rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps):
    """Active sequences of a step and its first row; (0, 0) outside 0 <= step < steps."""
    inside = (step >= 0) & (step < steps)
    active = tl.load(batch_sizes_ptr + step, mask=inside, other=0)
    row = tl.load(offsets_ptr + step, mask=inside, other=0)
    return active, row


@triton.jit
def load_gates(ptr, row, stride, offsets, mask, H: tl.constexpr):
    """Loads the tiles of gates i, f, g, o.

    `row` is int64, for row * stride may exceed 2^31; offsets within a tile are int32.
    """
    base = ptr + row * stride
    i = tl.load(base + offsets, mask=mask, other=0.0)
    f = tl.load(base + (offsets + H), mask=mask, other=0.0)
    g = tl.load(base + (offsets + 2 * H), mask=mask, other=0.0)
    o = tl.load(base + (offsets + 3 * H), mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def load_rows(ptr, row, stride, offsets, mask):
    """Loads a tile that begins at `row`, addressed as in `load_gates`."""
    return tl.load(ptr + row * stride + offsets, mask=mask, other=0.0)


@triton.jit
def store_gates(ptr, row, stride, offsets, mask, i, f, g, o, H: tl.constexpr):
    """Stores the tiles of gates i, f, g, o, rounded to the type of `ptr`."""
    base = ptr + row * stride
    dtype = ptr.dtype.element_ty
    tl.store(base + offsets, i.to(dtype), mask=mask)
    tl.store(base + (offsets + H), f.to(dtype), mask=mask)
    tl.store(base + (offsets + 2 * H), g.to(dtype), mask=mask)
    tl.store(base + (offsets + 3 * H), o.to(dtype), mask=mask)
