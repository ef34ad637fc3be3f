"""The recurrence of one layer over packed rows: forward, backward, and what runs them.

:class:`LSTMRecurrence` is the ``torch.autograd.Function``. Its forward and backward are the step
loop of reference.py. A backward that is itself differentiated goes through the differentiable one.

16-bit inputs are computed in float32 and rounded once, at the output.

Notation as in reference.py; D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import reference
from fastrnn.reference import Forward, Gradients, LayerWeights, compute_dtype


class LayerOutput(NamedTuple):
    """What a layer computes.

    Attributes:
        h: ``[N, D * P]`` outputs, the directions side by side.
        h_n: ``[D, S, P]`` final hidden states.
        c_n: ``[D, S, H]`` final cell states.
        c: ``[N, D * H]`` cell states, or None where nobody asked.
    """

    h: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None


Memory = Literal["save", "recompute"]


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


def flatten_weights(weights: Sequence[LayerWeights]) -> list[Tensor]:
    """All tensors of all directions; :func:`unflatten_weights` undoes it."""
    return [tensor for direction in weights for tensor in direction if tensor is not None]


def unflatten_weights(
    flat: Sequence[Tensor], directions: int, *, bias: bool, projection: bool
) -> list[LayerWeights]:
    """The flat list of weights, by direction."""
    each = len(flat) // directions
    found = []
    for begin in range(0, len(flat), each):
        ih, hh, *rest = flat[begin : begin + each]
        bias_ih, bias_hh = (rest[0], rest[1]) if bias else (None, None)
        found.append(LayerWeights(ih, hh, bias_ih, bias_hh, rest[-1] if projection else None))
    return found


def host_sizes(batch_sizes: Tensor) -> tuple[int, ...]:
    """``batch_sizes`` on the host, without the steps of a bounded layout that nobody reaches."""
    sizes: list[int] = batch_sizes.tolist()
    while sizes and sizes[-1] == 0 and sizes[0] > 0:
        sizes.pop()
    return tuple(sizes)


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """``[..., n, F]`` to ``[..., count, F]``, zeros behind; shares memory with nothing."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[-2]))


def side_by_side(states: Tensor | Sequence[Tensor]) -> Tensor:
    """``[D, N, F]`` to ``[N, D * F]``."""
    parts = list(states)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class DirectionRun(NamedTuple):
    """What a direction saved: its cell states, and what :func:`lstm_forward` says."""

    c: Tensor | None
    saved: tuple[Tensor, ...]


class OutputGradients(NamedTuple):
    """Gradients that reach a layer's outputs; None is zero."""

    h: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    c: Tensor | None

    def of_rows(self, valid: int) -> OutputGradients:
        """Those of the first rows alone."""
        h, c = (None if rows is None else rows[:valid] for rows in (self.h, self.c))
        return self._replace(h=h, c=c)

    def to_compute(self) -> OutputGradients:
        """In the dtype they are computed in."""
        return OutputGradients(*(None if g is None else to_compute(g)[0] for g in self))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on."""
    kind = device.type
    known = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inputs have been cast already; autocast must not cast what is computed inside."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def to_compute(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype they are computed in, without their history."""
    dtype = compute_dtype(tensors[0].dtype)
    if dtype == tensors[0].dtype:
        return [tensor.detach() for tensor in tensors]
    return [tensor.detach().to(dtype) for tensor in tensors]


def run_forward(
    call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
) -> tuple[LayerOutput, list[DirectionRun]]:
    """Run every direction."""
    dtype = rows.dtype
    rows, h_0, c_0, *flat = to_compute(rows, h_0, c_0, *flat)
    results = [
        reference.lstm_forward(
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
    results: Sequence[Forward], dtype: torch.dtype, *, cell_states: bool = False
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
        result = reference.lstm_backward(
            _columns(grads.h, index, size_h),
            None if grads.h_n is None else grads.h_n[index],
            None if grads.c_n is None else grads.c_n[index],
            _columns(grads.c, index, hidden_size),
            *(rows, call.sizes, weights, h_0[index], c_0[index]),
            *(h[:, index * size_h : (index + 1) * size_h], run.c, run.saved),
            reverse=index == 1,
            needs_rows=needs[0],
            needs_weights=_layer_needs(needs[3 + index * each :][:each], call),
        )
        results.append(result)
    return layer_gradients(results, by_direction, dtype, needs)


def layer_gradients(
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


def _columns(states: Tensor | None, index: int, width: int) -> Tensor | None:
    """A direction's part of ``[N, D * F]``."""
    return None if states is None else states[:, index * width : (index + 1) * width]


def _layer_needs(needs: Sequence[bool], call: Call) -> list[bool]:
    """``needs`` of the weights given, as one of each of ih, hh, bias_ih, bias_hh, hr."""
    ih, hh, *rest = needs
    biases = rest[:2] if call.bias else [False, False]
    return [ih, hh, *biases, rest[-1] if call.projection else False]


class LSTMRecurrence(torch.autograd.Function):
    """All directions of one layer with a hand-derived backward.

    Saved for backward: the inputs, the outputs ``h``, c, H numbers a row and direction, and unless
    ``memory="recompute"`` gates and tanh(c), 5 H. None is written to, so a second backward gives
    the same gradients. Where backward itself is differentiated (``create_graph=True``) it goes
    through :func:`fastrnn.reference.lstm_composite`.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, *flat: Tensor
    ) -> LayerOutput:
        """``h``, ``h_n``, ``c_n`` and ``c`` of :class:`LayerOutput`."""
        output, directions = run_forward(call, rows, h_0, c_0, flat, save=True)
        ctx.call, ctx.weights = call, len(flat)
        saved = [tensor for run in directions for tensor in (run.c, *run.saved)]
        ctx.save_for_backward(rows, h_0, c_0, *flat, output.h, *saved)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that need one."""
        grads = OutputGradients(*d_outputs)
        rows, h_0, c_0, *rest = ctx.saved_tensors
        flat, h, saved = rest[: ctx.weights], rest[ctx.weights], rest[ctx.weights + 1 :]
        needs = ctx.needs_input_grad[1:]
        if all(gradient is None for gradient in grads):
            return (None,) * (1 + len(needs))
        if torch.is_grad_enabled():
            with outside_autocast(rows.device):
                inputs = [rows, h_0, c_0, *flat]
                return (None, *differentiable_backward(ctx.call, grads, inputs, needs))
        each = len(saved) // ctx.call.directions
        directions = [
            DirectionRun(saved[begin], tuple(saved[begin + 1 : begin + each]))
            for begin in range(0, len(saved), each)
        ]
        with outside_autocast(rows.device):
            found = run_backward(ctx.call, grads, rows, h_0, c_0, flat, h, directions, needs)
        return (None, *found)


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
        reference.lstm_composite(
            *(rows, call.sizes, weights, h_0[index], c_0[index]),
            reverse=index == 1,
        )
        for index, weights in enumerate(call.unflatten(flat))
    ]
    return layer_output(results, dtype, cell_states=call.cell_states)


def differentiable_backward(
    call: Call,
    grads: OutputGradients,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as functions of inputs and ``grads`` that can be differentiated again.

    Rows, ``h`` and ``c`` past the valid ones do not count.
    """
    # Views, so that a gradient reaches an input here only through this layer.
    views = [tensor.view_as(tensor) for tensor in inputs]
    valid = sum(call.sizes)
    outputs = run_composite(call, views[0][:valid], views[1], views[2], views[3:])
    grads = grads.of_rows(valid)
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, grads, strict=True)
        if output is not None and gradient is not None and output.requires_grad
    ]
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if needed else None for needed in needs]
