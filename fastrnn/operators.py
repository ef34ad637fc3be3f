"""The recurrence as opaque operators of torch.library, for torch.compile and torch.export.

A graph then holds one node a layer and never an unrolled loop. The operators compute what the
functions of fused.py and step_loop.py compute: on the CPU in training always the step loop, because
what that saves has shapes that are known while tracing. torch's own LSTM saves what nobody knows
while tracing, so its backward computes forward again, which on a GPU without kernels is nothing
beside what a step loop costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.cells.lstm import compute_dtype
from fastrnn.choosing.arrange import Work
from fastrnn.choosing.backends import on_kernels
from fastrnn.input.forms import into_rectangles, out_of_rectangles
from fastrnn.input.packing import Steps, cut_rows, steps_of
from fastrnn.ways import onednn
from fastrnn.ways.fused import FusedCall, fused_backward, fused_forward
from fastrnn.ways.rectangles import run_rectangles
from fastrnn.ways.recurrence import (
    LayerOutput,
    Memory,
    OutputGradients,
    outside_autocast,
    pad_rows,
)
from fastrnn.ways.step_loop import Call, States, host_sizes, steps_backward, steps_forward
from fastrnn.ways.torch_lstm import layer_backward, layer_forward


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
    memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer as one node of a graph.

    Returns:
        h, h_n and c_n; and c ``[N, D, H]``, gates ``[N, D, 4H]`` and tanh(c) ``[N, D, H]``, each
        empty where nobody needs it.
    """
    keep = _memory(memory)
    inputs = (rows, h_0, c_0, weights)
    with outside_autocast(rows.device):
        if on_kernels(backend):
            fused = FusedCall(h_0.shape[0], bias, cell_states, keep, backend)
            output, states = fused_forward(fused, _steps(batch_sizes, rows), *inputs, save=save)
        else:
            shape = (host_sizes(batch_sizes), h_0.shape[0], bias, projection, cell_states)
            call = Call(*shape, keep)
            whole: LayerOutput | None = None
            if backend == "torch":
                whole = layer_forward(call, *inputs)
            elif not save:
                whole = infer(call, backend, *inputs)
            if whole is None:
                output, states = steps_forward(call, *inputs, save=save)
            else:
                output, states = whole, States(None, None, None)
    empty = rows.new_empty(0, dtype=_state_dtype(rows, backend))
    c, gates, tanh_c = (empty.clone() if state is None else state for state in states)
    return output.h, output.h_n, output.c_n, c, gates, tanh_c


def infer(
    call: Call, backend: str, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
) -> LayerOutput | None:
    """The layer without autograd as rectangles; None where they are not the fastest, or cannot."""
    if not onednn.can_compute(
        rows.device,
        rows.dtype,
        backend=backend,
        memory=call.memory,
        cell_states=call.cell_states,
        projection=call.projection,
    ):
        return None
    dtype = onednn.compute_dtype(rows.dtype)
    work = Work(rows.shape[1], c_0.shape[2], train=False, dtype=dtype, weights=flat)
    layout = cut_rows(call.sizes, h_0.shape[1], work.cut)
    if layout is None:
        return None
    output = run_rectangles(layout, into_rectangles(rows, layout), h_0, c_0, call.unflatten(flat))
    return output._replace(h=pad_rows(out_of_rectangles(output.h, layout), rows.shape[0]))


def _steps(batch_sizes: Tensor, rows: Tensor) -> Steps:
    return steps_of(batch_sizes.to(rows.device, non_blocking=True))


def _memory(name: str) -> Memory:
    return "recompute" if name == "recompute" else "save"


def _state_dtype(rows: Tensor, backend: str) -> torch.dtype:
    return rows.dtype if on_kernels(backend) else compute_dtype(rows.dtype)


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
    memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, directions, hidden_size = rows.shape[0], h_0.shape[0], c_0.shape[2]
    dtype = _state_dtype(rows, backend)

    def state(kept: bool, width: int) -> Tensor:
        shape = (count, directions, width) if kept else (0,)
        return rows.new_empty(shape, dtype=dtype)

    save = save and backend != "torch"  # which computes forward again
    keeps_gates = save and memory == "save"
    return (
        rows.new_empty(count, directions * h_0.shape[2]),
        torch.empty_like(h_0, dtype=rows.dtype, memory_format=torch.contiguous_format),
        torch.empty_like(c_0, dtype=rows.dtype, memory_format=torch.contiguous_format),
        state(save or cell_states, hidden_size),
        state(keeps_gates, 4 * hidden_size),
        state(keeps_gates and not on_kernels(backend), hidden_size),
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
    backend: str,
    memory: str,
) -> list[Tensor]:
    """Gradients of rows, h_0, c_0 and each weight."""
    keep = _memory(memory)
    directions, cell_states = h_0.shape[0], d_c is not None
    grads = OutputGradients(d_h, d_h_n, d_c_n, None if d_c is None else d_c.flatten(1))
    states = States(c, gates, tanh_c) if keep == "save" else States(c, None, None)
    inputs = (rows, h_0, c_0, weights, h, states, [True] * (3 + len(weights)))
    with outside_autocast(rows.device):
        if on_kernels(backend):
            fused = FusedCall(directions, bias, cell_states, keep, backend)
            found = fused_backward(fused, grads, _steps(batch_sizes, rows), *inputs)
        else:
            shape = (host_sizes(batch_sizes), directions, bias, projection, cell_states)
            call = Call(*shape, keep)
            if backend == "torch":
                found = layer_backward(call, grads, rows, h_0, c_0, weights)
            else:
                found = steps_backward(call, grads, *inputs)
    return [_own(gradient) for gradient in found if gradient is not None]


def _own(gradient: Tensor) -> Tensor:
    """In memory of its own, as the results of an operator must be."""
    alone = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient if alone else gradient.clone()


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
    backend: str,
    memory: str,
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape, dtype=rows.dtype) for tensor in (rows, h_0, c_0, *weights)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, batch_sizes, h_0, c_0, weights, bias, projection, cell_states, _, *path = inputs
    h, _, _, c, gates, tanh_c = output
    ctx.save_for_backward(rows, batch_sizes, h_0, c_0, *weights, h, c, gates, tanh_c)
    ctx.layer = bias, projection, *path
    ctx.cell_states = cell_states


def _op_backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
    d_h, d_h_n, d_c_n, d_c, *_ = d_outputs
    rows, batch_sizes, h_0, c_0, *weights, h, c, gates, tanh_c = ctx.saved_tensors
    d_rows, d_h_0, d_c_0, *d_weights = lstm_layer_backward_op(
        *(d_h, d_h_n, d_c_n, d_c if ctx.cell_states else None, rows, batch_sizes, h_0, c_0),
        *(weights, h, c, gates, tanh_c, *ctx.layer),
    )
    return d_rows, None, d_h_0, d_c_0, d_weights, *(None,) * 6


lstm_layer_op.register_autograd(_op_backward, setup_context=_setup_context)
