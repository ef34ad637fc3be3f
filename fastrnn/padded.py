"""One layer over a padded batch as it stands, for batches too small to pack.

Every direction is one call of oneDNN's operator over all T * B rows: the carry feature of onednn.py
keeps the cell states of sequences that end early exact, zeros replace the input's padding, and
outputs of padded steps are zero.

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

from fastrnn import onednn
from fastrnn.packing import PaddedLayout
from fastrnn.recurrence import LayerOutput, layer_output
from fastrnn.reference import Forward, LayerWeights


def run_padded(
    rows: Tensor,
    layout: PaddedLayout,
    weights: Sequence[LayerWeights],
    h_0: Tensor,
    c_0: Tensor,
) -> LayerOutput:
    """All directions of one layer over a padded batch.

    Args:
        rows: ``[T * B, I]``.
        layout: of the batch.
        weights: of each direction, without projections.
        h_0: ``[D, B, H]``; zeros where there is padding and D is 2.
        c_0: ``[D, B, H]``, likewise.

    Returns:
        See :class:`LayerOutput`; outputs in the padding are zero, and ``c`` is None.
    """
    dtype, wide = rows.dtype, onednn.compute_dtype(rows.dtype)
    rows, h_0, c_0 = rows.to(wide), h_0.to(wide).contiguous(), c_0.to(wide).contiguous()
    if layout.padding is not None and layout.carry is not None:
        rows = onednn.with_carry(rows.index_fill(0, layout.padding, 0.0), layout.carry)
    x = rows.contiguous().view(-1, layout.sequences, rows.shape[1])
    results = []
    for index, direction in enumerate(weights):
        operands = onednn.operands(direction.to(wide), carry=layout.padding is not None)
        inputs = (x, operands, h_0[index], c_0[index])
        tensors = (x, *operands, h_0, c_0)
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        output, h_n, c_n, _ = onednn.dense_forward(*inputs, reverse=index == 1, save=save)
        output = output.view(-1, h_n.shape[1])
        if layout.padding is not None and layout.last is not None:
            fill = output.index_fill if save else output.index_fill_
            output = fill(0, layout.padding, 0.0)
            if index == 0:  # the last step may be padding
                h_n = output.index_select(0, layout.last)
        results.append(Forward(output, h_n, c_n, None, ()))
    return layer_output(results, dtype)
