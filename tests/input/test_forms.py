"""A form hands out its valid steps as rows and puts rows back where they came from."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn.input.forms import Jagged, Packed, Padded
from fastrnn.input.packing import ragged_layout
from tests.oracle import valid_steps

B, T, I = 4, 6, 3
LENGTHS = [3, 6, 1, 5]
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6
exact_and_bounded = pytest.mark.parametrize("bounded", [False, True], ids=["exact", "bounded"])


def layout_of(form, bounded, **ragged):
    with mock.patch.object(torch.compiler, "is_compiling", lambda: bounded):
        return ragged_layout(form, **ragged)


@exact_and_bounded
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_padded_there_and_back_keeps_valid_steps_and_zeroes_the_rest(batch_first, bounded):
    x = torch.randn(T, B, I, requires_grad=True)
    form = Padded(x.transpose(0, 1) if batch_first else x, batch_first)
    layout = layout_of(form, bounded, mask=MASK.t() if batch_first else MASK)
    output = form.restore(form.rows(layout) * 2, layout)
    output = output.transpose(0, 1) if batch_first else output
    wanted = torch.where(MASK.unsqueeze(2), x * 2, 0)
    assert torch.equal(output, wanted)
    weight = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(o, x, weight)[0] for o in (output, wanted)))


def test_a_bounded_layouts_unused_rows_reach_no_step():
    form = Padded(torch.randn(T, B, I), False)
    layout = layout_of(form, True, mask=MASK)
    rows = torch.full((layout.rows, I), float("nan"))
    rows[: int(MASK.sum())] = 1.0
    assert torch.equal(form.restore(rows, layout), MASK.unsqueeze(2).expand(T, B, I).float())


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_padded_without_ragged_steps_there_and_back(batch_first):
    x = torch.randn(T, B, I)
    given = x.transpose(0, 1) if batch_first else x
    form = Padded(given, batch_first)
    layout = form.layout()
    rows = form.rows(layout)
    assert torch.equal(rows, x.flatten(0, 1))
    assert torch.equal(form.restore(rows, layout), given)


def test_nothing_of_a_packed_sequence_is_copied():
    packed = pack_padded_sequence(torch.randn(T, B, I), LENGTHS, enforce_sorted=False)
    form = Packed(packed, False)
    layout = form.layout()
    assert form.rows(layout) is packed.data
    output = form.restore(packed.data, layout)
    assert type(output) is PackedSequence
    assert all(mine is theirs for mine, theirs in zip(output, packed))


@exact_and_bounded
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
def test_packed_with_a_mask_there_and_back(enforce_sorted, bounded):
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    form = Packed(packed, False)
    layout = layout_of(form, bounded, mask=MASK)
    output, _ = pad_packed_sequence(form.restore(form.rows(layout), layout), total_length=T)
    valid = (MASK & valid_steps(lengths, T)).unsqueeze(2)
    assert torch.equal(output, torch.where(valid, x, 0))


@exact_and_bounded
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_jagged_there_and_back(masked, bounded):
    lengths = [3, 0, 6, 1]
    x = torch.nested.nested_tensor([torch.randn(n, I) for n in lengths], layout=torch.jagged)
    form = Jagged(x)
    layout = layout_of(form, bounded, mask=MASK.t() if masked else None)
    output = form.restore(form.rows(layout), layout)
    for b, (mine, theirs) in enumerate(zip(output.unbind(), x.unbind())):
        keep = MASK[: lengths[b], b] if masked else torch.ones(lengths[b], dtype=torch.bool)
        assert torch.equal(mine, torch.where(keep.unsqueeze(1), theirs, 0))


def test_a_jagged_tensor_with_gaps_between_its_sequences():
    """With lengths of its own a jagged tensor's values hold more than its sequences."""
    values, offsets = torch.randn(12, I), torch.tensor([0, 5, 9, 12])
    x = torch.nested.nested_tensor_from_jagged(values, offsets, torch.tensor([3, 0, 2]))
    form = Jagged(x)
    layout = form.layout()
    assert sorted(layout.gather.tolist()) == [0, 1, 2, 9, 10]
    output = form.restore(form.rows(layout), layout)
    assert torch.equal(output.values()[:3], values[:3])
    assert (output.values()[3:9] == 0).all()
    assert output.lengths().tolist() == [3, 0, 2]


def packed_of(rows, sizes, *indices):
    return PackedSequence(torch.zeros(rows, I), torch.as_tensor(sizes), *indices)


MALFORMED = {
    "empty": (
        (0, torch.zeros(0, dtype=torch.int64)),
        "a PackedSequence must have a step, got one without batch_sizes",
    ),
    "fewer-rows": (
        (5, [3, 3]),
        r"must have 6 rows \(as many as its batch_sizes add up to\), got 5",
    ),
    "more-rows": ((7, [3, 3]), r"must have 6 rows .* got 7"),
    "growing": ((5, [2, 3]), r"must not grow, nor be negative, got \[2, 3\]"),
    "negative": ((2, [3, -1]), r"must not grow, nor be negative, got \[3, -1\]"),
    "floats": ((6, [3.0, 3.0]), r"must be \[T\] integers, got torch.float32 \[2\]"),
    "two-axes": ((6, [[3, 3]]), r"must be \[T\] integers, got torch.int64 \[1, 2\]"),
    "indices-too-few": (
        (6, [3, 3], torch.tensor([1, 0])),
        r"sorted_indices .* must have shape \[3\] \(as batch_sizes\[0\] says\), got \[2\]",
    ),
    "inverse-too-long": (
        (6, [3, 3], torch.tensor([1, 0, 2]), torch.tensor([1, 0, 2, 3])),
        r"unsorted_indices .* must have shape \[3\] .* got \[4\]",
    ),
}


@pytest.mark.parametrize(("parts", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_packed_sequence_whose_parts_do_not_fit_is_refused_with_the_way_out(parts, words):
    with pytest.raises(ValueError, match=words + ".*; build it with .*pack_padded_sequence"):
        Packed(packed_of(*parts), False)


def test_steps_that_no_sequence_reaches_are_left_out():
    form = Packed(packed_of(6, [3, 3, 0]), False)
    assert form.sizes == (3, 3)
