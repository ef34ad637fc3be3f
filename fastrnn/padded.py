"""The recurrence over a padded batch as it stands: dense input, and batches too small to pack.

A dense batch is one call of torch's own LSTM for all layers. Where sequences end early every
direction is one call of its oneDNN operator over all T * B rows: the carry feature of onednn.py
keeps their cell states exact, zeros replace the input's padding, and outputs of padded steps are
zero.

torch differentiates these calls, and their backward too, so double backward needs nothing here.

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
only; with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import onednn
from fastrnn.packing import Layout, PackedLayout
from fastrnn.recurrence import LayerOutput, compute_dtype, side_by_side
from fastrnn.reference import LayerWeights


def can_run_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can run these rows in float32, and torch differentiate it as asked."""
    return (
        not torch.compiler.is_compiling()
        and onednn.available(device, compute_dtype(dtype))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def can_run_dense(rows: Tensor, layout: Layout, layers: Sequence[Sequence[LayerWeights]]) -> bool:
    """Whether all layers can be one call of torch's LSTM: every sequence has all T steps."""
    first = layers[0][0]
    return (
        isinstance(layout, PackedLayout)
        and layout.padding is None
        and layout.gather is None
        and layout.owner is None
        and layout.rows == layout.batch_sizes.shape[0] * layout.sequences > 0
        and first.hr is None
        and rows.dtype == torch.float32
        and can_run_onednn(rows.device, rows.dtype)
        # oneDNN takes strided weights for contiguous ones.
        and all(w is None or w.is_contiguous() for layer in layers for d in layer for w in d)
    )


def run_dense(
    rows: Tensor,
    layout: Layout,
    layers: Sequence[Sequence[LayerWeights]],
    h_0: Tensor,
    c_0: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers by torch's own LSTM.

    Args:
        rows: ``[T * B, I]`` float32.
        layout: for which :func:`can_run_dense`.
        layers: the weights of each layer's directions, without projections.
        h_0: ``[L * D, B, H]``.
        c_0: ``[L * D, B, H]``.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.

    Returns:
        Outputs ``[T * B, D * H]``, and the final states, shaped as the initial ones.
    """
    x = rows.contiguous().view(-1, layout.sequences, rows.shape[1])
    flat = [weight for layer in layers for d in layer for weight in d if weight is not None]
    bias, directions = layers[0][0].bias_ih is not None, len(layers[0])
    output, h_n, c_n = torch.lstm(
        *(x, (h_0, c_0), flat, bias, len(layers), dropout, dropout > 0, directions == 2, False)
    )
    return output.flatten(0, 1), h_n, c_n


def run_padded(
    rows: Tensor,
    layout: PackedLayout,
    weights: Sequence[LayerWeights],
    h_0: Tensor,
    c_0: Tensor,
) -> LayerOutput:
    """All directions of one layer over a padded batch.

    Args:
        rows: ``[T * B, I]``; 16-bit ones are computed in float32 and rounded at the output.
        layout: in which every sequence has all the rows; of them ``layout.padding`` are padding.
        weights: of each direction, without projections.
        h_0: ``[D, B, H]``; zeros where there is padding and D is 2.
        c_0: ``[D, B, H]``, likewise.

    Returns:
        See :class:`LayerOutput`; outputs in the padding are zero, and ``c`` is None.
    """
    dtype, wide = rows.dtype, compute_dtype(rows.dtype)
    rows, h_0, c_0 = rows.to(wide), h_0.to(wide), c_0.to(wide)
    weights = [direction.to(wide) for direction in weights]
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
    found = side_by_side(outputs), torch.stack(h_finals), torch.stack(c_finals)
    h, h_n, c_n = (tensor.to(dtype) for tensor in found)
    return LayerOutput(h, h_n, c_n, None)


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
