"""The recurrence as dense rectangles, each torch's own oneDNN LSTM: the other CPU path.

A ragged batch sorted by decreasing length is a staircase. Cut at some of its steps it becomes
rectangles, one for each run of steps, whose rows are the sequences still active at the run's start;
the states at a rectangle's end enter the next. Within a rectangle sequences may end early: on their
padded steps one extra input feature, 1 there and 0 elsewhere, has weights -CARRY for gate i and
+CARRY for f. So i = 0 and f = 1 exactly, c is carried bit for bit, and every gate's gradient is
exactly zero. Outputs of padded steps are dropped; h_n is read at each sequence's last valid step.

The reverse direction is the same with each sequence's rows in reverse order.

Where to cut is a free choice: :func:`plan` weighs the fixed cost of a call against the padded steps
by dynamic programming over the lengths, and says what the result will cost.

Limits: float32; no projection; no cell-state sequence (oneDNN returns outputs and final states
    only).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.reference import Forward, Gradients, LayerWeights

# Far beyond any pre-activation, far within float32: sigmoid(-CARRY) = 0 and sigmoid(CARRY) = 1.
CARRY = 1e4

_LSTM_MODE = 2  # oneDNN's number for an LSTM in torch's interface


class Rectangle(NamedTuple):
    """Steps ``[first, last)`` of the first ``sequences`` sequences."""

    first: int
    last: int
    sequences: int


class Plan(NamedTuple):
    """Rectangles that cover a batch, in the order of time, and their cost in seconds."""

    rectangles: tuple[Rectangle, ...]
    seconds: float


class Costs(NamedTuple):
    """What running a batch costs, in seconds, as a linear model.

    Attributes:
        call: of one rectangle, whatever its size.
        row: of one row.
        step: of one step of a rectangle besides its rows, in rows.
    """

    call: float
    row: float
    step: float = 0.5


def costs(input_size: int, hidden_size: int, train: bool) -> Costs:
    """The model of a rectangle's cost, fitted to (I, H) from (12, 64) to (256, 512).

    Measured with torch 2.13 on one thread of an AMD EPYC (Zen 3, AVX2); only ratios matter. A call
    packs the weights anew, so its cost grows with them.
    """
    weights = 4 * hidden_size * (input_size + hidden_size)
    if train:
        return Costs(call=350e-6 + 3.2e-9 * weights, row=1.6e-6 + 0.09e-9 * weights)
    return Costs(call=130e-6 + 1.0e-9 * weights, row=1.0e-6 + 0.03e-9 * weights)


@functools.lru_cache(maxsize=32)
def plan(sizes: tuple[int, ...], cost: Costs, most_edges: int = 48) -> Plan:
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
    return Plan(tuple(reversed(rectangles)), best[-1])


def available(rows: Tensor) -> bool:
    """Whether oneDNN can run these rows."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


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
    step_slots: list[int] = []
    slots = 0
    for first, last, sequences in rectangles:
        step_slots.extend(range(slots, slots + (last - first) * sequences, sequences))
        slots += (last - first) * sequences
    size = torch.tensor(sizes)
    count = int(size.sum())
    offset = size.cumsum(0) - size
    step = torch.repeat_interleave(torch.arange(len(sizes)), size)
    sequence = torch.arange(count) - offset[step]
    lengths = (size.unsqueeze(1) > torch.arange(sizes[0])).sum(0)
    walked = lengths[sequence] - 1 - step if reverse else step
    slot = torch.tensor(step_slots)[walked] + sequence
    row = torch.full((slots,), -1).scatter(0, slot, torch.arange(count))
    padding = (row < 0).nonzero().squeeze(1)
    ends = torch.arange(sizes[0])
    last_row = ends if reverse else offset[lengths - 1] + ends
    return _Grid(slot, row.clamp(min=0), padding, last_row)


def _is_dense(sizes: Sequence[int]) -> bool:
    return sizes[0] == sizes[-1]


def _to_slots(rows: Tensor, grid: _Grid) -> Tensor:
    """Rows ``[N, F]`` to their slots ``[M, F]``; zeros in the padding."""
    slots = rows.index_select(0, grid.row)
    return slots.index_fill_(0, grid.padding, 0) if grid.padding.numel() else slots


class _Operands(NamedTuple):
    """What every call of a direction shares."""

    inputs: list[Tensor]  # [steps, sequences, I or I + 1] of each rectangle
    weight_ih: Tensor  # [4H, I or I + 1]
    bias_ih: Tensor
    bias_hh: Tensor
    backwards: bool  # whether oneDNN walks the steps from last to first


def _operands(
    rows: Tensor,
    sizes: tuple[int, ...],
    rectangles: Sequence[Rectangle],
    weights: LayerWeights,
    reverse: bool,
    grid: _Grid | None,
) -> _Operands:
    weight_ih = weights.ih
    slots = rows if grid is None else _to_slots(rows, grid)
    if grid is not None and grid.padding.numel():
        carry = slots.new_zeros(slots.shape[0], 1).index_fill_(0, grid.padding, 1.0)
        slots = torch.cat([slots, carry], 1)
        gate = weight_ih.new_tensor([-CARRY, CARRY, 0.0, 0.0])
        column = gate.repeat_interleave(weights.hidden_size).unsqueeze(1)
        weight_ih = torch.cat([weight_ih, column], 1)
    bias_ih, bias_hh = weights.bias_ih, weights.bias_hh
    if bias_ih is None or bias_hh is None:
        bias_ih = bias_hh = weights.ih.new_zeros(weights.ih.shape[0])
    inputs = _by_rectangle(slots, rectangles)
    return _Operands(inputs, weight_ih, bias_ih, bias_hh, backwards=reverse and grid is None)


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
        rows: ``[N, I]`` float32, contiguous.
        sizes: active sequences at each step, non-increasing, sum N, not empty.
        weights: without a projection.
        h_0: ``[S, H]``.
        c_0: ``[S, H]``.
        rectangles: of :func:`plan` for ``sizes``.
        reverse: walk the steps from last to first.
        save: keep oneDNN's workspaces and the states between rectangles.

    Returns:
        See :class:`fastrnn.reference.Forward`; ``c`` is None.
    """
    grid = None if _is_dense(sizes) else _grid(sizes, tuple(rectangles), reverse)
    operands = _operands(rows, sizes, rectangles, weights, reverse, grid)
    hidden_size = weights.hidden_size
    h, c = h_0, c_0
    outputs, ended, saved = [], [c_0[sizes[0] :]], []
    # oneDNN makes its workspace for backward only where gradients are enabled.
    with torch.set_grad_enabled(save):
        for index, (x, rectangle) in enumerate(zip(operands.inputs, rectangles, strict=True)):
            entering = (
                h[: rectangle.sequences].contiguous(),
                c[: rectangle.sequences].contiguous(),
            )
            output, h, c, workspace = torch.ops.aten.mkldnn_rnn_layer(
                x,
                operands.weight_ih,
                weights.hh,
                operands.bias_ih,
                operands.bias_hh,
                *entering,
                operands.backwards,
                [],
                _LSTM_MODE,
                hidden_size,
                1,
                True,
                False,
                False,
                save,
            )
            h, c = h.view(-1, hidden_size), c.view(-1, hidden_size)
            if save:
                saved.extend([*entering, h, c, workspace])
            outputs.append(output.view(-1, hidden_size))
            following = rectangles[index + 1].sequences if index + 1 < len(rectangles) else 0
            ended.append(c[following:])
    slots = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if grid is None:
        h_n = torch.cat([h, h_0[sizes[0] :]])
        h_rows = slots
    else:
        h_rows = slots.index_select(0, grid.slot)
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
        saved: what it saved; only read.

    Returns:
        See :class:`fastrnn.reference.Gradients`; all are computed.
    """
    grid = None if _is_dense(sizes) else _grid(sizes, tuple(rectangles), reverse)
    operands = _operands(rows, sizes, rectangles, weights, reverse, grid)
    active, hidden_size = sizes[0], weights.hidden_size
    d_h_0 = torch.zeros_like(h_0) if d_h_n is None else d_h_n.clone()
    d_c_0 = torch.zeros_like(c_0) if d_c_n is None else d_c_n.clone()
    d_slots = torch.zeros_like(h) if d_h is None else d_h
    if grid is None:
        d_h_state, output_slots = d_h_0[:active], h.contiguous()
    else:
        if d_h_n is not None:
            d_slots = d_slots.index_add(0, grid.last, d_h_n[:active])
        d_slots, output_slots = _to_slots(d_slots, grid), _to_slots(h, grid)
        d_h_state = d_h_0[: rectangles[-1].sequences].zero_()
    d_outputs = _by_rectangle(d_slots.contiguous(), rectangles)
    outputs = _by_rectangle(output_slots, rectangles)
    d_inputs: list[Tensor] = []
    totals: list[Tensor] = []
    d_c_state = d_c_0[: rectangles[-1].sequences]
    for index in range(len(rectangles) - 1, -1, -1):
        sequences = rectangles[index].sequences
        entering_h, entering_c, h_end, c_end, workspace = saved[5 * index : 5 * index + 5]
        joining = sequences - d_h_state.shape[0]
        if joining:  # sequences that end in this rectangle: d_h reached them through d_outputs
            d_c_state = torch.cat([d_c_state, d_c_0[d_c_state.shape[0] : sequences]])
            d_h_state = torch.cat([d_h_state, d_h_state.new_zeros(joining, hidden_size)])
        d_input, d_ih, d_hh, d_bias_ih, d_bias_hh, d_h_state, d_c_state = (
            torch.ops.aten.mkldnn_rnn_layer_backward(
                operands.inputs[index],
                operands.weight_ih,
                weights.hh,
                operands.bias_ih,
                operands.bias_hh,
                entering_h,
                entering_c,
                outputs[index],
                h_end,
                c_end,
                d_outputs[index],
                d_h_state,
                d_c_state,
                operands.backwards,
                _LSTM_MODE,
                hidden_size,
                1,
                True,
                True,
                False,
                [],
                False,
                workspace,
            )
        )
        d_h_state, d_c_state = d_h_state.view(-1, hidden_size), d_c_state.view(-1, hidden_size)
        d_inputs.append(d_input.view(-1, d_input.shape[-1]))
        parts = (d_ih, d_hh, d_bias_ih, d_bias_hh)
        if totals:
            for total, part in zip(totals, parts, strict=True):
                total.add_(part)
        else:
            totals.extend(parts)
    d_h_0[:active], d_c_0[:active] = d_h_state, d_c_state
    d_rows = d_inputs[0] if len(d_inputs) == 1 else torch.cat(d_inputs[::-1])
    if grid is not None:
        d_rows = d_rows.index_select(0, grid.slot)
    input_size = rows.shape[1]
    d_ih, d_hh, d_bias_ih, d_bias_hh = totals
    biases = (None, None) if weights.bias_ih is None else (d_bias_ih, _own(d_bias_hh, d_bias_ih))
    return Gradients(
        d_rows[:, :input_size], d_h_0, d_c_0, (d_ih[:, :input_size], d_hh, *biases, None)
    )


def _own(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` in memory of its own: oneDNN returns one bias gradient twice."""
    return tensor.clone() if tensor.data_ptr() == other.data_ptr() else tensor
