"""Layers upon layers: every layer's rows are the next one's input, with dropout between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import LayerWeights
from fastrnn.input.packing import Layout, RectangleLayout
from fastrnn.layer import lstm_layer
from fastrnn.ways.recurrence import Memory, unflatten_weights
from fastrnn.ways.torch_lstm import Stack


class StackOutput(NamedTuple):
    """What a stack of L layers computes.

    Attributes:
        rows: ``[N, D * P]`` outputs of the last layer.
        h_n: ``[L * D, B, P]``.
        c_n: ``[L * D, B, H]``.
        c: ``[N, D * H]`` cell states of the last layer, or None.
    """

    rows: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None


def run_stack(
    rows: Tensor,
    layout: Layout,
    layers: Sequence[Sequence[LayerWeights]],
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    dropout: float = 0.0,
    cell_states: bool = False,
    backend: str = "auto",
    memory: Memory = "save",
) -> StackOutput:
    """All layers over packed rows.

    Args:
        rows: ``[N, I]``.
        layout: of the batch.
        layers: the weights of each layer's directions, in the dtype of ``rows``.
        h_0: ``[L * D, B, P]`` in the batch's order, as nn.LSTM numbers layers and directions.
            None: zeros.
        c_0: ``[L * D, B, H]``, likewise.
        dropout: probability that an entry of a layer's output is zeroed before the next layer.
        cell_states: return the last layer's cell states.
        backend: see backends.py.
        memory: see :func:`fastrnn.layer.lstm_layer`.

    Returns:
        See :class:`StackOutput`.
    """
    directions = len(layers[0])
    h_width, c_width = _widths(layers[0])
    c_zeros = rows.new_zeros(directions, layout.sequences, c_width)
    h_zeros = c_zeros
    if h_width != c_width:
        h_zeros = rows.new_zeros(directions, layout.sequences, h_width)
    # Once for all layers, and split in one node of the graph: its derivative is one as well.
    initial = [
        [zeros] * len(layers)
        if states is None
        else layout.enter(states, directions).split(directions)
        for states, zeros in ((h_0, h_zeros), (c_0, c_zeros))
    ]
    h_n, c_n = [], []
    c = None
    for index, weights in enumerate(layers):
        if index and dropout:
            rows = _dropout(rows, layout, dropout)
        output = lstm_layer(
            rows,
            layout,
            weights,
            initial[0][index],
            initial[1][index],
            cell_states=cell_states and index == len(layers) - 1,
            backend=backend,
            memory=memory,
        )
        rows, c = output.h, output.c
        h_n.append(output.h_n)
        c_n.append(output.c_n)
    return StackOutput(
        rows,
        layout.leave(_concatenate(h_n), directions),
        layout.leave(_concatenate(c_n), directions),
        c,
    )


def layers_of(flat: Sequence[Tensor], dtype: torch.dtype, stack: Stack) -> list[list[LayerWeights]]:
    """All weights in ``dtype``, by layer and direction."""
    if flat[0].dtype != dtype:
        flat = [weight.to(dtype) for weight in flat]
    directions = stack.directions
    each = unflatten_weights(
        *(flat, stack.num_layers * directions), bias=stack.bias, projection=stack.projection
    )
    return [each[begin : begin + directions] for begin in range(0, len(each), directions)]


def _dropout(rows: Tensor, layout: Layout, probability: float) -> Tensor:
    """Dropout of the valid rows, whose draws are nn.LSTM's for packed sequences."""
    if not isinstance(layout, RectangleLayout):
        return functional.dropout(rows, probability, training=True)
    scale = rows.new_ones(layout.valid_rows.shape[0], rows.shape[1])
    scale = functional.dropout(scale, probability, training=True)
    return rows * rows.new_zeros(rows.shape).index_copy_(0, layout.valid_rows, scale)


def _widths(layer: Sequence[LayerWeights]) -> tuple[int, int]:
    """P and H."""
    return layer[0].hh.shape[1], layer[0].hidden_size


def _concatenate(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)
