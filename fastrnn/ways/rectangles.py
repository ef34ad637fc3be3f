"""The recurrence as dense rectangles, each torch's own oneDNN LSTM: the fast path for ragged input.

A ragged batch sorted by decreasing length is a staircase. Cut at some of its steps it becomes
rectangles, one for each run of steps, whose rows are the sequences still active at the run's start;
the states at a rectangle's end enter the next. Within a rectangle sequences may end early: the
carry feature of onednn.py keeps their cell states exact. h_n is read at each sequence's last valid
step.

The reverse direction is the same with each sequence's rows in reverse order.

torch differentiates the calls, and their backward too, so double backward needs nothing here. By
hand it takes longer (B128 T29 H64 in two rectangles: by 0.7 ms of 9).

Where to cut is a free choice: :func:`plan` weighs the fixed cost of a call against the padded steps
by dynamic programming over the lengths, and says what the result will cost. oneDNN compiles code
for every shape that it has not met, which costs as much as several calls, so a plan's rectangles
have few shapes.

In the dtypes of onednn.py: 16-bit inputs are computed in float32 and rounded once, at the output,
but for bfloat16 where the processor multiplies it.

Limits: those of onednn.py. The operator's workspace is its scratch too, so two threads must not run
backward on one retained graph at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.cells.lstm import LayerWeights
from fastrnn.choosing.costs import LayerCosts
from fastrnn.input.packing import Rectangle, RectangleLayout, common_steps
from fastrnn.input.transforms import under_functorch
from fastrnn.ways import onednn
from fastrnn.ways.recurrence import LayerOutput, side_by_side

# A plan's cuts are multiples of a power of two of steps, of which there are at most so many, and at
# most twice as many as sequences: looking costs 2 us a place.
MOST_PLACES = 32
# Lengths of rectangles, in that unit; and sequences, in eighths of the power of two below them. At
# sixteenths large batches gain 2 %, and small ones lose 20 % to the first sight of more shapes.
UNITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FINENESS = 3


class Plan(NamedTuple):
    """Rectangles that cover a batch, in the order of time, and their cost in seconds."""

    rectangles: tuple[Rectangle, ...]
    seconds: float

    @property
    def rows(self) -> int:
        """Of all rectangles."""
        return sum((last - first) * sequences for first, last, sequences in self.rectangles)


@functools.lru_cache(maxsize=32)
def plan(sizes: tuple[int, ...], cost: LayerCosts) -> Plan:
    """The cheapest way to cover the staircase ``sizes`` with rectangles of few shapes.

    Args:
        sizes: active sequences at each step, non-increasing.
        cost: the model.

    Returns:
        See :class:`Plan`. One rectangle is as large as the staircase, or has a step in 50 more
        where it holds padding anyway; several have lengths and widths as above, and may reach
        beyond the staircase in both. None where no step is valid.
    """
    if not sizes or not sizes[0]:
        return Plan((), 0.0)
    steps, most = len(sizes), sizes[0]
    unit = 1
    while steps > min(MOST_PLACES, 2 * most) * unit:
        unit *= 2
    places = -(-steps // unit)
    widths = [_rounded(size, most) for size in sizes[::unit]]
    best, cut = [0.0] + [math.inf] * places, [(0, 0)] * (places + 1)
    for begin in range(places):
        fixed, left = best[begin] + cost.call, places - begin
        rate = unit * cost.row * (widths[begin] + cost.step)
        for length in UNITS:
            seconds = fixed + length * rate
            end = begin + length if length < left else places
            if seconds < best[end]:
                best[end], cut[end] = seconds, (begin, length)
            if length >= left:
                break
    whole = cost.call + cost.row * steps * (most + cost.step)
    if whole <= best[-1]:
        full = sizes[-1] == most
        return Plan(
            (Rectangle(0, steps if full else common_steps(steps), most),), cost.layer + whole
        )
    rectangles = []
    end = places
    while end:
        begin, length = cut[end]
        rectangles.append(Rectangle(begin * unit, (begin + length) * unit, widths[begin]))
        end = begin
    return Plan(tuple(reversed(rectangles)), cost.layer + best[-1])


def least_seconds(lengths: Sequence[int], cost: LayerCosts) -> float:
    """What no plan for sequences of these lengths costs less than, without one."""
    longest = max(lengths)
    between = longest * cost.step
    one = cost.seconds(1, longest * len(lengths) + between)
    return min(one, cost.seconds(2, sum(lengths) + between))


@functools.lru_cache(maxsize=4096)
def _rounded(size: int, most: int) -> int:
    """``size`` rounded up to a width that other batches have too."""
    grain = 1 << max(0, size.bit_length() - 1 - FINENESS)
    return min(-(-size // grain) * grain, most)


class _Mirrored(torch.autograd.Function):
    """Rows in the opposite order of every sequence's steps; its own inverse, and derivative."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mirror: Tensor) -> Tensor:
        ctx.mirror = mirror
        return rows.index_select(0, mirror)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        return _mirrored(d_rows, ctx.mirror), None


def _mirrored(rows: Tensor, mirror: Tensor) -> Tensor:
    """See :class:`_Mirrored`, which functorch does not take."""
    if under_functorch():
        return rows.index_select(0, mirror)
    mirrored: Tensor = _Mirrored.apply(rows, mirror)
    return mirrored


def run_rectangles(
    layout: RectangleLayout,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[LayerWeights],
) -> LayerOutput:
    """All directions of one layer.

    Args:
        layout: of the batch.
        rows: ``[N, I]``; what stands in the padding is not read.
        h_0: ``[D, S, H]``.
        c_0: ``[D, S, H]``.
        weights: of each direction, without projections.

    Returns:
        See :class:`LayerOutput`; ``h`` is zero in the last row, and ``c`` is None.
    """
    dtype = rows.dtype
    wide = onednn.compute_dtype(dtype)
    rows, h_0, c_0 = (tensor.to(wide) for tensor in (rows, h_0, c_0))
    results = []
    for index, direction in enumerate(weights):
        reverse = index == 1
        x = _mirrored(rows, layout.mirror) if reverse else rows
        output, *last = _run_direction(x, layout, direction.to(wide), h_0[index], c_0[index])
        results.append((_mirrored(output, layout.mirror) if reverse else output, *last))
    h, h_n, c_n = zip(*results, strict=True)
    return LayerOutput(
        side_by_side(h).to(dtype), torch.stack(h_n).to(dtype), torch.stack(c_n).to(dtype), None
    )


def _run_direction(
    rows: Tensor, layout: RectangleLayout, weights: LayerWeights, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[N, H]`` and final states ``[S, H]``, of rows in the order that it walks."""
    flat = onednn.operands(weights, carry=layout.has_padding)
    if torch.is_grad_enabled() and len(layout.rectangles) > 1:
        # The gradients of all rectangles are added up in float32, and rounded once.
        flat = [weight.float() for weight in flat]
    if layout.has_padding:
        rows = onednn.with_carry(rows, layout.carry.to(rows.dtype), layout.valid)
    h_0, outputs, ended = h, [], []
    counts = [(last - first) * width for first, last, width in layout.rectangles]
    parts = rows.split([*counts, 1])
    for part, (first, last, width) in zip(parts, layout.rectangles, strict=False):
        if width < c.shape[0]:
            c, end = c.split([width, c.shape[0] - width])
            h = h[:width]
            ended.append(end)
        x = part.view(last - first, width, part.shape[1])
        own = [weight.to(rows.dtype) for weight in flat]
        output, h, c, _ = onednn.one_layer(x, own, h.contiguous(), c.contiguous())
        outputs.append(output.flatten(0, 1))
    outputs.append(h.new_zeros(1, h.shape[1]))
    found = torch.cat(outputs)
    h_n = found.index_select(0, layout.last)
    active = layout.sizes[0]
    if active < h_0.shape[0]:
        h_n = torch.cat([h_n, h_0[active:]])
    return found, h_n, torch.cat([c, *ended[::-1]])
