"""The recurrence as dense rectangles, each torch's own oneDNN LSTM: the fast path for ragged input.

A ragged batch sorted by decreasing length is a staircase. Cut at some of its steps it becomes
rectangles, one for each run of steps, whose rows are the sequences still active at the run's start;
the states at a rectangle's end enter the next. Within a rectangle sequences may end early: the
carry feature of onednn.py keeps their cell states exact. Outputs of padded steps are zero; h_n is
read at each sequence's last valid step.

The reverse direction is the same with each sequence's rows in reverse order.

Where to cut is a free choice: :func:`plan` weighs the fixed cost of a call against the padded steps
by dynamic programming over the lengths, and says what the result will cost. oneDNN compiles code
for every shape that it has not met, which costs as much as several calls, so a plan's rectangles
have few shapes.

In the dtypes of onednn.py: 16-bit inputs are computed in float32 and rounded once, at the output,
but for bfloat16 where the processor multiplies it.

Limits: those of onednn.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import onednn
from fastrnn.costs import LayerCosts
from fastrnn.packing import Rectangle, RectangleLayout
from fastrnn.recurrence import (
    LayerOutput,
    OutputGradients,
    columns,
    flatten_weights,
    layer_gradients,
    layer_output,
    run,
    unflatten_weights,
)
from fastrnn.reference import Forward, Gradients, LayerWeights
from fastrnn.step_loop import Call, run_composite

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


@functools.lru_cache(maxsize=32)
def plan(sizes: tuple[int, ...], cost: LayerCosts) -> Plan:
    """The cheapest way to cover the staircase ``sizes`` with rectangles of few shapes.

    Args:
        sizes: active sequences at each step, non-increasing.
        cost: the model.

    Returns:
        See :class:`Plan`. One rectangle is as large as the staircase; several have lengths and
        widths as above, and may reach beyond the staircase in both. None where no step is valid.
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
        return Plan((Rectangle(0, steps, most),), cost.layer + whole)
    rectangles = []
    end = places
    while end:
        begin, length = cut[end]
        rectangles.append(Rectangle(begin * unit, (begin + length) * unit, widths[begin]))
        end = begin
    return Plan(tuple(reversed(rectangles)), cost.layer + best[-1])


@functools.lru_cache(maxsize=4096)
def _rounded(size: int, most: int) -> int:
    """``size`` rounded up to a width that other batches have too."""
    grain = 1 << max(0, size.bit_length() - 1 - FINENESS)
    return min(-(-size // grain) * grain, most)


def _by_rectangle(slots: Tensor, rectangles: Sequence[Rectangle]) -> list[Tensor]:
    """Rows ``[N, F]``, the last of them spare, as one ``[steps, sequences, F]`` a rectangle."""
    parts, begin = [], 0
    for first, last, sequences in rectangles:
        end = begin + (last - first) * sequences
        parts.append(slots[begin:end].view(last - first, sequences, -1))
        begin = end
    return parts


def _in_order(rows: Tensor, layout: RectangleLayout, *, reverse: bool) -> Tensor:
    """Rows in the order that a direction walks, contiguous."""
    return rows.index_select(0, layout.mirror) if reverse else rows.contiguous()


def _input(rows: Tensor, layout: RectangleLayout, *, reverse: bool) -> Tensor:
    """The same, with the carry feature where it is needed."""
    rows = _in_order(rows, layout, reverse=reverse)
    return onednn.with_carry(rows, layout.carry) if layout.has_padding else rows


def _forward(
    x: Tensor,
    layout: RectangleLayout,
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    save: bool,
) -> Forward:
    """One direction; ``x`` is of :func:`_input`.

    ``h`` is ``[N, H]`` in the order it walks, zero in the padding. Saved: of each rectangle the
    states it began and ended with, and oneDNN's workspace.
    """
    rectangles, active = layout.rectangles, layout.sizes[0]
    operands = onednn.operands(weights, carry=layout.has_padding)
    h, c = h_0, c_0
    outputs: list[Tensor] = []
    ended: list[Tensor] = []
    saved: list[Tensor] = []
    for part, (_, _, sequences) in zip(_by_rectangle(x, rectangles), rectangles, strict=True):
        if sequences < c.shape[0]:
            ended.append(c[sequences:])
            h, c = h[:sequences], c[:sequences]
        h_enter, c_enter = h.contiguous(), c.contiguous()
        output, h, c, workspace = onednn.dense_forward(
            part, operands, h_enter, c_enter, reverse=False, save=save
        )
        if workspace is not None:
            saved += [h_enter, c_enter, h, c, workspace]
        outputs.append(output.view(-1, h.shape[1]))
    outputs.append(h.new_empty(1, h.shape[1]))
    rows = torch.cat(outputs).index_fill_(0, layout.padding, 0.0)
    h_n = rows.index_select(0, layout.last)
    if active < h_0.shape[0]:
        h_n = torch.cat([h_n, h_0[active:]])
    return Forward(rows, h_n, torch.cat([c, *ended[::-1]]), None, tuple(saved))


def _backward(
    d_h: Tensor,
    d_c_n: Tensor | None,
    x: Tensor,
    h: Tensor,
    layout: RectangleLayout,
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    saved: Sequence[Tensor],
) -> Gradients:
    """One direction; its gradient of ``x`` for ``rows``, in the order it walks, the last zero.

    Args:
        d_h: ``[N, H]`` that reach the outputs in the order it walks, those of h_n among them; zero
            in the padding.
        d_c_n: ``[S, H]``; None is zero.
        x: as in :func:`_forward`, and so are the next five.
        h: what it returned.
        layout: see there.
        weights: see there.
        h_0: see there.
        c_0: see there.
        saved: what it saved; read, but for oneDNN's scratch in its own workspaces.
    """
    rectangles, hidden_size = layout.rectangles, h.shape[1]
    operands = onednn.operands(weights, carry=layout.has_padding)
    d_c_0 = c_0.new_zeros(c_0.shape) if d_c_n is None else d_c_n.clone()
    inputs, outputs = _by_rectangle(x, rectangles), _by_rectangle(h, rectangles)
    d_outputs = _by_rectangle(d_h, rectangles)
    d_inputs = [d_c_0.new_zeros(1, x.shape[1])]
    totals: onednn.WeightGradients | None = None
    d_h_state, d_c_state = d_c_0.new_zeros(0, hidden_size), d_c_0[:0]
    for index in range(len(rectangles) - 1, -1, -1):
        known, sequences = d_h_state.shape[0], rectangles[index].sequences
        if known < sequences:  # those that end here: d_h reached them through d_outputs
            d_c_state = torch.cat([d_c_state, d_c_0[known:sequences]])
            d_h_state = torch.cat([d_h_state, d_h_state.new_zeros(sequences - known, hidden_size)])
        h_enter, c_enter, h_end, c_end, workspace = saved[5 * index : 5 * index + 5]
        d_input, d_weights, d_h_state, d_c_state = onednn.dense_backward(
            *(d_outputs[index], d_h_state, d_c_state, inputs[index], operands),
            *(h_enter, c_enter, outputs[index], h_end, c_end, workspace),
            reverse=False,
        )
        d_inputs.append(d_input.view(-1, x.shape[1]))
        if totals is None:
            totals = d_weights
        else:
            for total, part in zip(totals, d_weights, strict=True):
                total.add_(part)
    assert totals is not None
    d_h_0 = d_c_0.new_zeros(h_0.shape)
    d_h_0[: layout.sizes[0]], d_c_0[: layout.sizes[0]] = d_h_state, d_c_state
    return Gradients(
        torch.cat(d_inputs[::-1]), d_h_0, d_c_0, onednn.weight_gradients(totals, weights)
    )


class InRectangles(NamedTuple):
    """The path of recurrence.py over the rows of a :class:`RectangleLayout`.

    Saved: the outputs, the states between rectangles and oneDNN's workspaces. oneDNN uses its
    workspace as scratch, so two threads must not run backward on one retained graph at once.

    Attributes:
        layout: of the batch.
        bias: whether there are biases.
    """

    layout: RectangleLayout
    bias: bool

    def forward(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
    ) -> tuple[LayerOutput, list[Tensor]]:
        """See :class:`fastrnn.recurrence.Path`."""
        layout, dtype = self.layout, rows.dtype
        rows, h_0, c_0, *flat = onednn.to_compute(rows, h_0, c_0, *flat)
        results = []
        for index, direction in enumerate(
            unflatten_weights(flat, h_0.shape[0], bias=self.bias, projection=False)
        ):
            x = _input(rows, layout, reverse=index == 1)
            result = _forward(x, layout, direction, h_0[index], c_0[index], save)
            results.append(result._replace(h=_in_order(result.h, layout, reverse=index == 1)))
        output = layer_output(results, dtype)
        return output, [output.h, *(tensor for result in results for tensor in result.saved)]

    def backward(
        self,
        grads: OutputGradients,
        rows: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        flat: Sequence[Tensor],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """See :class:`fastrnn.recurrence.Path`."""
        layout, dtype = self.layout, rows.dtype
        width, active = c_0.shape[2], layout.sizes[0]
        h, *states = saved
        grads = onednn.gradients_to_compute(grads)
        rows, h_0, c_0, *flat = onednn.to_compute(rows, h_0, c_0, *flat)
        h = h.to(rows.dtype)
        weights = unflatten_weights(flat, h_0.shape[0], bias=self.bias, projection=False)
        each = len(states) // len(weights)
        results = []
        for index, direction in enumerate(weights):
            reverse = index == 1
            own_h = _in_order(columns(h, index, width), layout, reverse=reverse)
            if grads.h is None:
                d_h = own_h.new_zeros(own_h.shape)
            else:
                d_h = _in_order(columns(grads.h, index, width), layout, reverse=reverse)
            if grads.h_n is not None:
                d_h = d_h.index_add(0, layout.last, grads.h_n[index, :active])
            result = _backward(
                d_h,
                None if grads.c_n is None else grads.c_n[index],
                _input(rows, layout, reverse=reverse),
                own_h,
                *(layout, direction, h_0[index], c_0[index]),
                states[index * each : (index + 1) * each],
            )
            if grads.h_n is not None:
                result.h_0[active:] = grads.h_n[index, active:]
            assert result.rows is not None
            d_rows = result.rows[:, : rows.shape[1]]  # without the carry feature's
            if reverse:
                d_rows = d_rows.index_select(0, layout.mirror)
            results.append(result._replace(rows=d_rows))
        return layer_gradients(results, weights, dtype, needs)

    def composite(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> LayerOutput:
        """See :class:`fastrnn.recurrence.Path`."""
        valid = self.layout.valid
        call = Call(self.layout.sizes, h_0.shape[0], self.bias, False, False)
        output = run_composite(call, rows.index_select(0, valid), h_0, c_0, flat)
        h = output.h.new_zeros(rows.shape[0], output.h.shape[1]).index_copy(0, valid, output.h)
        return output._replace(h=h)


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
        rows: ``[N, I]``, zero in the padding.
        h_0: ``[D, S, H]``.
        c_0: ``[D, S, H]``.
        weights: of each direction, without projections.

    Returns:
        See :class:`LayerOutput`; ``h`` is zero in the padding, and ``c`` is None.
    """
    path = InRectangles(layout, weights[0].bias_ih is not None)
    return run(path, rows, h_0, c_0, flatten_weights(weights))
