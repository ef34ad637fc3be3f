"""The recurrence as dense rectangles, each torch's own oneDNN LSTM: the fast path for ragged input.

A ragged batch sorted by decreasing length is a staircase. Cut at some of its steps it becomes
rectangles, one for each run of steps, whose rows are the sequences still active at the run's start;
the states at a rectangle's end enter the next. Within a rectangle sequences may end early: the
carry feature of onednn.py keeps their cell states exact. Outputs of padded steps are dropped; h_n
is read at each sequence's last valid step.

The reverse direction is the same with each sequence's rows in reverse order.

Where to cut is a free choice: :func:`plan` weighs the fixed cost of a call against the padded steps
by dynamic programming over the lengths, and says what the result will cost.

Limits: those of onednn.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import onednn
from fastrnn.costs import RectangleCosts
from fastrnn.reference import Forward, Gradients, LayerWeights


class Rectangle(NamedTuple):
    """Steps ``[first, last)`` of the first ``sequences`` sequences."""

    first: int
    last: int
    sequences: int


class Plan(NamedTuple):
    """Rectangles that cover a batch, in the order of time, and their cost in seconds."""

    rectangles: tuple[Rectangle, ...]
    seconds: float


@functools.lru_cache(maxsize=32)
def plan(sizes: tuple[int, ...], cost: RectangleCosts, most_edges: int = 20) -> Plan:
    """The cheapest cuts of the staircase ``sizes``.

    Args:
        sizes: active sequences at each step, non-increasing.
        cost: the model.
        most_edges: candidates kept of the steps where ``sizes`` falls; the search is quadratic in
            them.

    Returns:
        See :class:`Plan`. Exact among the candidates.
    """
    if not sizes:
        return Plan((), 0.0)
    falls = [step for step in range(1, len(sizes)) if sizes[step] < sizes[step - 1]]
    if len(falls) > most_edges:
        falls = [falls[index * len(falls) // most_edges] for index in range(most_edges)]
    edges = [0, *falls, len(sizes)]
    best, cut = [0.0] + [math.inf] * (len(edges) - 1), [0] * len(edges)
    for end in range(1, len(edges)):
        for begin in range(end):
            rows = (edges[end] - edges[begin]) * (sizes[edges[begin]] + cost.step)
            seconds = best[begin] + cost.call + rows * cost.row
            if seconds < best[end]:
                best[end], cut[end] = seconds, begin
    rectangles = []
    end = len(edges) - 1
    while end:
        first = edges[cut[end]]
        rectangles.append(Rectangle(first, edges[end], sizes[first]))
        end = cut[end]
    return Plan(tuple(reversed(rectangles)), best[-1] + cost.layer)


class _Grid(NamedTuple):
    """Where packed rows stand among the M slots of a plan's rectangles, one after the other.

    Attributes:
        slot: ``[N]`` int64, the slot of each row.
        row: ``[M]`` int64, the row of each slot; 0 where it is padding.
        padding: ``[M - N]`` int64, the slots that hold no row.
        last: ``[sizes[0]]`` int64, the row of each sequence's last step in the direction walked.
    """

    slot: Tensor
    row: Tensor
    padding: Tensor
    last: Tensor


@functools.lru_cache(maxsize=16)
def _grid(sizes: tuple[int, ...], rectangles: tuple[Rectangle, ...], reverse: bool) -> _Grid:
    step_slots: list[int] = []  # the first slot of each step
    slots = 0
    for first, last, sequences in rectangles:
        step_slots.extend(range(slots, slots + (last - first) * sequences, sequences))
        slots += (last - first) * sequences
    stops = list(itertools.accumulate(sizes))
    offsets = [0, *stops[:-1]]
    ends: list[int] = []  # the row of each sequence's last step in time
    for offset, size in zip(reversed(offsets), reversed(sizes), strict=True):
        ends.extend(range(offset + len(ends), offset + size))

    cpu = torch.device("cpu")  # whatever the default device
    repeats, row = torch.tensor(sizes, device=cpu), torch.arange(stops[-1], device=cpu)
    if reverse:
        step = torch.arange(len(sizes), device=cpu).repeat_interleave(repeats)
        sequence = row - torch.tensor(offsets, device=cpu)[step]
        lengths = step[torch.tensor(ends, device=cpu)] + 1
        slot = torch.tensor(step_slots, device=cpu)[lengths[sequence] - 1 - step] + sequence
    else:
        shifts = [slot - offset for slot, offset in zip(step_slots, offsets, strict=True)]
        slot = row + torch.tensor(shifts, device=cpu).repeat_interleave(repeats)
    row_of_slot = torch.zeros(slots, dtype=torch.int64, device=cpu).index_copy_(0, slot, row)
    empty = torch.ones(slots, dtype=torch.bool, device=cpu).index_fill_(0, slot, False)
    last_row = torch.arange(sizes[0], device=cpu) if reverse else torch.tensor(ends, device=cpu)
    return _Grid(slot, row_of_slot, empty.nonzero().squeeze(1), last_row)


def _to_slots(rows: Tensor, grid: _Grid) -> Tensor:
    """Rows ``[N, F]`` to their slots ``[M, F]``; zeros in the padding."""
    slots = rows.index_select(0, grid.row)
    return slots.index_fill_(0, grid.padding, 0) if grid.padding.numel() else slots


def _input_slots(rows: Tensor, grid: _Grid) -> Tensor:
    """The input's slots, ``[M, I]``, with the carry feature where there is padding."""
    if not grid.padding.numel():
        return _to_slots(rows, grid)
    slots = _to_slots(functional.pad(rows, (0, 1)), grid)
    slots[:, -1:].index_fill_(0, grid.padding, 1.0)
    return slots


def _by_rectangle(slots: Tensor, rectangles: Sequence[Rectangle]) -> list[Tensor]:
    """Slots ``[M, F]`` as one ``[steps, sequences, F]`` for each rectangle."""
    shapes = [(last - first, sequences) for first, last, sequences in rectangles]
    parts = slots.split([steps * sequences for steps, sequences in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def rectangle_forward(
    rows: Tensor,
    sizes: tuple[int, ...],
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    rectangles: Sequence[Rectangle],
    *,
    reverse: bool,
    save: bool,
) -> Forward:
    """One direction over all rows: :func:`fastrnn.reference.lstm_forward` by oneDNN.

    Args:
        rows: ``[N, I]`` float32.
        sizes: active sequences at each step, non-increasing, sum N, not empty.
        weights: without a projection.
        h_0: ``[S, H]``.
        c_0: ``[S, H]``.
        rectangles: of :func:`plan` for ``sizes``.
        reverse: walk the steps from last to first.
        save: keep the input's slots, oneDNN's workspaces and the states between rectangles.

    Returns:
        See :class:`fastrnn.reference.Forward`; ``c`` is None.
    """
    grid = _grid(sizes, tuple(rectangles), reverse)
    slots = _input_slots(rows, grid)
    operands = onednn.operands(weights, carry=grid.padding.numel() > 0)
    h, c = h_0, c_0
    outputs, ended, saved = [], [c_0[sizes[0] :]], [slots, operands.ih]
    for index, x in enumerate(_by_rectangle(slots, rectangles)):
        sequences = rectangles[index].sequences
        h_enter, c_enter = h[:sequences].contiguous(), c[:sequences].contiguous()
        output, h, c, workspace = onednn.dense_forward(
            x, operands, h_enter, c_enter, reverse=False, save=save
        )
        if workspace is not None:
            saved.extend([h_enter, c_enter, h, c, workspace])
        outputs.append(output.view(-1, h.shape[1]))
        following = rectangles[index + 1].sequences if index + 1 < len(rectangles) else 0
        ended.append(c[following:])
    h_rows = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).index_select(0, grid.slot)
    h_n = torch.cat([h_rows.index_select(0, grid.last), h_0[sizes[0] :]])
    return Forward(h_rows, h_n, torch.cat(ended[::-1]), None, tuple(saved))


def rectangle_backward(
    d_h: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    rows: Tensor,
    sizes: tuple[int, ...],
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    h: Tensor,
    rectangles: Sequence[Rectangle],
    saved: Sequence[Tensor],
    *,
    reverse: bool,
) -> Gradients:
    """Gradients of one direction: :func:`fastrnn.reference.lstm_backward` by oneDNN.

    Args:
        d_h: ``[N, H]`` gradient of the outputs; None is zero, as for the next two.
        d_h_n: ``[S, H]``.
        d_c_n: ``[S, H]``.
        rows: as in :func:`rectangle_forward`, and so are the next six.
        sizes: see there.
        weights: see there.
        h_0: see there.
        c_0: see there.
        rectangles: see there.
        reverse: see there.
        h: ``[N, H]``, its outputs.
        saved: what it saved; read, but for oneDNN's scratch in its own workspaces.

    Returns:
        See :class:`fastrnn.reference.Gradients`; all are computed.
    """
    grid = _grid(sizes, tuple(rectangles), reverse)
    slots, weight_ih, *states = saved
    operands = onednn.operands(weights, carry=False)._replace(ih=weight_ih)
    active, hidden_size = sizes[0], weights.hidden_size
    d_h_0, d_c_0 = h_0.new_zeros(h_0.shape), c_0.new_zeros(c_0.shape)
    d_slots = h.new_zeros(h.shape) if d_h is None else d_h
    if d_h_n is not None:
        d_h_0.copy_(d_h_n)
        d_slots = d_slots.index_add(0, grid.last, d_h_n[:active])
    if d_c_n is not None:
        d_c_0.copy_(d_c_n)
    inputs = _by_rectangle(slots, rectangles)
    outputs = _by_rectangle(_to_slots(h, grid), rectangles)
    d_outputs = _by_rectangle(_to_slots(d_slots, grid), rectangles)
    d_inputs: list[Tensor] = []
    totals: onednn.Operands | None = None
    d_h_state = h_0.new_zeros(rectangles[-1].sequences, hidden_size)
    d_c_state = d_c_0[: rectangles[-1].sequences]
    for index in range(len(rectangles) - 1, -1, -1):
        h_enter, c_enter, h_end, c_end, workspace = states[5 * index : 5 * index + 5]
        joining = rectangles[index].sequences - d_h_state.shape[0]
        if joining:  # sequences that end in this rectangle: d_h reached them through d_outputs
            d_c_state = torch.cat([d_c_state, d_c_0[d_c_state.shape[0] :][:joining]])
            d_h_state = torch.cat([d_h_state, d_h_state.new_zeros(joining, hidden_size)])
        d_input, d_weights, d_h_state, d_c_state = onednn.dense_backward(
            *(d_outputs[index], d_h_state, d_c_state, inputs[index], operands),
            *(h_enter, c_enter, outputs[index], h_end, c_end, workspace),
            reverse=False,
        )
        d_inputs.append(d_input.view(-1, d_input.shape[-1]))
        if totals is None:
            totals = d_weights
        else:
            for total, part in zip(totals, d_weights, strict=True):
                total.add_(part)
    assert totals is not None
    d_h_0[:active], d_c_0[:active] = d_h_state, d_c_state
    d_rows = d_inputs[0] if len(d_inputs) == 1 else torch.cat(d_inputs[::-1])
    d_rows = d_rows.index_select(0, grid.slot)[:, : rows.shape[1]]
    return Gradients(d_rows, d_h_0, d_c_0, onednn.weight_gradients(totals, weights))
