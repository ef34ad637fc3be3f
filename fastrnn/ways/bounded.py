"""A layer in differentiable operations where nobody may look at the sizes of its steps.

The composite of step_loop.py cuts the rows by sizes that the host knows. While a graph is traced,
or where vmap runs over lengths, there are none: here every step computes as many sequences as could
be active, and those that are not keep their states.

Any order of derivative, forward mode and vmap follow. It keeps every step's intermediate results,
and the steps are unrolled: a graph holds some twenty nodes a step, and another length is another
graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import Forward, LayerWeights, composite_step, compute_dtype
from fastrnn.input.packing import Steps
from fastrnn.ways.recurrence import LayerOutput
from fastrnn.ways.step_loop import layer_output


def run_bounded(
    steps: Steps,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[LayerWeights],
    *,
    cell_states: bool,
) -> LayerOutput:
    """All directions of one layer.

    Args:
        steps: of the batch; their sizes are read by tensor operations alone.
        rows: ``[N, I]``; finite past the valid ones.
        h_0: ``[D, S, P]``.
        c_0: ``[D, S, H]``.
        weights: of each direction.
        cell_states: return the cell state of every row.

    Returns:
        See :class:`LayerOutput`; rows past the valid ones are zero.
    """
    dtype = rows.dtype
    wide = compute_dtype(dtype)
    rows, h_0, c_0 = (tensor.to(wide) for tensor in (rows, h_0, c_0))
    results = [
        _run_direction(steps, rows, h_0[index], c_0[index], own.to(wide), reverse=index == 1)
        for index, own in enumerate(weights)
    ]
    return layer_output(results, dtype, cell_states=cell_states)


def _run_direction(
    steps: Steps, rows: Tensor, h_0: Tensor, c_0: Tensor, weights: LayerWeights, *, reverse: bool
) -> Forward:
    count, sequences, length = rows.shape[0], h_0.shape[0], steps.sizes.shape[0]
    gates_x = functional.linear(rows, weights.ih, weights.bias())
    # So many sequences at most have a step t: sorted by length, they share N rows.
    widths = [min(sequences, count // (step + 1)) for step in range(length)]
    h, c = (h_0[: widths[-1]], c_0[: widths[-1]]) if reverse else (h_0, c_0)
    ended, h_steps, c_steps, places = [], [], [], []
    for step in range(length - 1, -1, -1) if reverse else range(length):
        width, known = widths[step], h.shape[0]
        if width > known:  # in reverse sequences join, with their initial states
            h, c = torch.cat([h, h_0[known:width]]), torch.cat([c, c_0[known:width]])
        elif width < known:
            ended.append((h[width:], c[width:]))
            h, c = h[:width], c[:width]
        sequence = torch.arange(width, device=rows.device)
        active, row = sequence < steps.sizes[step], steps.offsets[step] + sequence
        places.append(torch.where(active, row, count))
        active = active.unsqueeze(1)
        gates = gates_x.index_select(0, row.clamp(max=count - 1))
        # Zeros where no sequence is active: the row is another's there, and may hold NaN.
        gates = torch.where(active, gates + functional.linear(h, weights.hh), 0.0)
        h_t, c_t = composite_step(gates, c, weights.hr)
        h, c = torch.where(active, h_t, h), torch.where(active, c_t, c)
        h_steps.append(h)
        c_steps.append(c)
    if reverse:
        ended.append((h_0[h.shape[0] :], c_0[h.shape[0] :]))
    h_n, c_n = (torch.cat(parts) for parts in zip((h, c), *reversed(ended), strict=True))
    place = torch.cat(places)
    return Forward(_of_rows(h_steps, place, count), h_n, c_n, _of_rows(c_steps, place, count), ())


def _of_rows(steps: Sequence[Tensor], place: Tensor, count: int) -> Tensor:
    """``[N, F]`` of what every step computed; zeros past the valid rows."""
    states = torch.cat(list(steps))
    # Sequences that were not active go to a row that is cut off again.
    return states.new_zeros(count + 1, states.shape[1]).index_copy(0, place, states)[:count]
