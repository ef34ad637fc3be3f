"""How a batch's rows are arranged, by what will compute them fastest.

On a GPU, under ``torch.compile``, and for what oneDNN does not know: packed, valid steps alone. On
the CPU by the models of costs.py: the padded batch as it stands, where little is padding; slots of
rectangles for oneDNN; or packed, for the step loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import costs
from fastrnn.costs import LayerCosts
from fastrnn.forms import Form, Packed, Padded
from fastrnn.packing import (
    Layout,
    Lengths,
    PaddedLayout,
    Rectangle,
    check_lengths,
    padded_layout,
    ragged_layout,
    staircase,
)
from fastrnn.rectangles import least_seconds, plan

# What a padded row of a batch that runs as it stands counts in training, in rows: as much of it is
# kept for backward as of a valid one.
PADDED_ROW = 1.25


class Work(NamedTuple):
    """What oneDNN is to do.

    Attributes:
        input_size: I, of the first layer.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        dtype: that it computes in.
    """

    input_size: int
    hidden_size: int
    train: bool
    dtype: torch.dtype

    def cut(self, sizes: tuple[int, ...], *, packed: bool = False) -> Sequence[Rectangle] | None:
        """Where to cut a batch with so many sequences active at each step; None: pack it.

        Args:
            sizes: of each step.
            packed: whether the input is packed as it comes. Default: False.
        """
        found = plan(sizes, self._rectangle_cost())
        loop = self._step_loop_seconds(sum(sizes), len(sizes), packed=packed)
        return found.rectangles if found.seconds <= loop else None

    def pad(self, steps: int, lengths: Sequence[int]) -> bool:
        """Whether a padded batch of so many steps and these lengths is best run as it stands."""
        valid, rows = sum(lengths), steps * len(lengths)
        if valid == rows:
            return True
        padded = costs.padded_seconds(
            valid + (rows - valid) * (PADDED_ROW if self.train else 1.0),
            *(steps, self.input_size, self.hidden_size),
            train=self.train,
            threads=torch.get_num_threads(),
            dtype=self.dtype,
        )
        if padded > self._step_loop_seconds(valid, max(lengths)):
            return False
        cost = self._rectangle_cost()
        if padded <= least_seconds(lengths, cost):
            return True
        return padded <= plan(tuple(staircase(sorted(lengths, reverse=True))), cost).seconds

    def _rectangle_cost(self) -> LayerCosts:
        return costs.layer_costs(
            *("rectangles", self.input_size, self.hidden_size),
            train=self.train,
            threads=torch.get_num_threads(),
            dtype=self.dtype,
        )

    def _step_loop_seconds(self, rows: int, steps: int, *, packed: bool = False) -> float:
        return costs.step_loop_seconds(
            *(rows, steps, self.input_size, self.hidden_size),
            train=self.train,
            threads=torch.get_num_threads(),
            dtype=self.dtype,
            packed=packed,
        )


def arrange(
    form: Form,
    lengths: Lengths | None,
    mask: Tensor | None,
    resets: Tensor | None,
    work: Work | None,
    *,
    may_pad: bool = False,
) -> Layout | PaddedLayout:
    """The layout of a batch.

    Args:
        form: the input's form.
        lengths: as in :func:`fastrnn.packing.ragged_layout`, and so are the next two.
        mask: see there.
        resets: see there.
        work: what oneDNN is to do; None where it cannot.
        may_pad: whether a padded batch may run as it stands. Default: False.

    Returns:
        The layout that is the fastest by the models.
    """
    cut = None if work is None else work.cut
    if lengths is None and mask is None and resets is None:
        if work is not None and isinstance(form, Packed):
            cut = functools.partial(work.cut, packed=True)
        return form.layout(cut)
    if may_pad and work is not None and isinstance(form, Padded) and lengths is not None:
        on_host = not isinstance(lengths, Tensor) or lengths.is_cpu
        if on_host and mask is None and resets is None:
            lengths = check_lengths(lengths, form.batch, form.steps, exact=True)
            values = lengths.tolist()
            # None may be zero: its last valid step would be none.
            if values and min(values) > 0 and work.pad(form.steps, values):
                full = min(values) == form.steps
                return PaddedLayout() if full else padded_layout(form.steps, lengths)
    return ragged_layout(form, lengths, mask, resets, cut=cut)
