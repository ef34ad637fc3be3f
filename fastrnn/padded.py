"""The recurrence over a padded batch as it stands: dense input, and batches too small to pack.

Every direction is one call of torch's oneDNN LSTM over all T * B rows, differentiated by torch
itself. Where sequences end early the carry feature of onednn.py keeps their cell states exact,
zeros replace the input's padding, and outputs of padded steps are zero.

torch differentiates that call's backward too, so double backward needs nothing here.

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
only; with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import onednn
from fastrnn.packing import PackedLayout
from fastrnn.recurrence import LayerOutput, side_by_side
from fastrnn.reference import LayerWeights


def can_run_padded(rows: Tensor) -> bool:
    """Whether oneDNN can run these rows and torch can differentiate it as asked."""
    return (
        not torch.compiler.is_compiling()
        and onednn.available(rows)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def run_padded(
    rows: Tensor,
    layout: PackedLayout,
    weights: Sequence[LayerWeights],
    h_0: Tensor,
    c_0: Tensor,
) -> LayerOutput:
    """All directions of one layer over a padded batch.

    Args:
        rows: ``[T * B, I]`` float32.
        layout: in which every sequence has all the rows; of them ``layout.padding`` are padding.
        weights: of each direction, without projections.
        h_0: ``[D, B, H]``; zeros where there is padding and D is 2.
        c_0: ``[D, B, H]``, likewise.

    Returns:
        See :class:`LayerOutput`; outputs in the padding are zero, and ``c`` is None.
    """
    padding = None if layout.padding is None else layout.padding.unsqueeze(1)
    if padding is not None:
        rows = torch.cat([rows.masked_fill(padding, 0.0), padding.to(rows.dtype)], 1)
    x = rows.contiguous().view(-1, layout.sequences, rows.shape[1])
    outputs, h_finals, c_finals = [], [], []
    for index, direction in enumerate(weights):
        output, h_n, c_n = _run_direction(
            x, direction, h_0[index], c_0[index], layout.padding, reverse=index == 1
        )
        if padding is not None:
            output = output.masked_fill(padding, 0.0)
            if index == 0 and layout.last is not None:  # the last step may be padding
                h_n = output.index_select(0, layout.last)
        outputs.append(output)
        h_finals.append(h_n)
        c_finals.append(c_n)
    return LayerOutput(side_by_side(outputs), torch.stack(h_finals), torch.stack(c_finals), None)


def _run_direction(
    x: Tensor,
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    padding: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[T * B, H]`` and final states ``[B, H]``."""
    operands = onednn.operands(weights, carry=padding is not None)
    inputs = (x, *operands, h_0, c_0)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    output, h_n, c_n, _ = onednn.dense_forward(
        x, operands, h_0.contiguous(), c_0.contiguous(), reverse=reverse, save=save
    )
    return output.view(-1, h_n.shape[1]), h_n, c_n
