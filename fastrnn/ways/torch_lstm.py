"""torch's own LSTM: what nn.LSTM computes, by the same operator, on any device and in any dtype.

One call for all layers, of a dense batch as it stands, or of packed rows: the rows of a
:class:`fastrnn.input.packing.PackedLayout` are a PackedSequence's, so lengths, masks with holes and
resets need nothing else. On a GPU it is cuDNN's or MIOpen's, on a Mac Metal's, on the CPU oneDNN's
where that can, and a loop of torch's in C++ elsewhere.

Gradients are wanted in evaluation mode too, where cuDNN refuses unless its train flag is set, so
the flag follows the gradients and dropout the module. Off the CPU torch's backward has no
derivative; a double backward goes through the differentiable operations of the cell there.

Autocast is off where these run: inputs have their dtype already.

Limits: no cell-state sequence, and torch decides what is kept for backward. The rows' sizes must be
on the host. Double backward off the CPU knows no dropout between layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import torch_private
from fastrnn.input.packing import PackedLayout
from fastrnn.input.transforms import have_own_class, vectorized
from fastrnn.ways.recurrence import (
    CPU,
    LayerOutput,
    OutputGradients,
    differentiate,
    outside_autocast,
    pad_rows,
)
from fastrnn.ways.step_loop import Call, host_sizes, run_composite

_LSTM_MODE = 2  # the number of the LSTM in cuDNN's interface


class Stack(NamedTuple):
    """What a stack of layers is, besides its tensors.

    Attributes:
        num_layers: L.
        bias: whether there are biases.
        bidirectional: D = 2.
        projection: whether there are projections.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.
    """

    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    projection: bool = False
    dropout: float = 0.0

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1


class DenseOutput(NamedTuple):
    """What torch's LSTM computes.

    Attributes:
        output: of the last layer, shaped as the input, ``D * P`` features.
        h_n: ``[L * D, S, P]``.
        c_n: ``[L * D, S, H]``.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor


def can_run(*, cell_states: bool, memory: str) -> str | None:
    """Why torch's LSTM cannot do what is asked; None where it can."""
    if cell_states:
        return "torch's LSTM does not return the cell states"
    if memory != "save":
        return "torch's LSTM knows no memory='recompute'"
    return None


def run_dense(
    x: Tensor,
    flat: Sequence[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    stack: Stack,
    *,
    batch_first: bool = False,
    train: bool = False,
) -> DenseOutput:
    """All layers over a dense batch.

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``.
        flat: the weights of all layers and directions; they are cast to the dtype of ``x``.
        h_0: ``[L * D, B, P]``. None: zeros.
        c_0: ``[L * D, B, H]``. None: zeros.
        stack: the layers.
        batch_first: see ``x``. Default: False.
        train: whether gradients are wanted. Default: False.
    """
    h_0, c_0 = _states(h_0, c_0, x, x.shape[0 if batch_first else 1], flat, stack)
    flat = _weights(flat, x.dtype, stack)
    settings = stack.bias, stack.num_layers, stack.dropout, train or stack.dropout > 0
    if _torch_differentiates(x, train):
        found = torch.lstm(x, (h_0, c_0), flat, *settings, stack.bidirectional, batch_first)
        return DenseOutput(*found)

    def run(x: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]) -> Sequence[Tensor]:
        states, bidirectional = (h_0, c_0), stack.bidirectional
        return torch.lstm(x, states, list(flat), *settings, bidirectional, batch_first)

    def composite(x: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]) -> Sequence[Tensor]:
        x = x.transpose(0, 1) if batch_first else x
        steps, batch, _ = x.shape
        rows, h_n, c_n = _composite(stack, (batch,) * steps, x.flatten(0, 1), h_0, c_0, flat)
        output = rows.unflatten(0, (steps, batch))
        return output.transpose(0, 1) if batch_first else output, h_n, c_n

    return _differentiable(run, composite, (x, h_0, c_0, *flat), stack)


def run_rows(
    rows: Tensor,
    layout: PackedLayout,
    flat: Sequence[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    stack: Stack,
    *,
    train: bool = False,
) -> DenseOutput:
    """All layers over the rows of an exact layout, of which there is at least one.

    Args:
        rows: ``[N, I]``.
        layout: of the batch, S sequences.
        flat: as in :func:`run_dense`.
        h_0: ``[L * D, S, P]``. None: zeros.
        c_0: ``[L * D, S, H]``. None: zeros.
        stack: as in :func:`run_dense`, and so is ``train``.
        train: see there.
    """
    sizes = layout.batch_sizes
    active = layout.sizes[0] if layout.sizes else int(sizes[0])  # those without a step follow them
    h_0, c_0 = _states(h_0, c_0, rows, layout.sequences, flat, stack)
    flat = _weights(flat, rows.dtype, stack)
    settings = stack.bias, stack.num_layers, stack.dropout, train or stack.dropout > 0

    def run(rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]) -> Sequence[Tensor]:
        states, bidirectional = (h_0, c_0), stack.bidirectional
        if active == h_0.shape[1]:
            return torch.lstm(rows, sizes, states, list(flat), *settings, bidirectional)
        begin = h_0[:, :active].contiguous(), c_0[:, :active].contiguous()
        output, *final = torch.lstm(rows, sizes, begin, list(flat), *settings, bidirectional)
        pairs = zip(final, states, strict=True)
        return output, *(torch.cat([last, first[:, active:]], 1) for last, first in pairs)

    if _torch_differentiates(rows, train):
        return DenseOutput(*run(rows, h_0, c_0, flat))

    def composite(
        rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return _composite(stack, layout.sizes or host_sizes(sizes), rows, h_0, c_0, flat)

    return _differentiable(run, composite, (rows, h_0, c_0, *flat), stack)


def run_step(
    rows: Tensor, flat: Sequence[Tensor], h_0: Tensor | None, c_0: Tensor | None, stack: Stack
) -> DenseOutput:
    """All layers for one step, on the CPU, by torch's cell: no operator for sequences is as fast.

    Args:
        rows: ``[B, I]``.
        flat: the weights of all layers and directions, without projections, in the same dtype.
        h_0: ``[L * D, B, H]``. None: zeros.
        c_0: ``[L * D, B, H]``. None: zeros.
        stack: the layers.
    """
    h_0, c_0 = _states(h_0, c_0, rows, rows.shape[0], flat, stack)
    if len(flat) == 4 and stack.bias:  # the same with fewer calls
        h, c = torch.lstm_cell(rows, (h_0[0], c_0[0]), *flat)
        # Backward needs c as it is.
        return DenseOutput(h, h.unsqueeze(0).clone(), (c.clone() if c.requires_grad else c)[None])
    each, directions = 4 if stack.bias else 2, stack.directions
    h_n, c_n = [], []
    for index, (h, c) in enumerate(zip(h_0.unbind(0), c_0.unbind(0), strict=True)):
        if directions == 1 or index % 2 == 0:
            x = rows
            if index and stack.dropout:
                x = functional.dropout(x, stack.dropout, training=True)
        h, c = torch.lstm_cell(x, (h, c), *flat[index * each : (index + 1) * each])
        h_n.append(h)
        c_n.append(c)
        if directions == 1:
            rows = h
        elif index % 2:
            rows = torch.cat(h_n[-2:], 1)
    return DenseOutput(rows, torch.stack(h_n), torch.stack(c_n))


def layer_forward(
    call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
) -> LayerOutput:
    """One layer without autograd, for an operator; rows past the valid ones come out as zero."""
    if not sum(call.sizes):  # torch knows no batch without a step
        output = rows.new_zeros(rows.shape[0], h_0.shape[0] * h_0.shape[2])
        return LayerOutput(output, h_0.clone(), c_0.clone(), None)
    found = _run_layer(call, rows, h_0, c_0, flat, train=False)
    return LayerOutput(pad_rows(found.output, rows.shape[0]), found.h_n, found.c_n, None)


def layer_backward(
    call: Call,
    grads: OutputGradients,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight; forward is computed again for them."""
    leaves = [tensor.detach().requires_grad_() for tensor in (rows, h_0, c_0, *flat)]
    valid = sum(call.sizes)
    if not valid:  # each state passes through
        found = [torch.zeros_like(leaf) for leaf in leaves]
        for index, gradient in ((1, grads.h_n), (2, grads.c_n)):
            found[index] = found[index] if gradient is None else gradient.clone()
        return [*found]
    with _autograd_in_an_operator():
        output = _run_layer(call, leaves[0], leaves[1], leaves[2], leaves[3:], train=True)
        pairs = [
            (result, gradient)
            for result, gradient in zip(output, grads.of_rows(valid)[:3], strict=True)
            if gradient is not None
        ]
        results, given = zip(*pairs, strict=True)
        return [*torch.autograd.grad(results, leaves, given, materialize_grads=True)]


@contextlib.contextmanager
def _autograd_in_an_operator() -> Iterator[None]:
    """Autograd, which the dispatcher leaves out while it runs an operator of torch.library."""
    key = torch_private.DispatchKey
    with contextlib.ExitStack() as stack:
        for part in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
            stack.enter_context(torch_private.ExcludeDispatchKey(part, False))
        stack.enter_context(torch.enable_grad())
        yield


def _run_layer(
    call: Call,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    *,
    train: bool,
) -> DenseOutput:
    valid = sum(call.sizes)
    sizes = torch.tensor(call.sizes, dtype=torch.int64, device="cpu")
    layout = PackedLayout(valid, h_0.shape[1], sizes, sizes=call.sizes)
    stack = Stack(1, call.bias, call.directions == 2, call.projection)
    return run_rows(rows[:valid], layout, flat, h_0, c_0, stack, train=train)


def _torch_differentiates(x: Tensor, train: bool) -> bool:
    """Whether torch's graph is enough: on the CPU its backward has a derivative too."""
    return x.device == CPU or not train or torch_private.tracing_state() is not None


def _states(
    h_0: Tensor | None,
    c_0: Tensor | None,
    like: Tensor,
    sequences: int,
    flat: Sequence[Tensor],
    stack: Stack,
) -> tuple[Tensor, Tensor]:
    """The initial states, zeros where there are none; contiguous, as cuDNN and oneDNN want them."""
    if h_0 is not None and c_0 is not None:  # always both
        return h_0.contiguous(), c_0.contiguous()
    count, (gates, width) = stack.num_layers * stack.directions, flat[1].shape
    h_0 = like.new_zeros(count, sequences, width)
    return h_0, like.new_zeros(count, sequences, gates // 4) if stack.projection else h_0


def _weights(flat: Sequence[Tensor], dtype: torch.dtype, stack: Stack) -> list[Tensor]:
    """The weights as torch's operator wants them: in ``dtype``, and where cuDNN runs in one chunk.

    cuDNN takes weights in one chunk of memory, where nn.LSTM's parameters are; torch warns at every
    call where they are not, and makes a chunk. So does this, without a warning.
    """
    if have_own_class(flat):
        return list(flat)
    own = [weight if weight.dtype == dtype else weight.to(dtype) for weight in flat]
    if own[0].device == CPU:  # oneDNN takes strided weights for contiguous ones
        return [weight if weight.is_contiguous() else weight.contiguous() for weight in own]
    if not _wants_one_chunk(own[0]) or len({w.untyped_storage().data_ptr() for w in own}) == 1:
        return own
    if flat[0].dtype == dtype:
        own = [weight.clone() for weight in own]
    gates, input_size = own[0].shape
    projected = own[-1].shape[0] if stack.projection else 0
    with torch.no_grad():  # it moves the tensors, and changes no number
        torch_private.cudnn_to_one_chunk(
            own,
            len(own) // (stack.num_layers * stack.directions),
            input_size,
            _LSTM_MODE,
            gates // 4,
            projected,
            stack.num_layers,
            False,
            stack.bidirectional,
        )
    return own


def _wants_one_chunk(weight: Tensor) -> bool:
    """Whether cuDNN runs what has this weight."""
    return (
        weight.is_cuda
        and torch.backends.cudnn.is_acceptable(weight)
        and torch_private.cudnn_wants_one_chunk()
    )


_Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]


def _differentiable(
    run: _Run, composite: _Run, inputs: Sequence[Tensor], stack: Stack
) -> DenseOutput:
    again = None if stack.dropout else composite
    output, h_n, c_n = _Differentiable.apply(run, again, *inputs)
    return DenseOutput(output, h_n, c_n)


def _composite(
    stack: Stack,
    sizes: tuple[int, ...],
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, without dropout, in differentiable operations."""
    directions, each = stack.directions, len(flat) // stack.num_layers
    call = Call(sizes, directions, stack.bias, stack.projection, cell_states=False)
    h_n, c_n = [], []
    for layer in range(stack.num_layers):
        states = slice(layer * directions, (layer + 1) * directions)
        weights = flat[layer * each : (layer + 1) * each]
        rows, last_h, last_c, _ = run_composite(call, rows, h_0[states], c_0[states], weights)
        h_n.append(last_h)
        c_n.append(last_c)
    return rows, torch.cat(h_n), torch.cat(c_n)


class _Differentiable(torch.autograd.Function):
    """torch's LSTM where its own backward cannot be differentiated.

    It keeps torch's graph, and lets it go when autograd lets go of this node.
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, composite: _Run | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of ``run``."""
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        x, h_0, c_0, *flat = leaves
        with torch.enable_grad():
            outputs = run(x, h_0, c_0, flat)
        ctx.composite, ctx.graph = composite, (leaves, outputs)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that need one."""
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with outside_autocast(inputs[0].device):
            if torch.is_grad_enabled() or vectorized(*d_outputs):
                if ctx.composite is None:
                    raise RuntimeError(
                        "torch's LSTM on this device has no double or vectorized backward with "
                        'dropout between layers; use backend="reference" for it, or dropout=0'
                    )
                return (None, None, *differentiate(ctx.composite, d_outputs, inputs, needs))
            leaves, outputs = ctx.graph
            keep = torch_private.keeps_graph()
            if not keep:
                del ctx.graph
            reached = [index for index, gradient in enumerate(d_outputs) if gradient is not None]
            found = torch.autograd.grad(
                [outputs[index] for index in reached],
                [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed],
                [d_outputs[index] for index in reached],
                retain_graph=keep,
                allow_unused=True,
            )
        each = iter(found)
        return (None, None, *(next(each) if needed else None for needed in needs))
