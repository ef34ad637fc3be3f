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

from fastrnn.choosing import costs
from fastrnn.choosing.costs import Costs
from fastrnn.input.arguments import Lengths, known_lengths
from fastrnn.input.forms import Form, Packed, Padded
from fastrnn.input.packing import (
    Layout,
    PaddedLayout,
    Rectangle,
    padded_layout,
    ragged_layout,
    staircase,
)
from fastrnn.ways import onednn
from fastrnn.ways.rectangles import least_seconds, plan

# What a row that rectangles would leave out counts in training besides its time, in rows: it is
# kept for backward as a valid one is.
KEPT_ROW = 0.5


class Work(NamedTuple):
    """What oneDNN is to do.

    Attributes:
        input_size: I, of the first layer.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        dtype: that it computes in.
        weights: of all layers and directions; padding is for those with which it is exact.
    """

    input_size: int
    hidden_size: int
    train: bool
    dtype: torch.dtype
    weights: Sequence[Tensor] = ()

    def cut(self, sizes: tuple[int, ...], *, packed: bool = False) -> Sequence[Rectangle] | None:
        """Where to cut a batch with so many sequences active at each step; None: pack it.

        Args:
            sizes: of each step.
            packed: whether the input is packed as it comes. Default: False.
        """
        models = self._costs()
        found = plan(sizes, models.rectangles)
        loop = (models.packed if packed else models.loop).seconds(len(sizes), sum(sizes))
        if found.seconds > loop:
            return None
        has_padding = found.rows > sum(sizes)
        return None if has_padding and not onednn.can_carry(self.weights) else found.rectangles

    def pad(self, steps: int, lengths: Sequence[int]) -> bool:
        """Whether a padded batch of so many steps and these lengths is best run as it stands."""
        valid, rows = sum(lengths), steps * len(lengths)
        models, kept = self._costs(), KEPT_ROW if self.train else 0.0
        if models.padded.seconds(steps, rows) > models.loop.seconds(max(lengths), valid):
            return False
        at_most = models.padded.seconds(steps, rows + kept * (rows - valid))
        if at_most <= least_seconds(lengths, models.rectangles):
            return True
        found = plan(tuple(staircase(sorted(lengths, reverse=True))), models.rectangles)
        return models.padded.seconds(steps, rows + kept * (rows - found.rows)) <= found.seconds

    def _costs(self) -> Costs:
        threads = torch.get_num_threads()
        return costs.costs_of(self.input_size, self.hidden_size, self.train, threads, self.dtype)


def arrange(
    form: Form,
    lengths: Lengths | int | None,
    mask: Tensor | None,
    resets: Tensor | None,
    work: Work | None,
    *,
    may_pad: bool = False,
) -> Layout | PaddedLayout | None:
    """The layout of a batch.

    Args:
        form: the input's form.
        lengths: as in :func:`fastrnn.input.packing.ragged_layout`, and so are the next two.
        mask: see there.
        resets: see there.
        work: what oneDNN is to do; None where it cannot.
        may_pad: whether a padded batch may run as it stands. Default: False.

    Returns:
        The layout that is the fastest by the models; None for a batch that may run as it stands and
        has no padding.
    """
    cut = None if work is None else work.cut
    if lengths is None and mask is None and resets is None:
        if work is not None and isinstance(form, Packed):
            cut = functools.partial(work.cut, packed=True)
        return form.layout(cut)
    if may_pad and work is not None and isinstance(form, Padded) and lengths is not None:
        on_host = not isinstance(lengths, Tensor) or lengths.is_cpu
        if on_host and mask is None and resets is None:
            known = known_lengths(lengths, form.batch, form.steps, exact=True)
            values = known.values or []
            least = min(values, default=0)
            if least == form.steps:
                return None
            # None may be zero: its last valid step would be none.
            can_pad = least > 0 and work.pad(form.steps, values)
            if can_pad and onednn.can_carry(work.weights):
                return padded_layout(form.steps, known.tensor)
            return ragged_layout(form, known, cut=cut)
    return ragged_layout(form, lengths, mask, resets, cut=cut)
