"""ONNX's LSTM: what ``torch.onnx.export`` finds in a graph where it exports one.

One ``LSTM`` node a layer, with ``sequence_lens`` where lengths are given, for any number of steps
and sequences. Its outputs past a sequence's end are zeros by ONNX's own rule, and its reverse
direction starts at each sequence's end, so a ragged batch needs nothing more.

Limits: no projection, no holes, no resets, no cell-state sequence: ONNX has no words for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import LayerWeights
from fastrnn.ways.torch_lstm import DenseOutput


def run_onnx(
    x: Tensor,
    lengths: Tensor | None,
    layers: Sequence[Sequence[LayerWeights]],
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    batch_first: bool,
    dropout: float,
) -> DenseOutput:
    """All layers over a padded batch, as nodes of a graph to be exported.

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``.
        lengths: ``[B]``, the steps of each sequence that are valid. None: all.
        layers: the weights of each layer's directions, without projections.
        h_0: ``[L * D, B, H]``. None: zeros.
        c_0: ``[L * D, B, H]``. None: zeros.
        batch_first: see ``x``.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.
    """
    x = x.transpose(0, 1) if batch_first else x
    directions, hidden_size = len(layers[0]), layers[0][0].hidden_size
    h_n, c_n = [], []
    for index, weights in enumerate(layers):
        if index and dropout:
            x = functional.dropout(x, dropout, training=True)
        states = slice(index * directions, (index + 1) * directions)
        zeros = x.new_zeros(directions, x.shape[1], hidden_size)
        initial = (zeros if h_0 is None else h_0[states], zeros if c_0 is None else c_0[states])
        x, *final = _run_layer(x, lengths, weights, *initial)
        if lengths is not None:  # of a sequence without a step ONNX does not say what is left
            empty = (lengths == 0).view(1, -1, 1)
            final = [torch.where(empty, *pair) for pair in zip(initial, final, strict=True)]
        h_n.append(final[0])
        c_n.append(final[1])
    output = x.transpose(0, 1) if batch_first else x
    return DenseOutput(output, torch.cat(h_n), torch.cat(c_n))


def _run_layer(
    x: Tensor, lengths: Tensor | None, weights: Sequence[LayerWeights], h_0: Tensor, c_0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[T, B, D * H]`` and final states ``[D, B, H]`` of one layer."""
    (steps, batch, _), (directions, _, hidden_size) = x.shape, h_0.shape
    biases = [
        torch.cat([_reordered(own.bias_ih), _reordered(own.bias_hh)])
        for own in weights
        if own.bias_ih is not None and own.bias_hh is not None
    ]
    output, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (
            x,
            torch.stack([_reordered(own.ih) for own in weights]),
            torch.stack([_reordered(own.hh) for own in weights]),
            torch.stack(biases) if biases else None,
            None if lengths is None else lengths.to(torch.int32),
            h_0,
            c_0,
        ),
        {
            "hidden_size": hidden_size,
            "direction": "bidirectional" if directions == 2 else "forward",
        },
        dtypes=(x.dtype,) * 3,
        shapes=((steps, directions, batch, hidden_size), h_0.shape, c_0.shape),
    )
    return output.transpose(1, 2).flatten(2), h_n, c_n


def _reordered(weight: Tensor) -> Tensor:
    """``[4H, ...]`` from torch's order of gates, i f g o, to ONNX's, i o f g."""
    size = weight.shape[0] // 4
    return torch.cat([weight[:size], weight[3 * size :], weight[size : 3 * size]])
