"""A dense batch, every sequence with all T steps: one call of torch's own LSTM for all layers.

torch differentiates the call, and its backward too, so double backward needs nothing here.

Limits: those of onednn.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.recurrence import flatten_weights
from fastrnn.reference import LayerWeights


class DenseOutput(NamedTuple):
    """What torch's LSTM computes.

    Attributes:
        output: shaped as the input, ``D * H`` features.
        h_n: ``[L * D, B, H]``.
        c_n: ``[L * D, B, H]``.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor


def can_run_dense(x: Tensor, dtype: torch.dtype, layers: Sequence[Sequence[LayerWeights]]) -> bool:
    """Whether torch's LSTM computes a padded batch right where oneDNN runs it.

    Args:
        x: the input.
        dtype: to compute in, autocast's where it is on.
        layers: the weights of each layer's directions, without projections.
    """
    return (
        x.dtype == dtype == torch.float32
        and x.numel() > 0
        # oneDNN takes strided weights for contiguous ones.
        and all(w is None or w.is_contiguous() for layer in layers for d in layer for w in d)
    )


def run_dense(
    x: Tensor,
    layers: Sequence[Sequence[LayerWeights]],
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_first: bool,
    dropout: float,
) -> DenseOutput:
    """All layers by torch's own LSTM.

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``, for which :func:`can_run_dense`.
        layers: the weights of each layer's directions, without projections.
        h_0: ``[L * D, B, H]``. None: zeros.
        c_0: ``[L * D, B, H]``. None: zeros.
        batch_first: see ``x``.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.
    """
    directions = len(layers[0])
    if h_0 is None or c_0 is None:  # always both
        batch = x.shape[0 if batch_first else 1]
        h_0 = c_0 = x.new_zeros(len(layers) * directions, batch, layers[0][0].hidden_size)
    flat = [weight for layer in layers for weight in flatten_weights(layer)]
    bias = layers[0][0].bias_ih is not None
    return DenseOutput(
        *torch.lstm(
            *(x, (h_0, c_0), flat, bias, len(layers), dropout, dropout > 0),
            *(directions == 2, batch_first),
        )
    )
