"""What must hold for any ragged batch, whatever its sizes, masks and resets."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.oracle import (
    PATHS,
    answer,
    assert_agree,
    assert_identical,
    everything,
    forced,
    make_state,
    padded,
    valid_steps,
)

I, H = 2, 3


class Batch(NamedTuple):
    """A ragged batch, time-major, the LSTM that it goes through, and the path that runs."""

    lstm: fastrnn.LSTM
    x: Tensor
    hx: tuple[Tensor, Tensor]
    mask: Tensor
    resets: Tensor
    path: str

    def run(self, **ragged):
        """All outputs and gradients with these ragged arguments."""
        with forced(self.path):
            return everything(lambda *args: padded(*args, **ragged), self.lstm, self.x, self.hx)


def flags(draw, steps, batch):
    """``[T, B]``, each column of a kind of its own so that extremes are common."""
    column = st.one_of(
        st.just([False] * steps),
        st.just([True] * steps),
        st.lists(st.booleans(), min_size=steps, max_size=steps),
    )
    columns = draw(st.lists(column, min_size=batch, max_size=batch))
    return torch.tensor(columns, dtype=torch.bool).t()


@st.composite
def batches(draw, bidirectional=None, layers=None):
    steps, batch = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    lstm = fastrnn.LSTM(
        I,
        H,
        layers or draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()) if bidirectional is None else bidirectional,
        batch_first=draw(st.booleans()),
        proj_size=draw(st.sampled_from([0, 0, 0, 2])),
    )
    x, hx = torch.randn(steps, batch, I), make_state(lstm, batch)
    mask, resets = flags(draw, steps, batch), flags(draw, steps, batch)
    return Batch(lstm, x, hx, mask, resets, draw(st.sampled_from(list(PATHS))))


def lengths_of(batch, mask=None):
    """Some lengths, as many as there are sequences."""
    return (batch.mask if mask is None else mask).sum(0).tolist()


examples = settings(max_examples=60)


@examples
@given(batch=batches())
def test_it_is_the_oracles_answer(batch):
    found = batch.run(mask=batch.mask, resets=batch.resets)
    expected = answer(batch.lstm, batch.x, batch.hx, valid=batch.mask, resets=batch.resets)
    assert_agree(found, expected, tolerance=1e-5)


@examples
@given(batch=batches())
def test_padding_filled_with_nan_changes_nothing(batch):
    clean = batch.run(mask=batch.mask, resets=batch.resets)
    spoiled = torch.where(batch.mask.unsqueeze(2), batch.x, math.nan)
    dirty = batch._replace(x=spoiled).run(mask=batch.mask, resets=batch.resets)
    assert_identical(dirty, clean)


@examples
@given(batch=batches(), order=st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_result(batch, order):
    permutation = list(range(batch.x.shape[1]))
    order.shuffle(permutation)
    with forced(batch.path):
        straight = padded(batch.lstm, *batch[1:3], mask=batch.mask, resets=batch.resets)
        permuted = padded(
            batch.lstm,
            batch.x[:, permutation],
            tuple(state[:, permutation] for state in batch.hx),
            mask=batch.mask[:, permutation],
            resets=batch.resets[:, permutation],
        )
    for value, right in zip(permuted, straight):
        torch.testing.assert_close(value, right[:, permutation], rtol=0, atol=1e-6)


@examples
@given(batch=batches(bidirectional=False), cut=st.integers(0, 7))
def test_split_and_carry_equals_whole(batch, cut):
    """The state goes over, through sequences that end before the cut or start after it."""
    cut = min(cut, len(batch.x))
    first, second = ({"mask": batch.mask[part]} for part in (slice(cut), slice(cut, None)))
    resets = batch.resets.clone()
    if 0 < cut < len(batch.x):  # a reset on a masked step before the cut is known to one part only
        resets[:cut] &= batch.mask[:cut]
    first["resets"], second["resets"] = resets[:cut], resets[cut:]

    def split(lstm, x, hx):
        outputs, state = [], hx
        for part, ragged in ((x[:cut], first), (x[cut:], second)):
            if len(part):
                output, *state = padded(lstm, part, tuple(state), **ragged)
                outputs.append(output)
        return torch.cat(outputs), *state

    whole = batch.run(mask=batch.mask, resets=resets)
    with forced(batch.path):
        parts = everything(split, batch.lstm, batch.x, batch.hx)
    assert_agree(parts, whole, tolerance=1e-5)


@examples
@given(batch=batches())
def test_a_mask_with_holes_equals_the_compacted_sequence(batch):
    steps = len(batch.x)
    order = torch.argsort(~batch.mask, dim=0, stable=True).unsqueeze(2)
    counts = lengths_of(batch)

    def compacted(lstm, x, hx):
        compact = x.take_along_dim(order, 0)
        output, h_n, c_n = padded(lstm, compact, hx, lengths=counts)
        spread = torch.zeros_like(output).scatter(0, order.expand_as(output), output)
        return spread, h_n, c_n

    assert sum(counts) == int(valid_steps(counts, steps).sum())
    with forced(batch.path):
        expected = everything(compacted, batch.lstm, batch.x, batch.hx)
    assert_agree(batch.run(mask=batch.mask), expected, tolerance=1e-5)


@examples
@given(batch=batches(layers=1))
def test_resets_equal_separate_sequences(batch):
    """Each segment alone; the given state goes to the first one forward, to the last in reverse."""
    steps, count = batch.mask.shape
    both = batch.lstm.bidirectional

    def separate(lstm, x, hx):
        size_h, outputs, final = lstm.proj_size or H, [], []
        for b in range(count):
            starts = [0, *(t for t in range(1, steps) if batch.resets[t, b]), steps]
            segments = list(itertools.pairwise(starts))
            ends = []
            for k, (begin, end) in enumerate(segments):
                keeps = [k == 0 and not batch.resets[0, b], k == len(segments) - 1][: 1 + both]
                keeps = torch.tensor(keeps).view(-1, 1, 1)
                state = tuple(torch.where(keeps, state[:, b : b + 1], 0.0) for state in hx)
                ends.append(padded(lstm, x[begin:end, b : b + 1], state))
            outputs.append(torch.cat([output for output, _, _ in ends]))
            last, first = ends[-1], ends[0]
            final.append(
                [torch.cat([last[1][:1], first[1][1:]]), torch.cat([last[2][:1], first[2][1:]])]
            )
            assert outputs[-1].shape == (steps, 1, size_h * (1 + both))
        h_n, c_n = (torch.cat([states[index] for states in final], 1) for index in range(2))
        return torch.cat(outputs, 1), h_n, c_n

    expected = everything(separate, batch.lstm, batch.x, batch.hx)
    assert_agree(batch.run(resets=batch.resets), expected, tolerance=1e-5)


@examples
@given(batch=batches())
def test_lengths_equal_a_packed_sequence(batch):
    lengths = [max(1, length) for length in lengths_of(batch)]

    def packed(lstm, x, hx):
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, states = lstm(rows, hx)
        return pad_packed_sequence(output, total_length=len(x))[0], *states

    with forced(batch.path):
        expected = everything(packed, batch.lstm, batch.x, batch.hx)
    assert_agree(batch.run(lengths=lengths), expected, tolerance=1e-5)


@examples
@given(batch=batches())
def test_lengths_equal_a_mask_and_a_list_equals_a_tensor(batch):
    lengths = lengths_of(batch)
    expected = batch.run(lengths=lengths)
    assert_identical(batch.run(lengths=torch.tensor(lengths)), expected)
    found = batch.run(mask=valid_steps(lengths, len(batch.x)))
    assert_agree(found, expected, tolerance=1e-5)  # one may be packed where the other is not


@examples
@given(batch=batches())
def test_a_mask_of_all_steps_and_resets_at_none_change_nothing(batch):
    everywhere = torch.ones_like(batch.mask)
    plain = batch.run()
    found = batch.run(mask=everywhere, resets=~everywhere)
    assert_agree(found, plain, tolerance=1e-5)


@examples
@given(batch=batches(), appended=st.integers(1, 3))
def test_steps_appended_past_every_length_change_nothing(batch, appended):
    lengths = lengths_of(batch)
    expected = batch.run(lengths=lengths)
    longer = torch.cat([batch.x, torch.randn(appended, *batch.x.shape[1:])])

    def trimmed(lstm, x, hx):
        output, h_n, c_n = padded(lstm, x, hx, lengths=lengths)
        assert (output[len(batch.x) :] == 0).all()
        return output[: len(batch.x)], h_n, c_n

    with forced(batch.path):
        found = everything(trimmed, batch.lstm, longer, batch.hx)
    assert (found["d_x"][len(batch.x) :] == 0).all()
    found["d_x"] = found["d_x"][: len(batch.x)]
    assert_agree(found, expected, tolerance=1e-5)
