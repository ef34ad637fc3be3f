"""One layer by the Triton kernels: one launch forward, one backward, both directions in each.

The input's product comes before the launch and the weights' gradients after it, each one matrix
product over all rows::

    gates_x = rows W_ih^T + b_ih + b_hh                              before lstm_forward
    d_rows = d_gates W_ih                                            after lstm_backward,
    d_W_ih = d_gates^T rows,  d_W_hh = d_gates^T h_{t-1}             likewise

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
    """

    directions: int
    bias: bool
    cell_states: bool
    memory: Memory
    backend: str

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
        _log.warning("the PyTorch step loop stands in for the Triton kernels: %s", error)


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


def _stack(weights: Sequence[LayerWeights]) -> _Stacked:
    biases = [bias for bias in (direction.bias() for direction in weights) if bias is not None]
    if len(weights) == 1:
        ih, hh, _, _, _ = weights[0]
        return _Stacked(ih, hh.unsqueeze(0).contiguous(), biases[0] if biases else None)
    return _Stacked(
        torch.cat([direction.ih for direction in weights]),
        torch.stack([direction.hh for direction in weights]),
        torch.cat(biases) if biases else None,
    )


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
            *(gates_x, weights.hh, h_0.contiguous(), c_0.contiguous()),
            *steps,
            save=keep,
            input_precision=precision,
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

    precision = input_precision()
    weights = _stack(call.unflatten(flat))
    directions, _, hidden_size = weights.hh.shape
    initial_h, initial_c = h_0.contiguous(), c_0.contiguous()
    outputs = h.view(-1, directions, hidden_size)
    needs_rows, needs_h_0, needs_c_0, *needs_flat = needs
    each = len(needs_flat) // directions
    c, gates, _ = states
    assert c is not None
    previous = None
    if gates is None or any(needs_flat[1::each]):
        previous = _previous_states(outputs, initial_h, steps)
    if gates is None:
        assert previous is not None
        with products_of(precision, rows.device, rows.dtype):
            gates = _gates_again(rows, weights, previous)
    try:
        d_gates, d_h_0, d_c_0 = lstm_backward(
            d_h=_given(grads.h, outputs),
            d_h_n=_given(grads.h_n, initial_h),
            d_c_n=_given(grads.c_n, initial_c),
            gates=gates,
            c=c,
            c_0=initial_c,
            weight_hh=weights.hh,
            batch_sizes=steps.sizes,
            offsets=steps.offsets,
            d_c=None if grads.c is None else _given(grads.c, c),
            input_precision=precision,
        )
    except CannotLaunch as error:
        call.refused(error)
        inputs = (rows, h_0, c_0, flat, h, States(c, None, None), needs)
        return steps_backward(call.of_loop(steps), grads, *inputs)
    with products_of(precision, rows.device, rows.dtype):
        found: list[Tensor | None] = [
            d_gates.flatten(1) @ weights.ih if needs_rows else None,
            d_h_0 if needs_h_0 else None,
            d_c_0 if needs_c_0 else None,
        ]
        for index in range(directions):
            needs_ih, needs_hh, *needs_bias = needs_flat[index * each : (index + 1) * each]
            own = d_gates[:, index]
            found.append(own.t() @ rows if needs_ih else None)
            found.append(own.t() @ previous[index] if needs_hh and previous is not None else None)
            if needs_bias:
                found += twin_gradients(own.sum(0) if any(needs_bias) else None, *needs_bias)
    return found


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in the shape of what it belongs to; zeros for None."""
    return torch.zeros_like(like) if gradient is None else gradient.reshape(like.shape).contiguous()


def _previous_states(h: Tensor, h_0: Tensor, layout: Steps) -> list[Tensor]:
    """``[N, H]`` for each direction: the hidden state that every row comes with."""
    batch_sizes, offsets = layout
    count, steps = h.shape[0], batch_sizes.shape[0]
    row = torch.arange(count, device=h.device)
    step = torch.searchsorted(offsets + batch_sizes, row, right=True)
    used = step < steps
    step = step.clamp(max=steps - 1)
    sequence = row - offsets.index_select(0, step)
    states = []
    for index in range(h.shape[1]):
        before = step - 1 if index == 0 else step + 1
        inside = before.clamp(0, steps - 1)
        known = (before == inside) & (sequence < batch_sizes.index_select(0, inside))
        source = torch.where(known, offsets.index_select(0, inside), count) + sequence
        source = torch.where(used, source, 0)  # whatever: its gradient is zero
        states.append(torch.cat([h[:, index], h_0[index]]).index_select(0, source))
    return states


def _gates_again(rows: Tensor, weights: _Stacked, previous: Sequence[Tensor]) -> Tensor:
    """The activated gates, ``[N, D, 4H]``, from all hidden states at once."""
    gates = _project(rows, weights)
    for index, states in enumerate(previous):
        gates[:, index].addmm_(states, weights.hh[index].t())
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
