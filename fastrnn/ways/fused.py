"""One layer by the Triton kernels: one launch forward, one backward, both directions in each.

The input's product comes before the launch and the weights' gradients after it, each one matrix
product over all rows::

    gates_x = rows W_ih^T + b_ih + b_hh                              before lstm_forward
    d_rows = d_gates W_ih                                            after lstm_backward,
    d_W_ih = d_gates^T rows,  d_W_hh = d_gates^T h_{t-1}             likewise

Of a dense batch the h_{t-1} are the outputs themselves, S rows further up, and h_0. Of a ragged one
a small kernel collects them. At 3 to 5 us of the host's time each, operations around the launches
count: tests/kernels/test_launch_counts.py says how many there are.

Nothing here waits for the device: sizes of steps are read by the kernels, and rows that a bounded
layout does not use come out as zero.

float32 products, inside the kernels and around them, follow torch's switch for cuDNN's RNNs
(``torch.backends.cudnn.rnn.fp32_precision``, ``torch.backends.cudnn.allow_tf32``), as nn.LSTM's do:
TF32, or full precision.

Limits: those of the kernels (see :func:`fastrnn.choosing.backends.can_run_triton`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrnn.cells.lstm import LayerWeights, activate_, twin_gradients
from fastrnn.input.packing import Steps
from fastrnn.ways.recurrence import (
    LayerOutput,
    Memory,
    OutputGradients,
    pad_rows,
    unflatten_weights,
)
from fastrnn.ways.step_loop import (
    Call,
    States,
    host_sizes,
    run_composite,
    steps_backward,
    steps_forward,
)

_log = logging.getLogger("fastrnn")


class FusedCall(NamedTuple):
    """What a layer's computation is, besides its tensors.

    Attributes:
        directions: D.
        bias: whether there are biases.
        cell_states: whether the cell states are an output.
        memory: "save" keeps the activated gates for backward, 4H numbers a row and direction;
            "recompute" makes them again with one more matrix product.
        backend: "triton", or "triton-or-reference": the step loop takes over where a GPU refuses a
            launch, and the reason is logged.
        dense: whether every sequence is known to have all steps. Default: False.
        sequences: how many tiles are chosen for. Default: S. The batch's, where resets cut it: how
            many segments there are changes from batch to batch, and each tile is compiled.
    """

    directions: int
    bias: bool
    cell_states: bool
    memory: Memory
    backend: str
    dense: bool = False
    sequences: int | None = None

    def unflatten(self, flat: Sequence[Tensor]) -> list[LayerWeights]:
        """The flat list of weights, by direction."""
        return unflatten_weights(flat, self.directions, bias=self.bias, projection=False)

    def of_loop(self, steps: Steps) -> Call:
        """The same call of the step loop, which waits for the sizes to be on the host."""
        sizes = host_sizes(steps.sizes)
        shape = (sizes, self.directions, self.bias, False, self.cell_states)
        return Call(*shape, self.memory)

    def refused(self, error: Exception) -> None:
        """Log that the step loop takes over, or raise."""
        if self.backend == "triton":
            raise RuntimeError(
                f'backend="triton" cannot run: {error}. Use backend="auto", which takes the '
                "fastest that can."
            ) from error
        # It was warned of, and is remembered: `choosing` takes another way from the next call on.
        _log.info("the PyTorch step loop stands in for the Triton kernels: %s", error)


def input_precision() -> Literal["tf32", "tf32x3"]:
    """How torch's switches want float32 products in an RNN: TF32, or as exact as float32."""
    rnn: Any = torch.backends.cudnn.rnn
    return "tf32" if rnn.fp32_precision == "tf32" else "tf32x3"


@contextlib.contextmanager
def products_of(precision: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let torch's products of float32 on a GPU have the RNN's precision, and not their own.

    torch has no switch for a single product: while this lasts, which is while some are launched,
    it holds for products that other threads launch too.
    """
    # Only fp32_precision is read: the older allow_tf32 raises once a program has used this one.
    matmul = torch.backends.cuda.matmul
    switch, tf32 = matmul.fp32_precision, precision == "tf32"
    if device.type != "cuda" or dtype != torch.float32 or (switch == "tf32") == tf32:
        yield
        return
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = switch


class _Stacked(NamedTuple):
    """The weights of all directions as the products and the kernels take them.

    Attributes:
        ih: ``[D * 4H, I]``.
        hh: ``[D, 4H, H]``.
        bias: ``[D * 4H]``, or None.
    """

    ih: Tensor
    hh: Tensor
    bias: Tensor | None


def _stack(weights: Sequence[LayerWeights], *, bias: bool = True) -> _Stacked:
    """The weights of all directions; two directions' in one copy. ``bias``: the biases as well."""
    first = weights[0]
    bias = bias and first.bias_ih is not None
    if len(weights) == 1:
        return _Stacked(first.ih, _aligned(first.hh).unsqueeze(0), first.bias() if bias else None)
    kinds = zip(*(direction[: 4 if bias else 2] for direction in weights), strict=True)
    pieces = [piece for kind in kinds for piece in kind if piece is not None]
    sizes = [len(weights) * piece.numel() for piece in pieces[:: len(weights)]]
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    ih, hh, *biases = flat.split(sizes)
    return _Stacked(
        ih.view(-1, first.ih.shape[1]),
        hh.view(len(weights), *first.hh.shape),
        biases[0] + biases[1] if bias else None,
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on: else another variant of a kernel is compiled."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _project(rows: Tensor, weights: _Stacked) -> Tensor:
    """``gates_x``, ``[N, D, 4H]``."""
    directions, width, _ = weights.hh.shape
    if weights.bias is None:
        gates_x = rows @ weights.ih.t()
    else:
        gates_x = torch.addmm(weights.bias, rows, weights.ih.t())
    return gates_x.view(-1, directions, width)


def fused_forward(
    call: FusedCall,
    steps: Steps,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    *,
    save: bool,
) -> tuple[LayerOutput, States]:
    """All directions of one layer, without autograd.

    Args:
        call: what to compute.
        steps: of the batch, on the device of ``rows``.
        rows: ``[N, I]``; zeros in rows past the valid ones.
        h_0: ``[D, S, H]``.
        c_0: ``[D, S, H]``.
        flat: the weights, in the dtype of ``rows``.
        save: keep what backward needs.

    Returns:
        The output without the cell states; and the states, ``c`` where they are an output or
        backward needs them, ``gates`` where backward does.

    Raises:
        RuntimeError: the GPU refuses the launch, and ``call`` has no fallback.
    """
    from fastrnn_kernels.launch import CannotLaunch
    from fastrnn_kernels.lstm_forward import lstm_forward

    precision = input_precision()
    weights = _stack(call.unflatten(flat))
    keep: Literal["gates", "cells", "nothing"] = "nothing"
    if save or call.cell_states:
        keep = "gates" if save and call.memory == "save" else "cells"
    with products_of(precision, rows.device, rows.dtype):
        gates_x = _project(rows, weights)
    try:
        result = lstm_forward(
            *(gates_x, weights.hh, _aligned(h_0), _aligned(c_0)),
            *steps,
            save=keep,
            input_precision=precision,
            sequences=call.sequences,
        )
    except CannotLaunch as error:
        call.refused(error)
        output, states = steps_forward(call.of_loop(steps), rows, h_0, c_0, flat, save=save)
        c, gates = (None if s is None else s.to(rows.dtype) for s in (states.c, states.gates))
        return output, States(c, gates, None)
    output = LayerOutput(result.h.flatten(1), result.h_n, result.c_n, None)
    return output, States(result.c, result.gates, None)


def fused_backward(
    call: FusedCall,
    grads: OutputGradients,
    steps: Steps,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    h: Tensor,
    states: States,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight; ``needs`` in the same order.

    Args:
        call: as in :func:`fused_forward`.
        grads: that reach the outputs; None is zero.
        steps: as in :func:`fused_forward`, and so are the next four.
        rows: see there.
        h_0: see there.
        c_0: see there.
        flat: see there.
        h: ``[N, D * H]``, its outputs.
        states: that it saved; gates that are missing are made again.
        needs: whether each gradient is wanted.

    Raises:
        RuntimeError: as in :func:`fused_forward`.
    """
    from fastrnn_kernels.launch import CannotLaunch
    from fastrnn_kernels.lstm_backward import lstm_backward
    from fastrnn_kernels.previous_states import previous_states

    precision = input_precision()
    c, gates, _ = states
    assert c is not None
    weights = _stack(call.unflatten(flat), bias=gates is None)
    directions, _, hidden_size = weights.hh.shape
    initial_h, initial_c = _aligned(h_0), _aligned(c_0)
    outputs = h.view(-1, directions, hidden_size)
    needs_rows, needs_h_0, needs_c_0, *needs_flat = needs
    each = len(needs_flat) // directions
    needs_ih, needs_hh, needs_bias = (
        any(any(needs_flat[kind::each]) for kind in kinds) for kinds in ((0,), (1,), range(2, each))
    )
    nothing = None  # that reaches the final states
    if grads.h_n is None or grads.c_n is None:
        nothing = torch.zeros_like(initial_c)
    previous = None
    try:
        if gates is None or (needs_hh and not call.dense):
            previous = previous_states(outputs, initial_h, *steps)
        if gates is None:
            assert previous is not None
            with products_of(precision, rows.device, rows.dtype):
                gates = _gates_again(rows, weights, previous)
        d_gates, d_h_0, d_c_0 = lstm_backward(
            d_h=_given(grads.h, outputs),
            d_h_n=_given(grads.h_n, initial_h, nothing),
            d_c_n=_given(grads.c_n, initial_c, nothing),
            gates=gates,
            c=c,
            c_0=initial_c,
            weight_hh=weights.hh,
            batch_sizes=steps.sizes,
            offsets=steps.offsets,
            d_c=None if grads.c is None else _given(grads.c, c),
            input_precision=precision,
            sequences=call.sequences,
        )
    except CannotLaunch as error:
        call.refused(error)
        inputs = (rows, h_0, c_0, flat, h, States(c, None, None), needs)
        return steps_backward(call.of_loop(steps), grads, *inputs)
    both = d_gates.flatten(1)
    d_rows = d_ih = d_hh = None
    with products_of(precision, rows.device, rows.dtype):
        if needs_rows:
            d_rows = both @ weights.ih
        if needs_ih:
            d_ih = (both.t() @ rows).view(directions, -1, rows.shape[1])
        if needs_hh:
            d_hh = (
                _d_hh_of_dense(d_gates, outputs, initial_h)
                if previous is None
                else d_gates.permute(1, 2, 0) @ previous
            )
    d_bias = both.sum(0) if needs_bias else None
    d_biases = [
        None if gradient is None else gradient.view(directions, -1)
        for gradient in twin_gradients(d_bias, True, True)
    ]
    found = [d_rows, d_h_0 if needs_h_0 else None, d_c_0 if needs_c_0 else None]
    for index in range(directions):
        of_each = [d_ih, d_hh, *d_biases][:each]
        wanted = needs_flat[index * each : (index + 1) * each]
        found += [
            gradient[index] if needed and gradient is not None else None
            for gradient, needed in zip(of_each, wanted, strict=True)
        ]
    return found


def _given(gradient: Tensor | None, like: Tensor, nothing: Tensor | None = None) -> Tensor:
    """The gradient in the shape of what it belongs to; zeros for None."""
    if gradient is not None:
        return _aligned(gradient.reshape(like.shape))
    return torch.zeros_like(like) if nothing is None else nothing


def _d_hh_of_dense(d_gates: Tensor, h: Tensor, h_0: Tensor) -> Tensor:
    """``d_gates^T h_{t-1}``, ``[D, 4H, H]``, of a batch in which every sequence has all steps.

    The state before a row is then the row S further up, in the reverse direction S further down.
    """
    sequences, later = h_0.shape[1], d_gates.shape[0] - h_0.shape[1]
    found = d_gates.new_empty(*d_gates.shape[1:], h.shape[2])
    for index, (gradient, states) in enumerate(zip(d_gates.unbind(1), h.unbind(1), strict=True)):
        if index == 0:
            begin, rest = gradient.split([sequences, later])
            before = states[:later]
        else:
            rest, begin = gradient.split([later, sequences])
            before = states[sequences:]
        torch.mm(begin.t(), h_0[index], out=found[index])
        found[index].addmm_(rest.t(), before)
    return found


def _gates_again(rows: Tensor, weights: _Stacked, previous: Tensor) -> Tensor:
    """The activated gates, ``[N, D, 4H]``, from all hidden states at once."""
    gates = _project(rows, weights)
    gates.transpose(0, 1).baddbmm_(previous, weights.hh.transpose(1, 2))
    return activate_(gates)


class Fused(NamedTuple):
    """The path of recurrence.py. Deterministic.

    Saved: the outputs, the cell states, and the activated gates unless ``memory="recompute"``.
    Double backward waits for the sizes of the steps.

    Attributes:
        call: what to compute.
        steps: of the batch, on the device of the rows.
    """

    call: FusedCall
    steps: Steps

    def forward(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
    ) -> tuple[LayerOutput, list[Tensor | None]]:
        """See :class:`fastrnn.ways.recurrence.Path`."""
        output, states = fused_forward(self.call, self.steps, rows, h_0, c_0, flat, save=save)
        h = output.h
        if self.call.cell_states and states.c is not None:
            output = output._replace(c=states.c.flatten(1))
        return output, [h, *states]

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
        inputs = (rows, h_0, c_0, flat, h, States(*states), needs)
        return fused_backward(self.call, grads, self.steps, *inputs)

    def composite(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> LayerOutput:
        """See :class:`fastrnn.ways.recurrence.Path`."""
        call, count = self.call.of_loop(self.steps), rows.shape[0]
        output = run_composite(call, rows[: sum(call.sizes)], h_0, c_0, flat)
        c = None if output.c is None else pad_rows(output.c, count)
        return output._replace(h=pad_rows(output.h, count), c=c)
