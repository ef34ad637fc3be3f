"""A call computed by the way that was chosen: from the input's form to the same form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.choosing.choose import Choice
from fastrnn.choosing.request import Request
from fastrnn.input.forms import Packed, Padded
from fastrnn.input.packing import Layout, PackedLayout, PaddedLayout, ragged_layout
from fastrnn.stack import layers_of, run_stack
from fastrnn.ways import torch_lstm
from fastrnn.ways.dense import run_dense
from fastrnn.ways.padded import run_padded
from fastrnn.ways.recurrence import outside_autocast
from fastrnn.ways.torch_lstm import DenseOutput

Sequences: TypeAlias = Tensor | PackedSequence


class Computed(NamedTuple):
    """What a call computes.

    Attributes:
        h_n: ``[L * D, B, P]``.
        c_n: ``[L * D, B, H]``.
        sequences: the output in the form of the input, and the cell states where asked for.
    """

    h_n: Tensor
    c_n: Tensor
    sequences: Sequence[Sequences]


def compute(asked: Request, choice: Choice) -> Computed:
    """Run a call by the way that was chosen for it."""
    form = asked.form
    if choice.way == "dense":
        return _dense(run_dense(*_batch(asked), asked.stack, batch_first=not form.time_major))
    if choice.way == "torch":
        return _by_torch(asked)
    if choice.way == "padded":
        return _padded(asked, choice.layout)
    return _by_rows(asked, choice)


def _batch(asked: Request) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
    return asked.form.data, asked.flat, asked.h_0, asked.c_0


def _dense(found: DenseOutput) -> Computed:
    return Computed(found.h_n, found.c_n, [found.output])


def _by_torch(asked: Request) -> Computed:
    """A dense batch as it stands, or else its rows."""
    form, train = asked.form, asked.needs_grad
    if isinstance(form, Padded) and not asked.ragged:
        x = form.data if form.data.dtype == asked.dtype else form.data.to(asked.dtype)
        states = asked.flat, asked.h_0, asked.c_0
        batch_first = not form.time_major
        return _dense(
            torch_lstm.run_dense(x, *states, asked.stack, batch_first=batch_first, train=train)
        )
    layout = _rows_on_host(asked)
    if layout.rows == 0:  # torch knows no batch without a step
        return _by_rows(asked, Choice("loop", "there is no valid step", layout))
    rows = form.rows(layout).to(asked.dtype)
    h_0, c_0 = (_enter(layout, state, asked.stack.directions) for state in (asked.h_0, asked.c_0))
    found = torch_lstm.run_rows(rows, layout, asked.flat, h_0, c_0, asked.stack, train=train)
    h_n, c_n = (_leave(layout, state, asked.stack.directions) for state in (found.h_n, found.c_n))
    return Computed(h_n, c_n, [form.restore(found.output, layout)])


def _rows_on_host(asked: Request) -> PackedLayout:
    """The exact layout; on a device that holds the lengths, this waits for it."""
    form = asked.form
    if isinstance(form, Packed) and not asked.ragged:
        layout = form.layout()
    else:
        layout = ragged_layout(form, asked.lengths, asked.mask, asked.resets, wait=True)
    assert isinstance(layout, PackedLayout)  # nobody asked for it to be cut
    return layout


def _enter(layout: Layout, states: Tensor | None, directions: int) -> Tensor | None:
    """Initial states of all layers, ``[L * D, B, F]``, to those of the sequences."""
    if states is None or layout.owner is None:
        return states
    return torch.cat([layout.enter(part) for part in states.split(directions)])


def _leave(layout: Layout, states: Tensor, directions: int) -> Tensor:
    """Final states of all layers, ``[L * D, S, F]``, to those of the batch."""
    if layout.leaves is None:
        return states
    return torch.cat([layout.leave(part) for part in states.split(directions)])


def _padded(asked: Request, layout: Layout | PaddedLayout | None) -> Computed:
    """A padded batch as it stands; ``layout`` is None where nothing is padding."""
    assert layout is None or isinstance(layout, PaddedLayout)
    form, stack = asked.form, asked.stack
    with outside_autocast(form.device):
        return _dense(
            run_padded(
                form.data,
                layout,
                layers_of(asked.flat, asked.dtype, stack),
                asked.h_0,
                asked.c_0,
                batch_first=not form.time_major,
                dropout=stack.dropout,
            )
        )


def _by_rows(asked: Request, choice: Choice) -> Computed:
    """Layer by layer, over rows."""
    form, layout = asked.form, choice.layout
    if layout is None:
        if asked.ragged:
            layout = ragged_layout(form, asked.lengths, asked.mask, asked.resets)
        else:
            layout = form.layout()
    assert isinstance(layout, Layout)
    result = run_stack(
        form.rows(layout).to(asked.dtype),
        layout,
        layers_of(asked.flat, asked.dtype, asked.stack),
        asked.h_0,
        asked.c_0,
        dropout=asked.stack.dropout,
        cell_states=asked.cell_states,
        backend=choice.backend,
        memory=asked.memory,
    )
    rows = [result.rows] if result.c is None else [result.rows, result.c]
    return Computed(result.h_n, result.c_n, [form.restore(part, layout) for part in rows])
