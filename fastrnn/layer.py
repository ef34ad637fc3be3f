"""One layer over packed rows: the seam between the model and what computes it.

In this order:

- under functorch transforms or forward-mode derivatives: the differentiable step loop; bounded.py
  where the sizes of steps are not on the host;
- while ``torch.compile``, ``torch.export`` or make_fx traces, and where tensors have no data: the
  opaque operator of operators.py;
- on a GPU that has them: the Triton kernels, fused.py, and widening.py for some hidden sizes;
- where the rows are those of rectangles: rectangles.py;
- where every sequence has all steps: dense.py;
- else step_loop.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn.cells.lstm import LayerWeights
from fastrnn.choosing.backends import on_kernels
from fastrnn.input.packing import Layout, PackedLayout, RectangleLayout
from fastrnn.input.transforms import in_dual_level, is_traced, under_functorch
from fastrnn.operators import lstm_layer_op
from fastrnn.ways import onednn
from fastrnn.ways.bounded import run_bounded
from fastrnn.ways.dense import run_dense_rows
from fastrnn.ways.fused import Fused, FusedCall
from fastrnn.ways.rectangles import run_rectangles
from fastrnn.ways.recurrence import (
    LayerOutput,
    Memory,
    flatten_weights,
    outside_autocast,
    pad_rows,
    run,
)
from fastrnn.ways.step_loop import Call, StepLoop, host_sizes, run_composite
from fastrnn.ways.widening import narrow, widen


def lstm_layer(
    rows: Tensor,
    layout: Layout,
    weights: Sequence[LayerWeights],
    h_0: Tensor,
    c_0: Tensor,
    *,
    cell_states: bool = False,
    backend: str = "auto",
    memory: Memory = "save",
) -> LayerOutput:
    """All directions of one layer over packed rows.

    Args:
        rows: ``[N, I]``; rows past a packed layout's ``batch_sizes.sum()`` are not read.
        layout: of the batch.
        weights: of each direction, forward then reverse; in the dtype of ``rows``.
        h_0: ``[D, S, P]``.
        c_0: ``[D, S, H]``.
        cell_states: return the cell state of every row.
        backend: of :class:`fastrnn.choosing.choose.Choice`.
        memory: "save" or "recompute" the gates for backward.

    Returns:
        See :class:`LayerOutput`; rows past the valid ones are zero. Final states share memory with
        nothing and are not kept for backward.
    """
    if isinstance(layout, RectangleLayout):
        with outside_autocast(rows.device):
            return run_rectangles(layout, rows, h_0, c_0, weights)
    assert isinstance(layout, PackedLayout)
    traced, hidden_size = is_traced(rows), weights[0].hidden_size
    composite = needs_composite(rows, h_0, c_0, *flatten_weights(weights))
    if composite and (traced or not layout.exact):
        steps = layout.steps_on(rows.device)
        with outside_autocast(rows.device):
            return run_bounded(steps, rows, h_0, c_0, weights, cell_states=cell_states)
    kernels = on_kernels(backend) and not composite
    if kernels:
        weights, h_0, c_0 = widen(weights, h_0, c_0)
    flat = flatten_weights(weights)
    bias, projection = weights[0].bias_ih is not None, weights[0].hr is not None
    inputs = (rows, h_0, c_0, *flat)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if traced:
        h, h_n, c_n, c, *_ = lstm_layer_op(
            *(rows, layout.batch_sizes, h_0, c_0, flat),
            *(bias, projection, cell_states, needs_grad, backend, memory),
        )
        cells = c.flatten(1).to(h.dtype) if cell_states else None
        return narrow(LayerOutput(h, h_n, c_n, cells), hidden_size)
    if kernels:
        fused = FusedCall(
            *(len(weights), bias, cell_states, memory, backend),
            dense=layout.dense,
            sequences=layout.batch,
        )
        path = Fused(fused, layout.steps_on(rows.device))
        with outside_autocast(rows.device):
            output = run(path, rows, h_0, c_0, flat, needs_grad=needs_grad)
        return narrow(output, hidden_size)

    sizes = layout.sizes or host_sizes(layout.batch_sizes)
    call = Call(sizes, len(weights), bias, projection, cell_states, memory)
    valid = rows.shape[0] if layout.exact else sum(sizes)
    rows = rows[:valid]
    with outside_autocast(rows.device):
        if composite:
            output = run_composite(call, rows, h_0, c_0, flat)
        elif (
            rows.numel() > 0
            and sizes[-1] == layout.sequences
            and onednn.can_compute(
                rows.device,
                rows.dtype,
                backend=backend,
                memory=memory,
                cell_states=cell_states,
                projection=projection,
            )
        ):
            output = run_dense_rows(rows, layout.sequences, weights, h_0, c_0)
        else:
            output = run(StepLoop(call), rows, h_0, c_0, flat, needs_grad=needs_grad)
    if layout.exact:
        return output
    h = pad_rows(output.h, layout.rows)
    return output._replace(h=h, c=None if output.c is None else pad_rows(output.c, layout.rows))


def needs_composite(*inputs: Tensor) -> bool:
    """Whether only differentiable operations will do: under functorch, or forward-mode."""
    if under_functorch():
        return True
    if not in_dual_level():
        return False
    # A graph may look at no tangents.
    return torch.compiler.is_compiling() or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs
    )
