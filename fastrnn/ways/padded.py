"""A padded batch as it stands, where its padding costs less than moving rows.

Every layer is one call of torch's own LSTM over all steps: the carry feature of onednn.py keeps the
cell states of sequences that end early exact, and outputs of padded steps zero; zeros replace the
input's padding.

torch differentiates these calls, and their backward too, so double backward needs nothing here. A
path of recurrence.py it is not: with so small a batch Python's share of a backward by hand costs
more than torch's nodes do (B8 T50 H64: 0.39 ms against 0.14).

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
only; with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import LayerWeights
from fastrnn.input.blanking import blanked
from fastrnn.input.forms import callers_own
from fastrnn.input.packing import PaddedLayout
from fastrnn.input.transforms import vectorized
from fastrnn.ways import onednn
from fastrnn.ways.dense import run_dense_layer
from fastrnn.ways.torch_lstm import DenseOutput


def run_padded(
    x: Tensor,
    layout: PaddedLayout | None,
    layers: Sequence[Sequence[LayerWeights]],
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    batch_first: bool,
    dropout: float,
) -> DenseOutput:
    """All layers over a padded batch.

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``.
        layout: of the batch; None where nothing is padding.
        layers: the weights of each layer's directions, without projections, in the dtype that comes
            out; 16-bit ones are computed as onednn.py says.
        h_0: ``[L * D, B, H]``; zeros where there is padding and D is 2. None: zeros.
        c_0: ``[L * D, B, H]``, likewise.
        batch_first: see ``x``.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.

    Returns:
        See :class:`DenseOutput`; outputs in the padding are zero.
    """
    dtype, directions = layers[0][0].ih.dtype, len(layers[0])
    wide = onednn.compute_dtype(dtype)
    if wide != dtype:
        x = x.to(wide)
        h_0, c_0 = (None if state is None else state.to(wide) for state in (h_0, c_0))
    if layout is not None and layout.carry.dtype != wide:
        layout = layout._replace(carry=layout.carry.to(wide))
    if batch_first:  # torch's operator would transpose too, and the carry feature needs a copy
        x = x.transpose(0, 1)
    h_n, c_n, steps = [], [], x.shape[0]
    for index, weights in enumerate(layers):
        if index and dropout:
            x = functional.dropout(x[:steps], dropout, training=True)
        states = slice(index * directions, (index + 1) * directions)
        x, last_h, last_c = _run_layer(
            x,
            layout,
            weights if wide == dtype else [direction.to(wide) for direction in weights],
            None if h_0 is None else h_0[states],
            None if c_0 is None else c_0[states],
            final=steps if index == len(layers) - 1 else None,
        )
        h_n.append(last_h)
        c_n.append(last_c)
    found = x.transpose(0, 1) if batch_first else x, _stacked(h_n), _stacked(c_n)
    return DenseOutput(*(found if wide == dtype else (tensor.to(dtype) for tensor in found)))


def _run_layer(
    x: Tensor,
    layout: PaddedLayout | None,
    weights: Sequence[LayerWeights],
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    final: int | None,
) -> DenseOutput:
    """One layer over ``[T, B, I]``; its output is zero in the padding.

    The output has the layout's steps; of the last layer, the ``final`` ones that the input had, and
    is the caller's own.
    """
    if layout is None:
        dense = run_dense_layer(x, weights, h_0, c_0)
        return dense if final is None else dense._replace(output=callers_own(dense.output))
    hidden_size = weights[0].hh.shape[1]
    x = onednn.with_carry(x, layout.carry, layout.valid)
    if len(weights) == 2:
        output, h_n, c_n = run_dense_layer(x, weights, h_0, c_0, carry=True)
    else:  # the same, without final states that are made anew here
        if h_0 is None or c_0 is None:
            h = c = x.new_zeros(x.shape[1], hidden_size)
        else:
            h, c = h_0[0].contiguous(), c_0[0].contiguous()
        output, h_n, c_n, _ = onednn.one_layer(x, onednn.operands(weights[0], carry=True), h, c)
        if output.requires_grad:
            c_n = c_n.clone()  # backward needs what oneDNN returned
    last = layout.last.expand(-1, -1, hidden_size)
    if output.requires_grad and final is not None:
        output, own = _ended(output, layout.valid, last, final)
    else:
        own = output.gather(0, last)
        output = output if final is None else _first(output, final)
    if len(weights) == 1:
        return DenseOutput(output, own, c_n.view(1, -1, hidden_size))
    # The last step may be padding; the reverse direction's is the first.
    return DenseOutput(output, torch.cat([own, h_n[1:]]), c_n)


def _first(x: Tensor, steps: int) -> Tensor:
    """The first steps; where they are all without a view, which costs a small batch 1 %."""
    return x if x.shape[0] == steps else x[:steps]


class _Ended(torch.autograd.Function):
    """A copy of the outputs of the first steps, and one direction's at the last valid ones.

    No gradient goes into the padding: the user's may be NaN there. torch's nodes would fill two
    more tensors as large as the output with gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, valid: Tensor, last: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        ctx.valid, ctx.last = valid, last
        return _first(output, steps).clone(), output.gather(0, last)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_own: Tensor) -> tuple[Tensor, None, None, None]:
        steps = d_output.shape[0]
        d_all = blanked(d_output, _first(ctx.valid, steps))
        if steps < ctx.valid.shape[0]:
            d_all = functional.pad(d_all, (0, 0, 0, 0, 0, ctx.valid.shape[0] - steps))
        add = d_all.scatter_add if vectorized(d_output, d_own) else d_all.scatter_add_
        return add(0, ctx.last, d_own), None, None, None


# Function.apply without its looking for functorch, which cannot be here (see onednn.py): 50 us of
# 1900 in a training step of B8 T50 H64.
_ended = super(torch.autograd.Function, _Ended).apply


def _stacked(states: Sequence[Tensor]) -> Tensor:
    """The states of all layers."""
    return states[0] if len(states) == 1 else torch.cat(list(states))
