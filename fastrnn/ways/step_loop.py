"""A layer by the step loop of cells/lstm.py: every direction, with what each saves.

:class:`StepLoop` is the path of recurrence.py. :func:`steps_forward` and :func:`steps_backward` do
the same with all that is saved in tensors of shapes known beforehand, ``[N, D, ...]`` over all rows
allocated, zeros past the valid ones: what an operator can promise while it is traced, and what the
kernels save as well, so that this can stand in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.cells import lstm as lstm_cell
from fastrnn.cells.lstm import Forward, Gradients, LayerWeights, compute_dtype
from fastrnn.input.arguments import host_values
from fastrnn.input.packing import without_unused
from fastrnn.ways.recurrence import (
    LayerOutput,
    Memory,
    OutputGradients,
    columns,
    pad_rows,
    side_by_side,
    to_compute,
    unflatten_weights,
)


class Call(NamedTuple):
    """What a layer's computation is, besides its tensors.

    Attributes:
        sizes: active sequences at each step.
        directions: D.
        bias: whether there are biases.
        projection: whether there are projections.
        cell_states: whether the cell states are an output.
        memory: "save" keeps the activated gates and tanh(c) for backward, 5 H numbers a row and
            direction; "recompute" makes them again.
    """

    sizes: tuple[int, ...]
    directions: int
    bias: bool
    projection: bool
    cell_states: bool
    memory: Memory = "save"

    def unflatten(self, flat: Sequence[Tensor]) -> list[LayerWeights]:
        """The flat list of weights, by direction."""
        return unflatten_weights(flat, self.directions, bias=self.bias, projection=self.projection)


def host_sizes(batch_sizes: Tensor) -> tuple[int, ...]:
    """``batch_sizes`` on the host, without the steps of a bounded layout that nobody reaches."""
    return without_unused(host_values("lengths, mask and resets", batch_sizes))


class DirectionRun(NamedTuple):
    """What a direction saved: its cell states, and what :func:`lstm_forward` says."""

    c: Tensor | None
    saved: tuple[Tensor, ...]


def run_forward(
    call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
) -> tuple[LayerOutput, list[DirectionRun]]:
    """Run every direction."""
    dtype = rows.dtype
    rows, h_0, c_0, *flat = to_compute(rows, h_0, c_0, *flat)
    results = [
        lstm_cell.lstm_forward(
            *(rows, call.sizes, direction, h_0[index], c_0[index]),
            reverse=index == 1,
            save_gates=save and call.memory == "save",
            save_cells=save or call.cell_states,
        )
        for index, direction in enumerate(call.unflatten(flat))
    ]
    output = layer_output(results, dtype, cell_states=call.cell_states)
    return output, [DirectionRun(run.c, run.saved) for run in results]


def layer_output(
    results: Sequence[Forward], dtype: torch.dtype, *, cell_states: bool
) -> LayerOutput:
    """What a layer computes, rounded to ``dtype``, of what its directions did."""
    return LayerOutput(
        side_by_side([run.h for run in results]).to(dtype),
        torch.stack([run.h_n for run in results]).to(dtype),
        torch.stack([run.c_n for run in results]).to(dtype),
        side_by_side([run.c for run in results if run.c is not None]).to(dtype)
        if cell_states
        else None,
    )


def run_backward(
    call: Call,
    grads: OutputGradients,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    h: Tensor,
    directions: Sequence[DirectionRun],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight, in their dtypes; ``needs`` in the same order."""
    dtype, grads = rows.dtype, grads.to_compute()
    rows, h_0, c_0, h, *flat = to_compute(rows, h_0, c_0, h, *flat)
    size_h, hidden_size = h_0.shape[2], c_0.shape[2]
    each = len(flat) // call.directions
    results: list[Gradients] = []
    by_direction = call.unflatten(flat)
    for index, (weights, run) in enumerate(zip(by_direction, directions, strict=True)):
        assert run.c is not None
        result = lstm_cell.lstm_backward(
            None if grads.h is None else columns(grads.h, index, size_h),
            None if grads.h_n is None else grads.h_n[index],
            None if grads.c_n is None else grads.c_n[index],
            None if grads.c is None else columns(grads.c, index, hidden_size),
            *(rows, call.sizes, weights, h_0[index], c_0[index]),
            *(columns(h, index, size_h), run.c, run.saved),
            reverse=index == 1,
            needs_rows=needs[0],
            needs_weights=_layer_needs(needs[3 + index * each :][:each], call),
        )
        results.append(result)
    return _layer_gradients(results, by_direction, dtype, needs)


def _layer_gradients(
    results: Sequence[Gradients],
    weights: Sequence[LayerWeights],
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight in ``dtype``, of those of each direction."""
    d_rows: Tensor | None = None
    for result in results:
        if result.rows is not None:
            d_rows = result.rows if d_rows is None else d_rows + result.rows
    d_flat = [
        gradient
        for result, direction in zip(results, weights, strict=True)
        for gradient, weight in zip(result.weights, direction, strict=True)
        if weight is not None
    ]
    found = [
        d_rows,
        torch.stack([result.h_0 for result in results]),
        torch.stack([result.c_0 for result in results]),
        *d_flat,
    ]
    return [
        None if gradient is None or not needed else gradient.to(dtype)
        for gradient, needed in zip(found, needs, strict=True)
    ]


def _layer_needs(needs: Sequence[bool], call: Call) -> list[bool]:
    """``needs`` of the weights given, as one of each of ih, hh, bias_ih, bias_hh, hr."""
    ih, hh, *rest = needs
    biases = rest[:2] if call.bias else [False, False]
    return [ih, hh, *biases, rest[-1] if call.projection else False]


def run_composite(
    call: Call,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
) -> LayerOutput:
    """The layer in differentiable operations."""
    dtype = rows.dtype
    rows, h_0, c_0, *flat = (t.to(compute_dtype(dtype)) for t in (rows, h_0, c_0, *flat))
    results = [
        lstm_cell.lstm_composite(
            *(rows, call.sizes, weights, h_0[index], c_0[index]),
            reverse=index == 1,
        )
        for index, weights in enumerate(call.unflatten(flat))
    ]
    return layer_output(results, dtype, cell_states=call.cell_states)


class StepLoop(NamedTuple):
    """The path of recurrence.py.

    Saved: the outputs; and of each direction c, H numbers a row, and unless ``memory="recompute"``
    gates and tanh(c), 5 H.

    Attributes:
        call: the layer's.
    """

    call: Call

    def forward(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
    ) -> tuple[LayerOutput, list[Tensor | None]]:
        """See :class:`fastrnn.ways.recurrence.Path`."""
        output, runs = run_forward(self.call, rows, h_0, c_0, flat, save=save)
        return output, [output.h, *(tensor for run in runs for tensor in (run.c, *run.saved))]

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
        """See :class:`fastrnn.ways.recurrence.Path`."""
        h, *states = saved
        each = len(states) // self.call.directions
        runs = [
            DirectionRun(states[begin], tuple(states[begin + 1 : begin + each]))
            for begin in range(0, len(states), each)
        ]
        return run_backward(self.call, grads, rows, h_0, c_0, flat, h, runs, needs)

    def composite(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> LayerOutput:
        """See :class:`fastrnn.ways.recurrence.Path`."""
        return run_composite(self.call, rows, h_0, c_0, flat)


class States(NamedTuple):
    """What a layer went through; None where nobody needs it.

    Attributes:
        c: ``[N, D, H]`` cell states.
        gates: ``[N, D, 4H]``, activated.
        tanh_c: ``[N, D, H]``.
    """

    c: Tensor | None
    gates: Tensor | None
    tanh_c: Tensor | None


def steps_forward(
    call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
) -> tuple[LayerOutput, States]:
    """Run every direction; rows past ``sum(call.sizes)`` are not read.

    The states come in the dtype they are computed in; where they are an output, they are not in
    ``LayerOutput.c`` too.
    """
    count, valid = rows.shape[0], sum(call.sizes)
    output, runs = run_forward(call, rows[:valid], h_0, c_0, flat, save=save)
    output = output._replace(h=pad_rows(output.h, count), c=None)
    if not (save or call.cell_states):
        return output, States(None, None, None)
    parts = zip(*((run.c, *run.saved) for run in runs), strict=True)
    states = [_beside([part for part in each if part is not None], count) for each in parts]
    return output, States(*states, *[None] * (3 - len(states)))


def _beside(parts: Sequence[Tensor], count: int) -> Tensor:
    """``[n, F]`` of each direction to ``[count, D, F]``."""
    states = parts[0].new_zeros(count, len(parts), parts[0].shape[1])
    for index, part in enumerate(parts):
        states[: part.shape[0], index] = part
    return states


def steps_backward(
    call: Call,
    grads: OutputGradients,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    h: Tensor,
    states: States,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight; what ``states`` lack is computed again.

    Args:
        call: the layer's.
        grads: that reach its outputs; None is zero.
        rows: its input, and so are the next three.
        h_0: see there.
        c_0: see there.
        flat: see there.
        h: ``[N, D * P]``, its output.
        states: with ``c`` at least.
        needs: whether each gradient is wanted.
    """
    valid = sum(call.sizes)
    c, gates, tanh_c = states
    assert c is not None
    runs = []
    for index in range(call.directions):
        saved: tuple[Tensor, ...] = ()
        if gates is not None and tanh_c is not None:
            saved = gates[:valid, index], tanh_c[:valid, index]
        runs.append(DirectionRun(c[:valid, index], saved))
    grads = grads.of_rows(valid)
    d_rows, *others = run_backward(
        call, grads, rows[:valid], h_0, c_0, flat, h[:valid], runs, needs
    )
    return [None if d_rows is None else pad_rows(d_rows, rows.shape[0]), *others]
