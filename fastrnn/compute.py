"""A call computed by the way that was chosen: from the input's form to the same form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn.choosing.choose import Choice
from fastrnn.choosing.describe import log_path, logs_paths
from fastrnn.choosing.request import Request
from fastrnn.input.arguments import check_lengths
from fastrnn.input.device_layout import bounded_layout
from fastrnn.input.forms import Packed, Padded, callers_own
from fastrnn.input.packing import Layout, PackedLayout, PaddedLayout, ragged_layout
from fastrnn.stack import layers_of, run_stack
from fastrnn.ways import torch_lstm
from fastrnn.ways.dense import run_dense
from fastrnn.ways.onnx_lstm import run_onnx
from fastrnn.ways.padded import run_padded
from fastrnn.ways.recurrence import outside_autocast
from fastrnn.ways.torch_lstm import DenseOutput, Stack

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
    if logs_paths():
        log_path(asked, choice)
    if not asked.autocast:
        return _compute(asked, choice)
    with outside_autocast(asked.form.device):  # the input gets its dtype here
        return _compute(asked, choice)


def _compute(asked: Request, choice: Choice) -> Computed:
    # ExpandedWeights know no oneDNN, which computes a dense batch and no rows.
    if choice.way in ("cell", "dense", "torch") and asked.dense and not asked.own_class:
        return _dense(asked, choice.way)
    if choice.way == "torch":
        return _torch_rows(asked)
    if choice.way == "onnx":
        return _onnx(asked)
    if choice.way == "padded":
        return _padded(asked, choice.layout)
    return _by_rows(asked, choice)


def run_dense_by(
    way: str,
    x: Tensor,
    flat: list[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    stack: Stack,
    batch_first: bool,
    train: bool,
) -> DenseOutput:
    """All layers over a dense batch, by an operator of torch's: "cell", "dense" or "torch"."""
    if way == "dense":
        found = run_dense(x, flat, h_0, c_0, stack, batch_first=batch_first)
        return found._replace(output=callers_own(found.output))
    if way == "torch":
        return torch_lstm.run_dense(x, flat, h_0, c_0, stack, batch_first=batch_first, train=train)
    dim = 1 if batch_first else 0
    found = torch_lstm.run_step(x.squeeze(dim), flat, h_0, c_0, stack)
    return found._replace(output=found.output.unsqueeze(dim))


def _dense(asked: Request, way: str) -> Computed:
    """All layers in one call; a PackedSequence of equal lengths is a dense batch too."""
    form, stack, h_0, c_0 = asked.form, asked.stack, asked.h_0, asked.c_0
    x, batch_first, layout = form.data, not form.time_major, None
    if isinstance(form, Packed):
        layout = form.layout()
        h_0, c_0 = _enter(layout, h_0, stack), _enter(layout, c_0, stack)
        x, batch_first = x.view(form.steps, form.batch, x.shape[1]), False
    if x.dtype != asked.dtype:
        x = x.to(asked.dtype)
    output, h_n, c_n = run_dense_by(
        way, x, asked.flat, h_0, c_0, stack, batch_first, asked.needs_grad
    )
    if layout is None:
        return Computed(h_n, c_n, [output])
    h_n, c_n = layout.leave(h_n, stack.directions), layout.leave(c_n, stack.directions)
    rows = output.flatten(0, 1)
    if way == "dense" and isinstance(form, Packed):  # a copy already, which restore would repeat
        return Computed(h_n, c_n, [PackedSequence(rows, *form.x[1:])])
    return Computed(h_n, c_n, [form.restore(rows, layout)])


def _torch_rows(asked: Request) -> Computed:
    form, stack = asked.form, asked.stack
    if (lengths := _for_packing(asked)) is not None:
        return _packed_by_torch(asked, lengths)
    layout = _rows_on_host(asked)
    if layout.rows == 0:  # torch knows no batch without a step
        return _by_rows(asked, Choice("loop", "there is no valid step", layout))
    rows = form.rows(layout)
    found = torch_lstm.run_rows(
        rows if rows.dtype == asked.dtype else rows.to(asked.dtype),
        layout,
        asked.flat,
        _enter(layout, asked.h_0, stack),
        _enter(layout, asked.c_0, stack),
        stack,
        train=asked.needs_grad,
    )
    h_n, c_n = layout.leave(found.h_n, stack.directions), layout.leave(found.c_n, stack.directions)
    return Computed(h_n, c_n, [form.restore(found.output, layout)])


def _for_packing(asked: Request) -> Tensor | None:
    """The lengths on the host, where they are all that is ragged and none is zero."""
    if asked.lengths is None or asked.mask is not None or asked.resets is not None:
        return None
    if not isinstance(asked.form, Padded):
        return None
    lengths = check_lengths(asked.lengths, asked.form.batch, asked.form.steps, exact=True).cpu()
    return lengths if lengths.numel() and int(lengths.min()) > 0 else None


def _packed_by_torch(asked: Request, lengths: Tensor) -> Computed:
    """By torch's own packing, in C++, which knows lengths alone."""
    form, batch_first = asked.form, not asked.form.time_major
    x = form.data.to(asked.dtype)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    inner = Packed(packed, batch_first)
    found = _torch_rows(asked._replace(form=inner, lengths=None))
    (output,) = found.sequences
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output, batch_first, total_length=form.steps)
    return found._replace(sequences=[padded])


def _rows_on_host(asked: Request) -> PackedLayout:
    """The exact layout; on a device that holds the lengths, this waits for it."""
    form = asked.form
    if isinstance(form, Packed) and not asked.ragged:
        layout = form.layout()
    else:
        layout = ragged_layout(form, asked.lengths, asked.mask, asked.resets, wait=True)
    assert isinstance(layout, PackedLayout)  # nobody asked for it to be cut
    return layout


def _enter(layout: Layout, states: Tensor | None, stack: Stack) -> Tensor | None:
    """Initial states of all layers, ``[L * D, B, F]``, to those of the sequences."""
    return None if states is None else layout.enter(states, stack.directions)


def _padded(asked: Request, layout: Layout | PaddedLayout | None) -> Computed:
    """A padded batch as it stands; ``layout`` is None where nothing is padding."""
    assert layout is None or isinstance(layout, PaddedLayout)
    form, stack = asked.form, asked.stack
    output, h_n, c_n = run_padded(
        form.data,
        layout,
        layers_of(asked.flat, asked.dtype, stack),
        asked.h_0,
        asked.c_0,
        batch_first=not form.time_major,
        dropout=stack.dropout,
    )
    return Computed(h_n, c_n, [output])


def _onnx(asked: Request) -> Computed:
    """A padded batch as nodes of ONNX."""
    form, lengths = asked.form, asked.lengths
    if lengths is not None:
        lengths = check_lengths(lengths, form.batch, form.steps, exact=False)
    found = run_onnx(
        form.data.to(asked.dtype),
        lengths,
        layers_of(asked.flat, asked.dtype, asked.stack),
        asked.h_0,
        asked.c_0,
        batch_first=not form.time_major,
        dropout=asked.stack.dropout,
    )
    return Computed(found.h_n, found.c_n, [found.output])


def _by_rows(asked: Request, choice: Choice) -> Computed:
    """Layer by layer, over rows."""
    form, layout = asked.form, choice.layout
    if layout is None:
        if asked.ragged:
            by_kernels = choice.way == "triton" and isinstance(form, Padded)
            layout = ragged_layout(
                *(form, asked.lengths, asked.mask, asked.resets),
                bounded=bounded_layout if by_kernels else None,
            )
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


def run_once(asked: Request, way: str) -> None:
    """Run a call by a way of a GPU, "torch" or "triton", with a backward pass where one is needed.

    On inputs of its own, so that nobody's gradients change.
    """
    choice = Choice("triton", "", backend="triton") if way == "triton" else Choice("torch", "")
    with torch.set_grad_enabled(asked.needs_grad):
        flat = [weight.detach().requires_grad_(weight.requires_grad) for weight in asked.flat]
        found = compute(asked._replace(flat=flat), choice)
        wanted = [weight for weight in flat if weight.requires_grad]
        if asked.needs_grad and wanted:
            outputs = [found.h_n, found.c_n]
            for part in found.sequences:
                whole = part.data if isinstance(part, PackedSequence) else part
                outputs.append(whole.values() if whole.is_nested else whole)
            torch.autograd.grad([output.sum() for output in outputs], wanted)
