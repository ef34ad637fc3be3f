"""A padded batch as it stands, where its padding costs less than moving rows.

Every layer is one call of torch's own LSTM over all steps: the carry feature of onednn.py keeps the
cell states of sequences that end early exact, zeros replace the input's padding, and outputs of
padded steps are zero.

torch differentiates these calls, and their backward too, so double backward needs nothing here, and
in bfloat16 the cell states are rounded at every step, as nn.LSTM's are. A path of recurrence.py it
is not: with so small a batch Python's share of a backward by hand costs more than torch's nodes do
(B8 T50 H64: 0.39 ms against 0.14).

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
only; with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import onednn
from fastrnn.dense import DenseOutput, run_dense
from fastrnn.packing import PaddedLayout
from fastrnn.recurrence import flatten_weights
from fastrnn.reference import LayerWeights


def run_padded(
    x: Tensor,
    layout: PaddedLayout,
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
        layout: of the batch.
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
    wide, padding = onednn.compute_dtype(dtype), layout.padding
    x, h_n, c_n = x.to(wide), [], []
    for index, weights in enumerate(layers):
        if index and dropout:
            x = _dropout(x, dropout, batch_first)
        if padding is not None and layout.carry is not None:
            rows = x.reshape(-1, x.shape[2])
            rows = rows if index else rows.index_fill(0, padding, 0.0)
            x = onednn.with_carry(rows, layout.carry).view(*x.shape[:2], -1)
        part = slice(index * directions, (index + 1) * directions)
        output, last_h, last_c = run_dense(
            x,
            _operands(weights, wide, carry=padding is not None),
            None if h_0 is None else h_0[part].to(wide).contiguous(),
            None if c_0 is None else c_0[part].to(wide).contiguous(),
            num_layers=1,
            bias=weights[0].bias_ih is not None,
            bidirectional=directions == 2,
            batch_first=batch_first,
            dropout=0.0,
        )
        if padding is not None and layout.last is not None:
            rows = output.reshape(-1, output.shape[2])
            # Backward needs what oneDNN returned; where that lay otherwise, this is a copy already.
            kept = output.requires_grad and output.is_contiguous()
            rows = (rows.index_fill if kept else rows.index_fill_)(0, padding, 0.0)
            output = rows.view(output.shape)
            # The last step may be padding; the reverse direction's is the first.
            own = rows.index_select(0, layout.last)[:, : weights[0].hidden_size].unsqueeze(0)
            last_h = own if directions == 1 else torch.cat([own, last_h[1:]])
        x = output
        h_n.append(last_h)
        c_n.append(last_c)
    final_h, final_c = (part[0] if len(part) == 1 else torch.cat(part) for part in (h_n, c_n))
    return DenseOutput(x.to(dtype), final_h.to(dtype), final_c.to(dtype))


def _dropout(x: Tensor, probability: float, batch_first: bool) -> Tensor:
    """With the draws of nn.LSTM, which come time-major."""
    if not batch_first:
        return functional.dropout(x, probability, training=True)
    x = x.transpose(0, 1).contiguous()
    return functional.dropout(x, probability, training=True).transpose(0, 1)


def _operands(weights: Sequence[LayerWeights], dtype: torch.dtype, *, carry: bool) -> list[Tensor]:
    """All weights of a layer, contiguous, with those of the carry feature."""
    each = (direction.to(dtype) for direction in weights)
    if carry:
        each = (
            direction._replace(ih=onednn.with_carry_weights(direction.ih)) for direction in each
        )
    return [weight.contiguous() for weight in flatten_weights(list(each))]
