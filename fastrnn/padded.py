"""One layer over a padded batch as it stands, where its padding costs less than moving rows.

Every direction is one call of oneDNN's operator over all T * B rows: the carry feature of onednn.py
keeps the cell states of sequences that end early exact, zeros replace the input's padding, and
outputs of padded steps are zero.

In the dtypes of onednn.py. torch differentiates the operator, and its backward too, so double
backward runs the same operations once more.

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
only; with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import onednn
from fastrnn.packing import PaddedLayout
from fastrnn.recurrence import (
    LayerOutput,
    OutputGradients,
    flatten_weights,
    layer_gradients,
    layer_output,
    run,
    unflatten_weights,
)
from fastrnn.reference import Forward, Gradients, LayerWeights, compute_dtype


class InPadding(NamedTuple):
    """The path of recurrence.py over the rows of a :class:`PaddedLayout`.

    Saved: what oneDNN's operator computed, its workspace among it. oneDNN uses that as scratch, so
    two threads must not run backward on one retained graph at once.

    Attributes:
        layout: of the batch.
        bias: whether there are biases.
    """

    layout: PaddedLayout
    bias: bool

    def forward(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
    ) -> tuple[LayerOutput, list[Tensor]]:
        """See :class:`fastrnn.recurrence.Path`."""
        dtype = rows.dtype
        rows, h_0, c_0, *flat = onednn.to_compute(rows, h_0, c_0, *flat)
        return self._run(rows, h_0, c_0, flat, dtype, save=save)

    def _run(
        self,
        rows: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        flat: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        save: bool,
    ) -> tuple[LayerOutput, list[Tensor]]:
        """Operations that torch can differentiate; what the operator computed is not changed."""
        layout, saved = self.layout, []
        x = _input(rows, layout)
        h_0, c_0 = h_0.contiguous(), c_0.contiguous()
        runs = []
        for index, direction in enumerate(
            unflatten_weights(flat, h_0.shape[0], bias=self.bias, projection=False)
        ):
            operands = onednn.operands(direction, carry=layout.padding is not None)
            inputs = (x, operands, h_0[index], c_0[index])
            output, h_n, c_n, workspace = onednn.dense_forward(
                *inputs, reverse=index == 1, save=save
            )
            if workspace is not None:
                saved += [output, h_n, c_n, workspace]
            h = output.view(-1, h_n.shape[1])
            if layout.padding is not None and layout.last is not None:
                h = h.index_fill(0, layout.padding, 0.0)
                if index == 0:  # the last step may be padding
                    h_n = h.index_select(0, layout.last)
            elif save:
                h = h.clone()  # which the caller may change; the operator's own is kept
            runs.append(Forward(h, h_n, c_n, None, ()))
        return layer_output(runs, dtype), saved

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
        """See :class:`fastrnn.recurrence.Path`."""
        layout, dtype, features = self.layout, rows.dtype, rows.shape[1]
        grads = onednn.gradients_to_compute(grads)
        rows, h_0, c_0, *flat = onednn.to_compute(rows, h_0, c_0, *flat)
        x = _input(rows, layout)
        h_0, c_0 = h_0.contiguous(), c_0.contiguous()
        weights, width = (
            unflatten_weights(flat, h_0.shape[0], bias=self.bias, projection=False),
            c_0.shape[2],
        )
        results = []
        for index, direction in enumerate(weights):
            output, h_n, c_n, workspace = saved[4 * index : 4 * index + 4]
            operands = onednn.operands(direction, carry=layout.padding is not None)
            d_h_n = None if grads.h_n is None else grads.h_n[index]
            if grads.h is None:
                d_h = output.new_zeros(rows.shape[0], width)
            else:
                d_h = grads.h[:, index * width : (index + 1) * width].contiguous()
                if layout.padding is not None:
                    d_h = d_h.index_fill(0, layout.padding, 0.0)
            if layout.last is not None and index == 0 and d_h_n is not None:
                d_h = d_h.index_add(0, layout.last, d_h_n)
                d_h_n = None
            d_x, d_weights, d_h_0, d_c_0 = onednn.dense_backward(
                d_h.view(output.shape),
                h_n.new_zeros(h_n.shape) if d_h_n is None else d_h_n.contiguous(),
                c_n.new_zeros(c_n.shape) if grads.c_n is None else grads.c_n[index].contiguous(),
                *(x, operands, h_0[index], c_0[index], output, h_n, c_n, workspace),
                reverse=index == 1,
            )
            d_rows = d_x.view(rows.shape[0], -1)
            if layout.padding is not None:  # without the carry feature's
                d_rows = d_rows[:, :features].index_fill(0, layout.padding, 0.0)
            results.append(
                Gradients(d_rows, d_h_0, d_c_0, onednn.weight_gradients(d_weights, direction))
            )
        return layer_gradients(results, weights, dtype, needs)

    def composite(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> LayerOutput:
        """See :class:`fastrnn.recurrence.Path`."""
        dtype, wide = rows.dtype, compute_dtype(rows.dtype)
        rows, h_0, c_0, *flat = (tensor.to(wide) for tensor in (rows, h_0, c_0, *flat))
        return self._run(rows, h_0, c_0, flat, dtype, save=True)[0]


def _input(rows: Tensor, layout: PaddedLayout) -> Tensor:
    """``[T, B, I]``, contiguous; without what stands in the padding, and with the carry feature."""
    if layout.padding is not None and layout.carry is not None:
        rows = rows.index_fill(0, layout.padding, 0.0)
        rows = torch.cat([rows, layout.carry.to(rows.dtype)], 1)
    return rows.contiguous().view(-1, layout.sequences, rows.shape[1])


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
    path = InPadding(layout, weights[0].bias_ih is not None)
    return run(path, rows, h_0, c_0, flatten_weights(weights))
