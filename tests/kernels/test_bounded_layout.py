"""The kernels make the layout that torch's operations make, of lengths, mask and resets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.input.device_layout import bounded_layout
from fastrnn.input.forms import Padded
from fastrnn.input.packing import PackedLayout, ragged_layout
from fastrnn_kernels import bounded_layout as kernels
from fastrnn_kernels import trust
from fastrnn_kernels.launch import CannotLaunch
from tests.interpreter import RandomOrder, cooperative
from tests.kernels.launches import on_kernels
from tests.oracle import answer, assert_agree, everything, make_state, padded, valid_steps

pytestmark = pytest.mark.interpreter

B, T = 5, 9
LENGTHS = [4, 0, 9, 9, 1]


def flags(seed: int, share: float) -> Tensor:
    """``[B, T]``; the first sequence has none set."""
    found = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share
    found[0] = False
    return found


def form(batch_first: bool, batch: int = B, steps: int = T) -> Padded:
    return Padded(torch.zeros((batch, steps, 1) if batch_first else (steps, batch, 1)), batch_first)


def by_kernels(
    given: Padded, lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None
) -> PackedLayout:
    # Two blocks of steps, and of sequences and rows, at these sizes.
    with mock.patch.object(kernels, "BLOCK", 8), cooperative(RandomOrder(1)):
        layout = bounded_layout(given, lengths, mask, resets)
    assert layout is not None
    return layout


def sequences(layout: PackedLayout) -> Iterator[tuple[object, ...]]:
    """Of every sequence whose steps it is: owner, places in the input, where states enter."""
    assert layout.owner is not None and layout.gather is not None
    sizes, gather = layout.batch_sizes.tolist(), layout.gather.tolist()
    offsets = [0, *itertools.accumulate(sizes)]
    for rank in range(layout.sequences):
        places = [
            gather[offset + rank]
            for offset, size in zip(offsets, sizes, strict=False)
            if size > rank
        ]
        enters = (True, True) if layout.enters is None else tuple(layout.enters[:, rank].tolist())
        if places:
            yield int(layout.owner[rank]), places, enters


def ends(layout: PackedLayout) -> list[list[object]]:
    """For each batch element and direction, whose sequence its final state is of."""
    assert layout.leaves is not None and layout.owner is not None
    steps = (layout.batch_sizes.unsqueeze(1) > torch.arange(layout.sequences)).sum(0)
    found = []
    for leaves in layout.leaves:
        assert layout.owner[leaves].tolist() == list(range(B))
        entered = [True] * B if layout.enters is None else layout.enters[:, leaves].T.tolist()
        found.append([*zip(steps[leaves].tolist(), entered, strict=True)])
    return found


CASES = {
    "lengths": (True, None, None),
    "mask": (False, 0.6, None),
    "full-mask": (False, 1.0, None),
    "resets": (False, None, 0.3),
    "no-resets": (False, None, 0.0),
    "all-resets": (True, None, 1.0),
    "lengths-and-mask": (True, 0.6, None),
    "lengths-mask-and-resets": (True, 0.6, 0.4),
    "mask-and-resets": (False, 0.5, 0.5),
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sequences_and_ends(
    case: tuple[bool, float | None, float | None], seed: int, batch_first: bool
) -> None:
    has_lengths, mask_share, reset_share = case
    lengths = torch.tensor(LENGTHS) if has_lengths else None
    mask = None if mask_share is None else flags(seed, mask_share)
    resets = None if reset_share is None else flags(seed + 10, reset_share)
    given = form(batch_first)
    found = by_kernels(given, lengths, mask, resets)
    as_given = [f if f is None or batch_first else f.t() for f in (mask, resets)]
    expected = ragged_layout(given, lengths, *as_given)
    assert isinstance(expected, PackedLayout)

    used = int(expected.batch_sizes.sum())
    sizes = found.batch_sizes[: len(expected.batch_sizes)]
    assert torch.equal(sizes, expected.batch_sizes)
    assert not found.batch_sizes[len(sizes) :].any()
    assert torch.equal(found.steps_on(torch.device("cpu")).offsets, sum_before(found.batch_sizes))
    assert list(sequences(found)) == list(sequences(expected))
    assert ends(found) == ends(expected)
    back = found.there_and_back
    assert back is not None
    assert back.valid.flatten().tolist() == [True] * used + [False] * (B * T - used)
    rows = [B * T - 1] * (B * T)
    for row, place in enumerate(back.gather[:used].tolist()):
        rows[place] = row
    assert back.spread.tolist() == rows
    assert ((back.gather >= 0) & (back.gather < B * T)).all()


def sum_before(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


@pytest.mark.parametrize("wrong", [[4, 10, 9, 9, 1], [4, -1, 9, 9, 1]], ids=["long", "negative"])
@pytest.mark.parametrize("form_of", ["lengths", "mask", "resets"])
def test_a_length_that_does_not_fit_is_seen_where_the_lengths_are(
    wrong: list[int], form_of: str
) -> None:
    mask = flags(1, 0.6) if form_of == "mask" else None
    resets = flags(1, 0.3) if form_of == "resets" else None
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, T\]"):
        by_kernels(form(True), torch.tensor(wrong), mask, resets)


def test_where_its_kernels_are_refused_there_is_none_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = mock.Mock(side_effect=CannotLaunch("no C compiler"))
    monkeypatch.setattr(kernels, "launching", refusing)
    trust.forget()
    for _ in range(3):
        assert bounded_layout(form(True), torch.tensor(LENGTHS), None, None) is None
    trust.forget()
    assert refusing.call_count == 1
    assert caplog.text.count("no C compiler") == 1


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 20), (20, 1)])
def test_a_single_step_or_sequence(batch: int, steps: int) -> None:
    resets = torch.ones(batch, steps, dtype=torch.bool)
    layout = by_kernels(form(True, batch, steps), None, None, resets)
    assert layout.batch_sizes.tolist() == [batch * steps] + [0] * (steps - 1)


def test_outputs_and_gradients_are_those_of_the_answer() -> None:
    """Through a whole module: NaN in the padding reaches nothing."""
    torch.manual_seed(0)
    lstm = fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True, backend="triton")
    x, hx = torch.randn(T, B, 3), make_state(lstm, B)
    mask, resets = flags(1, 0.6).t(), flags(2, 0.3).t()
    valid = valid_steps(LENGTHS, T) & mask
    x.masked_fill_(~valid.unsqueeze(2), float("nan"))

    def on_device(form: Padded, *_: object, **options: object) -> PackedLayout | None:
        return bounded_layout(form, torch.tensor(LENGTHS), mask.t(), resets.t())

    def call(lstm, x, hx):
        return padded(lstm, x, hx, lengths=LENGTHS, mask=mask, resets=resets)

    with on_kernels("split"), mock.patch("fastrnn.compute.ragged_layout", on_device):
        found = everything(call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid, resets=resets))
