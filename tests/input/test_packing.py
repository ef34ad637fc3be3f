"""A layout has a row for each valid step, in PackedSequence's order, and for nothing else."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from fastrnn.input.forms import Jagged, Packed, Padded
from fastrnn.input.packing import (
    PackedLayout,
    Rectangle,
    RectangleLayout,
    common_steps,
    dense_layout,
    padded_layout,
    ragged_layout,
)
from tests.oracle import LENGTHS, mixed_lengths, valid_steps

B, T = 4, 6


class Sequence(NamedTuple):
    """Steps that share a state, by their places in the flattened input, and where it is from."""

    owner: int
    places: tuple[int, ...]
    enters: tuple[bool, bool]


def read(layout):
    """The sequences a layout describes; rows are counted off step by step as a kernel would."""
    owner = range(layout.sequences) if layout.owner is None else layout.owner.tolist()
    gather = list(range(layout.rows)) if layout.gather is None else layout.gather.tolist()
    enters = [[True] * layout.sequences] * 2 if layout.enters is None else layout.enters.tolist()
    places = [[] for _ in owner]
    row = 0
    for size in layout.batch_sizes.tolist():
        for sequence in range(size):
            places[sequence].append(gather[row])
            row += 1
    return [
        Sequence(owner[s], tuple(places[s]), (enters[0][s], enters[1][s]))
        for s in range(layout.sequences)
    ]


def ends(layout):
    """The places of the sequence whose end state is each batch element's, forward and reverse."""
    sequences = read(layout)
    leaves = [list(range(layout.sequences))] if layout.leaves is None else layout.leaves.tolist()
    forward, reverse = leaves[0], leaves[-1]
    assert [sequences[s].owner for s in (*forward, *reverse)] == [*range(len(forward))] * 2
    return [[sequences[s].places for s in which] for which in (forward, reverse)]


def expected(valid, resets, place):
    """The sequences of ``[B, T]`` valid steps cut before resets, and which end each element."""
    sequences, last, first = [], [], []
    for b in range(len(valid)):
        segments, pending = [], False
        keeps_initial = True
        for t in range(len(valid[b])):
            pending = pending or (resets is not None and resets[b][t])
            if not valid[b][t]:
                continue
            if not segments:
                segments.append([])
                keeps_initial = not pending
            elif pending:
                segments.append([])
            segments[-1].append(place(t, b))
            pending = False
        segments = segments or [[]]
        for k, segment in enumerate(segments):
            enters = (k == 0 and keeps_initial, k == len(segments) - 1)
            sequences.append(Sequence(b, tuple(segment), enters))
        last.append(tuple(segments[-1]))
        first.append(tuple(segments[0]))
    return sequences, [last, first]


def unused(sequence):
    """A bounded layout has slots that stand for no sequence."""
    return not sequence.places and not any(sequence.enters)


def check(layout, valid, resets, place):
    sequences, final = expected(valid, resets, place)
    found = read(layout)
    assert sorted(s for s in found if not unused(s)) == sorted(s for s in sequences)
    assert ends(layout) == final
    sizes = layout.batch_sizes.tolist()
    assert sizes == sorted(sizes, reverse=True)


def bounded_layout(*args, **kwargs):
    """As under torch.compile: nothing depends on a value."""
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        return ragged_layout(*args, **kwargs)


def pairs_of_steps(sizes):
    """Rectangles of two steps, one sequence wider than they need be, and beyond the last step."""
    return [
        Rectangle(first, first + 2, min(sizes[first] + 1, sizes[0]))
        for first in range(0, len(sizes), 2)
    ]


def cut_layout(*args, **kwargs):
    """Cut into rectangles; given back as the packed layout of its valid rows."""
    layout = ragged_layout(*args, **kwargs, cut=pairs_of_steps)
    if not isinstance(layout, RectangleLayout):  # no step is valid
        assert layout.rows == 0
        return layout
    check_rectangles(layout)
    return PackedLayout(
        layout.valid_rows.shape[0],
        layout.sequences,
        torch.tensor(layout.sizes),
        layout.gather[layout.valid_rows],
        layout.owner,
        layout.enters,
        layout.leaves,
    )


def check_rectangles(layout):
    """Rows, places and steps of a cut layout belong to one another."""
    slots = sum((last - first) * sequences for first, last, sequences in layout.rectangles)
    assert layout.rows == slots + 1
    rows = range(layout.rows)
    padding = (~layout.valid.squeeze(1)).nonzero().squeeze(1).tolist()
    assert sorted([*layout.valid_rows.tolist(), *padding]) == list(rows)
    assert padding[-1] == slots
    assert layout.has_padding == (len(padding) > 1)
    where = {(int(layout.step[r]), int(layout.sequence[r])): r for r in layout.valid_rows.tolist()}
    lengths = layout.lengths.tolist()
    assert sorted(where) == sorted((t, s) for s, n in enumerate(lengths) for t in range(n))
    back = layout.spread.tolist()
    assert all(back[layout.gather[row]] == row for row in layout.valid_rows.tolist())
    assert back.count(slots) == len(back) - len(where)
    assert layout.last.tolist() == [where[n - 1, s] for s, n in enumerate(lengths) if n]
    opposite = {row: where[lengths[s] - 1 - t, s] for (t, s), row in where.items()}
    assert layout.mirror.tolist() == [opposite.get(row, row) for row in rows]


REGIMES = {"exact": ragged_layout, "bounded": bounded_layout, "cut": cut_layout}
every_regime = pytest.mark.parametrize("make", REGIMES.values(), ids=REGIMES)
every_order = pytest.mark.parametrize(
    "batch_first", [False, True], ids=["time-major", "batch-first"]
)


def padded_form(batch, steps, batch_first=False):
    """A padded form, and where it keeps a step."""
    shape = (batch, steps, 3) if batch_first else (steps, batch, 3)

    def place(t, b):
        return b * steps + t if batch_first else t * batch + b

    return Padded(torch.zeros(shape), batch_first), place


def as_given(flags, batch_first):
    """``[B, T]`` flags as a user gives them."""
    flags = torch.tensor(flags, dtype=torch.bool)
    return flags if batch_first else flags.t()


def random_flags(probability, batch=B, steps=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, steps, generator=generator) < probability).tolist()


# --- which rows there are ------------------------------------------------------------------------


@every_regime
@every_order
@pytest.mark.parametrize("lengths_of", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (4, 6), (63, 3), (2, 65)])
def test_lengths_give_the_leading_steps(make, batch_first, lengths_of, batch, steps):
    form, place = padded_form(batch, steps, batch_first)
    lengths = lengths_of(batch, steps)
    check(make(form, lengths), valid_steps(lengths, steps).t().tolist(), None, place)


MASKS = {
    "holes": random_flags(0.6),
    "left-padding": [[t >= b for t in range(T)] for b in range(B)],
    "all": [[True] * T] * B,
    "nothing": [[False] * T] * B,
    "one-row-empty": [[False] * T, *random_flags(0.6, B - 1)],
    "only-the-last-step": [[t == T - 1 for t in range(T)]] * B,
}
RESETS = {
    "none": None,
    "some": random_flags(0.3, seed=1),
    "all": [[True] * T] * B,
    "never": [[False] * T] * B,
    "first-step": [[t == 0 for t in range(T)]] * B,
    "last-step": [[t == T - 1 for t in range(T)]] * B,
}


@every_regime
@every_order
@pytest.mark.parametrize("resets", RESETS.values(), ids=[f"resets-{name}" for name in RESETS])
@pytest.mark.parametrize("mask", MASKS.values(), ids=[f"mask-{name}" for name in MASKS])
@pytest.mark.parametrize("lengths", [None, [6, 0, 3, 5]], ids=["no-lengths", "lengths"])
def test_lengths_mask_and_resets_together(make, batch_first, lengths, mask, resets):
    form, place = padded_form(B, T, batch_first)
    valid = torch.tensor(mask)
    if lengths is not None:
        valid &= valid_steps(lengths, T).t()
    given_resets = None if resets is None else as_given(resets, batch_first)
    layout = make(form, lengths, as_given(mask, batch_first), given_resets)
    check(layout, valid.tolist(), resets, place)


@every_regime
@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
def test_resets_without_a_mask(make, resets):
    form, place = padded_form(B, T)
    layout = make(form, resets=None if resets is None else as_given(resets, False))
    check(layout, [[True] * T] * B, resets, place)


@st.composite
def ragged_batches(draw):
    batch, steps = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    flags = st.lists(
        st.lists(st.booleans(), min_size=steps, max_size=steps), min_size=batch, max_size=batch
    )
    return draw(flags), draw(st.none() | flags)


@every_regime
@given(batch=ragged_batches())
def test_any_mask_with_any_resets(make, batch):
    mask, resets = batch
    form, place = padded_form(len(mask), len(mask[0]))
    given_resets = None if resets is None else as_given(resets, False)
    check(make(form, mask=as_given(mask, False), resets=given_resets), mask, resets, place)


@every_regime
@pytest.mark.parametrize("resets", [None, random_flags(0.4, seed=2)], ids=["", "resets"])
def test_a_packed_sequence_with_a_mask(make, resets):
    """Mask and resets are in the order of the user's batch, not in that of the packed rows."""
    lengths, mask = [3, 6, 1, 6], random_flags(0.7)
    packed = pack_padded_sequence(torch.zeros(T, B, 3), lengths, enforce_sorted=False)
    numbers = torch.arange(T * B).view(T, B, 1)
    numbers = pack_padded_sequence(numbers, lengths, enforce_sorted=False).data.flatten().tolist()
    valid = torch.tensor(mask) & valid_steps(lengths, T).t()
    given_resets = None if resets is None else as_given(resets, False)
    layout = make(Packed(packed, False), None, as_given(mask, False), given_resets)
    check(layout, valid.tolist(), resets, lambda t, b: numbers.index(t * B + b))


@every_regime
@pytest.mark.parametrize("resets", [None, random_flags(0.4, seed=2)], ids=["", "resets"])
def test_a_jagged_tensor_with_a_mask(make, resets):
    lengths, mask = [3, 0, 6, 2], random_flags(0.7)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    jagged = torch.nested.nested_tensor_from_jagged(torch.zeros(sum(lengths), 3), offsets)
    valid = torch.tensor(mask) & valid_steps(lengths, T).t()
    given_resets = None if resets is None else as_given(resets, True)
    layout = make(Jagged(jagged), None, as_given(mask, True), given_resets)
    check(layout, valid.tolist(), resets, lambda t, b: int(offsets[b]) + t)


def test_without_anything_said_every_step_is_valid():
    form, place = padded_form(B, T)
    check(dense_layout(T, B), [[True] * T] * B, None, place)
    check(ragged_layout(form), [[True] * T] * B, None, place)


@every_regime
@pytest.mark.parametrize("what", ["lengths", "mask", "resets"])
def test_an_empty_batch_has_no_rows(make, what):
    form, _ = padded_form(0, T)
    given = [] if what == "lengths" else torch.zeros(T, 0, dtype=torch.bool)
    layout = make(form, **{what: given})
    assert (layout.rows, layout.sequences) == (0, 0)
    assert layout.batch_sizes.sum() == 0


# --- exact and bounded ---------------------------------------------------------------------------


def test_an_exact_layout_has_no_more_rows_than_valid_steps():
    form, _ = padded_form(B, T)
    layout = ragged_layout(form, [3, 0, 2, 1])
    assert layout.exact
    assert (layout.rows, layout.batch_sizes.tolist()) == (6, [3, 2, 1])


@pytest.mark.parametrize("resets", [None, RESETS["some"]], ids=["", "resets"])
def test_a_bounded_layouts_shapes_depend_on_no_value(resets):
    form, _ = padded_form(B, T)
    given = {} if resets is None else {"resets": as_given(resets, False)}
    shapes = set()
    for lengths in ([3, 0, 2, 1], [6, 6, 6, 6], [0, 0, 0, 0]):
        layout = bounded_layout(form, lengths, **given)
        assert not layout.exact
        tensors = (layout.batch_sizes, layout.gather, layout.owner, layout.enters, layout.leaves)
        shapes.add(tuple(None if t is None else tuple(t.shape) for t in tensors))
        assert layout.rows == B * T
    assert len(shapes) == 1


def test_an_unused_row_of_a_bounded_layout_points_past_the_input():
    form, _ = padded_form(B, T)
    layout = bounded_layout(form, [3, 0, 2, 1])
    assert layout.gather[6:].tolist() == [B * T] * (B * T - 6)


@pytest.mark.parametrize("what", ["lengths", "mask", "resets", "all"])
def test_nothing_waits_for_an_accelerator(what):
    """Tensors on meta have no values: what asks for one, where a GPU would have to wait, fails."""
    form = Padded(torch.zeros(T, B, 3, device="meta"), False)
    flags = torch.ones(T, B, dtype=torch.bool, device="meta")
    lengths = torch.ones(B, dtype=torch.int64, device="meta")
    given = {"lengths": lengths, "mask": flags, "resets": flags}
    layout = ragged_layout(form, **(given if what == "all" else {what: given[what]}))
    assert not layout.exact
    assert layout.gather.device.type == "meta"


def test_lengths_on_the_host_give_an_accelerator_an_exact_layout():
    form = Padded(torch.zeros(T, B, 3, device="meta"), False)
    layout = ragged_layout(form, [3, 0, 2, 1])
    assert layout.exact
    assert layout.rows == 6
    assert (layout.batch_sizes.device.type, layout.gather.device.type) == ("cpu", "meta")


# --- shapes that come again ---------------------------------------------------------------------


@given(st.integers(1, 100_000))
def test_rounding_steps_up_adds_less_than_2_percent(steps):
    assert steps <= common_steps(steps) <= 1.02 * steps
    assert common_steps(common_steps(steps)) == common_steps(steps)


def test_batches_of_many_lengths_have_few_shapes():
    """oneDNN keeps 0.2 MiB of code for each."""
    assert len({common_steps(steps) for steps in range(50, 1600)}) < 300
    shapes = {
        padded_layout(steps, torch.tensor([steps, 7])).valid.shape for steps in range(100, 150)
    }
    assert len(shapes) == 26


# --- states enter and leave ----------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2], ids=["one-layer", "two-layers"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
def test_states_enter_and_leave_where_the_layout_says(layers, directions):
    form, _ = padded_form(B, T)
    layout = ragged_layout(form, [3, 0, 6, 2], resets=as_given(RESETS["some"], False))
    initial = torch.randn(layers * directions, B, 3)
    states = layout.enter(initial, directions)
    final = torch.randn(layers * directions, layout.sequences, 3)
    batch = layout.leave(final, directions)
    for index in range(layers * directions):
        direction = index % directions
        for s, sequence in enumerate(read(layout)):
            entered = initial[index, sequence.owner]
            wanted = entered if sequence.enters[direction] else torch.zeros(3)
            assert torch.equal(states[index, s], wanted)
        assert torch.equal(batch[index], final[index, layout.leaves[direction]])


def test_nan_in_an_initial_state_that_enters_nowhere_stays_out():
    form, _ = padded_form(B, T)
    layout = ragged_layout(form, resets=as_given(RESETS["first-step"], False))
    initial = torch.full((1, B, 3), float("nan"), requires_grad=True)
    states = layout.enter(initial, 1)
    states.sum().backward()
    assert (states == 0).all()
    assert (initial.grad == 0).all()


# --- mistakes ------------------------------------------------------------------------------------

form_4_6, _ = padded_form(B, T)
batch_first_4_6, _ = padded_form(B, T, batch_first=True)
flags_6_4 = torch.ones(T, B, dtype=torch.bool)
MISTAKES = {
    "one-too-few": (
        {"lengths": [1, 2, 3]},
        ValueError,
        "lengths must have shape [4] (one per sequence), got [3]",
    ),
    "two-dimensional": (
        {"lengths": torch.ones(4, 1, dtype=torch.int64)},
        ValueError,
        "lengths must have shape [4] (one per sequence), got [4, 1]",
    ),
    "float-tensor": (
        {"lengths": torch.ones(4)},
        TypeError,
        "lengths must be integers, got torch.float32",
    ),
    "float-list": (
        {"lengths": [1.0, 2.0, 3.0, 4.0]},
        TypeError,
        "lengths must be integers, one per sequence, got [1.0, 2.0, 3.0, 4.0]",
    ),
    "a-number": (
        {"lengths": 4},
        TypeError,
        "lengths must be integers, one per sequence, got 4; for a batch of equal lengths use "
        "[4] * 4",
    ),
    "letters": (
        {"lengths": "abcd"},
        TypeError,
        "lengths must be integers, one per sequence, got 'abcd'",
    ),
    "rows-of-different-length": (
        {"lengths": [[1], [2, 3]]},
        TypeError,
        "lengths must be integers, one per sequence, got [[1], [2, 3]]",
    ),
    "bool-tensor": (
        {"lengths": torch.ones(4, dtype=torch.bool)},
        TypeError,
        "lengths must be integers, got torch.bool",
    ),
    "negative-list": (
        {"lengths": [1, 2, -3, 4]},
        ValueError,
        "lengths must not be negative, got -3",
    ),
    "negative-tensor": (
        {"lengths": torch.tensor([1, 2, -3, 4])},
        ValueError,
        "lengths must not be negative, got -3",
    ),
    "too-long-list": (
        {"lengths": [1, 7, 3, 4]},
        ValueError,
        "lengths must be at most the 6 steps of the input, got 7; "
        "pad the input to the longest sequence",
    ),
    "too-long-tensor": (
        {"lengths": torch.tensor([1, 7, 3, 4])},
        ValueError,
        "lengths must be at most the 6 steps of the input, got 7; "
        "pad the input to the longest sequence",
    ),
    "mask-of-numbers": (
        {"mask": torch.ones(T, B)},
        TypeError,
        "mask must have dtype torch.bool, got torch.float32; use mask.bool()",
    ),
    "mask-as-a-list": (
        {"mask": [[True] * B] * T},
        TypeError,
        "mask must be a bool tensor, got list",
    ),
    "mask-batch-first": (
        {"mask": flags_6_4.t()},
        ValueError,
        "mask must have shape [6, 4] ([T, B], as batch_first says), got [4, 6]",
    ),
    "mask-one-dimensional": (
        {"mask": flags_6_4[0]},
        ValueError,
        "mask must have shape [6, 4] ([T, B], as batch_first says), got [4]",
    ),
    "resets-of-numbers": (
        {"resets": torch.ones(T, B, dtype=torch.int64)},
        TypeError,
        "resets must have dtype torch.bool, got torch.int64; use resets.bool()",
    ),
    "resets-too-short": (
        {"resets": flags_6_4[1:]},
        ValueError,
        "resets must have shape [6, 4] ([T, B], as batch_first says), got [5, 4]",
    ),
}


@pytest.mark.parametrize(("given", "kind", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(given, kind, words):
    with pytest.raises(kind) as error:
        ragged_layout(form_4_6, **given)
    assert str(error.value) == words


def test_a_time_major_mask_for_a_batch_first_input_is_named():
    with pytest.raises(ValueError) as error:
        ragged_layout(batch_first_4_6, mask=flags_6_4)
    assert str(error.value) == (
        "mask must have shape [4, 6] ([B, T], as batch_first says), got [6, 4]"
    )


@pytest.mark.parametrize("lengths", [[1, 7, 3, 4], [1, -1, 3, 4]], ids=["too-long", "negative"])
def test_a_bounded_layout_checks_lengths_where_the_data_are(lengths):
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, T\]"):
        bounded_layout(form_4_6, torch.tensor(lengths))


def test_lengths_are_not_changed():
    lengths = torch.tensor(mixed_lengths(B, T), dtype=torch.int32)
    before = lengths.clone()
    ragged_layout(form_4_6, lengths)
    assert torch.equal(lengths, before)


@pytest.mark.parametrize(
    "layout",
    [dense_layout(3, 4), PackedLayout(6, 3, torch.tensor([3, 2, 1]))],
    ids=["dense", "ragged"],
)
def test_the_steps_are_put_on_a_device_once(layout):
    meta = layout.steps_on(torch.device("meta"))
    assert {part.device.type for part in meta} == {"meta"}
    assert layout.steps_on(torch.device("meta")) is meta
    sizes, offsets = layout.steps_on(torch.device("cpu"))
    assert torch.equal(sizes, layout.batch_sizes)
    assert offsets.tolist() == [sum(sizes[:step].tolist()) for step in range(3)]
