"""How a batch's rows are arranged, by what will compute them fastest.

On a GPU, under ``torch.compile``, and for what oneDNN does not know: packed, valid steps alone. On
the CPU by the models of costs.py: the padded batch as it stands, where little is padding; slots of
rectangles for oneDNN; or packed, for the step loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import costs
from fastrnn.forms import Form, Packed, Padded
from fastrnn.packing import (
    Layout,
    Lengths,
    Rectangle,
    check_lengths,
    padded_layout,
    ragged_layout,
)
from fastrnn.rectangles import plan


class Work(NamedTuple):
    """What oneDNN is to do.

    Attributes:
        input_size: I, of the first layer.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        packed: whether the input is packed as it comes.
        may_pad: whether the padded batch may run as it stands.
    """

    input_size: int
    hidden_size: int
    train: bool
    may_pad: bool
    packed: bool = False

    def cut(self, sizes: tuple[int, ...]) -> Sequence[Rectangle] | None:
        """Where to cut a batch with so many sequences active at each step; None: pack it."""
        shape, threads = (self.input_size, self.hidden_size), torch.get_num_threads()
        cost = costs.rectangle_costs(*shape, train=self.train, threads=threads)
        found = plan(sizes, cost)
        loop = costs.step_loop_seconds(
            sizes, *shape, train=self.train, threads=threads, packed=self.packed
        )
        return found.rectangles if found.seconds <= loop else None

    def worth_padding(self, padded_rows: int) -> bool:
        """Whether computing so many padded steps costs less than leaving them out."""
        shape, threads = (self.input_size, self.hidden_size), torch.get_num_threads()
        return costs.worth_padding(padded_rows, *shape, train=self.train, threads=threads)


def arrange(
    form: Form,
    lengths: Lengths | None,
    mask: Tensor | None,
    resets: Tensor | None,
    work: Work | None,
) -> Layout:
    """The layout of a batch.

    Args:
        form: the input's form.
        lengths: as in :func:`fastrnn.packing.ragged_layout`, and so are the next two.
        mask: see there.
        resets: see there.
        work: what oneDNN is to do; None where it cannot.

    Returns:
        The layout that is the fastest by the models.
    """
    cut = None if work is None else work.cut
    if mask is None and resets is None:
        if lengths is None:
            if work is not None and isinstance(form, Packed):
                cut = work._replace(packed=True).cut
            return form.layout(cut)
        on_host = not (isinstance(lengths, Tensor) and not lengths.is_cpu)
        if work is not None and work.may_pad and on_host and isinstance(form, Padded):
            lengths = check_lengths(lengths, form.batch, form.steps, exact=True)
            values = lengths.tolist()
            if values and min(values) > 0 and work.worth_padding(form.entries - sum(values)):
                return padded_layout(form.steps, form.batch, lengths)
    return ragged_layout(form, lengths, mask, resets, cut=cut)
