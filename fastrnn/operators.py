"""The recurrence as opaque operators of torch.library, for torch.compile and torch.export.

A graph then holds one node a layer and never an unrolled loop. The operators compute what
:class:`fastrnn.recurrence.LSTMRecurrence` computes; in training always by the step loop, because
what that saves has shapes that are known while tracing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.recurrence import (
    Call,
    DirectionRun,
    OutputGradients,
    compute_dtype,
    host_sizes,
    outside_autocast,
    pad_rows,
    run_backward,
    run_forward,
    side_by_side,
)


@torch.library.custom_op("fastrnn::lstm_layer", mutates_args=())
def lstm_layer_op(
    rows: Tensor,
    batch_sizes: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    bias: bool,
    projection: bool,
    cell_states: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer as one node of a graph: h, h_n, c_n, and c, gates, tanh(c) by direction.

    The last three are empty where nobody asked for them.
    """
    sizes = host_sizes(batch_sizes)
    if save:  # the step loop, see above
        backend = "reference"
    call = Call(sizes, h_0.shape[0], bias, projection, cell_states, backend)
    count, valid = rows.shape[0], sum(sizes)
    with outside_autocast(rows.device):
        output, directions = run_forward(call, rows[:valid], h_0, c_0, weights, save=save)
    states = []
    if save or cell_states:
        states = [torch.stack([run.c for run in directions if run.c is not None])]
    if save:
        states += [torch.stack([run.saved[index] for run in directions]) for index in range(2)]
    empty = [rows.new_empty(0, dtype=compute_dtype(rows.dtype)) for _ in range(3 - len(states))]
    c, gates, tanh_c = [pad_rows(state, count) for state in states] + empty
    return pad_rows(output.h, count), output.h_n, output.c_n, c, gates, tanh_c


@lstm_layer_op.register_fake
def _lstm_layer_fake(
    rows: Tensor,
    batch_sizes: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    bias: bool,
    projection: bool,
    cell_states: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, directions, hidden_size = rows.shape[0], h_0.shape[0], c_0.shape[2]
    dtype = compute_dtype(rows.dtype)

    def state(kept: bool, width: int) -> Tensor:
        shape = (directions, count, width) if kept else (0,)
        return rows.new_empty(shape, dtype=dtype)

    return (
        rows.new_empty(count, directions * h_0.shape[2]),
        torch.empty_like(h_0, dtype=rows.dtype, memory_format=torch.contiguous_format),
        torch.empty_like(c_0, dtype=rows.dtype, memory_format=torch.contiguous_format),
        state(save or cell_states, hidden_size),
        state(save, 4 * hidden_size),
        state(save, hidden_size),
    )


@torch.library.custom_op("fastrnn::lstm_layer_backward", mutates_args=())
def lstm_layer_backward_op(
    d_h: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor,
    d_c: Tensor | None,
    rows: Tensor,
    batch_sizes: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    tanh_c: Tensor,
    bias: bool,
    projection: bool,
) -> list[Tensor]:
    """Gradients of rows, h_0, c_0 and each weight."""
    sizes = host_sizes(batch_sizes)
    valid = sum(sizes)
    call = Call(sizes, h_0.shape[0], bias, projection, d_c is not None, "reference")
    directions = [
        DirectionRun(None, c[index, :valid], (gates[index, :valid], tanh_c[index, :valid]))
        for index in range(call.directions)
    ]
    d_c_rows = None if d_c is None else side_by_side(d_c)[:valid]
    grads = OutputGradients(d_h[:valid], d_h_n, d_c_n, d_c_rows)
    needs = [True] * (3 + len(weights))
    inputs = (rows[:valid], h_0, c_0, weights, h[:valid])
    with outside_autocast(rows.device):
        found = run_backward(call, grads, *inputs, directions, needs)
    d_rows, *others = [gradient for gradient in found if gradient is not None]
    return [pad_rows(d_rows, rows.shape[0]), *others]


@lstm_layer_backward_op.register_fake
def _lstm_layer_backward_fake(
    d_h: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor,
    d_c: Tensor | None,
    rows: Tensor,
    batch_sizes: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    tanh_c: Tensor,
    bias: bool,
    projection: bool,
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape, dtype=rows.dtype) for tensor in (rows, h_0, c_0, *weights)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, batch_sizes, h_0, c_0, weights, bias, projection, cell_states, *_ = inputs
    h, _, _, c, gates, tanh_c = output
    ctx.save_for_backward(rows, batch_sizes, h_0, c_0, *weights, h, c, gates, tanh_c)
    ctx.bias, ctx.projection, ctx.cell_states = bias, projection, cell_states


def _op_backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
    d_h, d_h_n, d_c_n, d_c, *_ = d_outputs
    rows, batch_sizes, h_0, c_0, *weights, h, c, gates, tanh_c = ctx.saved_tensors
    d_rows, d_h_0, d_c_0, *d_weights = lstm_layer_backward_op(
        *(d_h, d_h_n, d_c_n, d_c if ctx.cell_states else None, rows, batch_sizes, h_0, c_0),
        *(weights, h, c, gates, tanh_c, ctx.bias, ctx.projection),
    )
    return d_rows, None, d_h_0, d_c_0, d_weights, None, None, None, None, None


lstm_layer_op.register_autograd(_op_backward, setup_context=_setup_context)
