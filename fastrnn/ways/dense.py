"""A dense batch, every sequence with all T steps: one call of torch's own LSTM for all layers.

Where one layer in one direction is all, of the operator that it calls. Or for one layer, where the
batch comes as rows.

torch differentiates the call, and its backward too, so double backward needs nothing here.

Limits: those of onednn.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.cells.lstm import LayerWeights
from fastrnn.ways import onednn, torch_lstm
from fastrnn.ways.recurrence import LayerOutput
from fastrnn.ways.torch_lstm import DenseOutput, Stack


def can_run_dense(x: Tensor, dtype: torch.dtype, flat: list[Tensor]) -> bool:
    """Whether torch's LSTM computes a padded batch right where oneDNN runs it.

    Args:
        x: the input.
        dtype: to compute in, autocast's where it is on.
        flat: the weights of all layers and directions, without projections.
    """
    return (
        x.dtype == dtype == onednn.compute_dtype(dtype)
        and x.numel() > 0
        # oneDNN takes strided weights for contiguous ones.
        and all(weight.is_contiguous() for weight in flat)
    )


def run_dense(
    x: Tensor,
    flat: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    stack: Stack,
    *,
    batch_first: bool = False,
) -> DenseOutput:
    """All layers by torch's own LSTM.

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``, for which :func:`can_run_dense`.
        flat: the weights of all layers and directions, without projections.
        h_0: ``[L * D, B, H]``. None: zeros.
        c_0: ``[L * D, B, H]``. None: zeros.
        stack: the layers.
        batch_first: see ``x``. Default: False.
    """
    plain = stack.num_layers == 1 and stack.bias and not stack.bidirectional
    if not plain or any(weight.dtype != x.dtype for weight in flat):
        return torch_lstm.run_dense(x, flat, h_0, c_0, stack, batch_first=batch_first)
    if h_0 is None or c_0 is None:  # always both
        h_0 = c_0 = x.new_zeros(1, x.shape[0 if batch_first else 1], flat[1].shape[1])
    return _run_one(x, flat, h_0.contiguous(), c_0.contiguous(), batch_first)


def _run_one(
    x: Tensor, flat: list[Tensor], h_0: Tensor, c_0: Tensor, batch_first: bool
) -> DenseOutput:
    """What torch.lstm does for one layer in one direction, without its lists of layers.

    The states are contiguous.
    """
    if batch_first:
        x = x.transpose(0, 1)
    x = x.contiguous()
    if torch.is_grad_enabled():  # backward keeps the final states, and its own backward knows 2D
        output, h_n, c_n, _ = onednn.one_layer(x, flat, h_0[0], c_0[0])
        h_n, c_n = h_n.unsqueeze(0).clone(), c_n.unsqueeze(0).clone()
    else:
        output, h_n, c_n, _ = onednn.one_layer(x, flat, h_0, c_0)
    return DenseOutput(output.transpose(0, 1) if batch_first else output, h_n, c_n)


def run_dense_layer(
    x: Tensor,
    weights: Sequence[LayerWeights],
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    carry: bool = False,
) -> DenseOutput:
    """All directions of one layer.

    Args:
        x: ``[T, B, I]``.
        weights: of each direction, without projections, in the dtype of ``x``.
        h_0: ``[D, B, H]``. None: zeros.
        c_0: ``[D, B, H]``. None: zeros.
        carry: whether ``x`` has the carry feature of onednn.py. Default: False.
    """
    return run_dense(
        x,
        [w for direction in weights for w in onednn.operands(direction, carry=carry)],
        h_0,
        c_0,
        Stack(bidirectional=len(weights) == 2),
    )


def run_dense_rows(
    rows: Tensor, sequences: int, weights: Sequence[LayerWeights], h_0: Tensor, c_0: Tensor
) -> LayerOutput:
    """All directions of one layer over the rows of a dense batch.

    Args:
        rows: ``[T * S, I]``, time-major, not empty; 16-bit ones are computed as onednn.py says.
        sequences: S.
        weights: of each direction, without projections.
        h_0: ``[D, S, H]``.
        c_0: ``[D, S, H]``.
    """
    dtype, wide = rows.dtype, onednn.compute_dtype(rows.dtype)
    output, h_n, c_n = run_dense_layer(
        rows.to(wide).reshape(-1, sequences, rows.shape[1]),
        [direction.to(wide) for direction in weights],
        h_0.to(wide),
        c_0.to(wide),
    )
    return LayerOutput(output.flatten(0, 1).to(dtype), h_n.to(dtype), c_n.to(dtype), None)
