"""Which arrangement of a batch is chosen, whatever was fitted."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn.choosing import arrange, costs
from fastrnn.choosing.arrange import KEPT_ROW, Work
from fastrnn.input.forms import Padded
from fastrnn.input.packing import staircase
from fastrnn.ways.rectangles import plan
from tests.oracle import every_processor

SMALL, LARGE = (12, 64), (256, 512)
every_mode = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@pytest.fixture(params=[1, 2, 16], autouse=True)
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@every_processor
@every_mode
@every_dtype
def test_padding_is_left_where_there_is_little_and_not_where_it_is_everything(
    train, dtype, capability
):
    assert Work(*SMALL, train, dtype).pad(50, [50] * 7 + [49])
    assert not Work(*LARGE, train, dtype).pad(400, [400] + [1] * 511)


@every_mode
def test_a_batch_without_padding_is_left_as_it_is(train):
    form = Padded(torch.randn(8, 50, 12), batch_first=True)
    work = Work(*SMALL, train, torch.float32)
    assert arrange.arrange(form, [50] * 8, None, None, work, may_pad=True) is None


@every_mode
@every_dtype
def test_more_padding_never_makes_it_worth_more(train, dtype):
    work = Work(64, 128, train, dtype)
    worth = [work.pad(400, [400] + [length] * 31) for length in range(399, 0, -10)]
    assert all(before >= after for before, after in itertools.pairwise(worth))
    assert not worth[-1]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    beyond=st.integers(0, 9),
    size=st.sampled_from([SMALL, (64, 128), LARGE]),
    train=st.booleans(),
)
def test_padding_is_left_where_it_costs_less_than_the_best_rectangles_and_the_loop(
    lengths, beyond, size, train
):
    """Also where it says so without a plan."""
    models = costs.costs_of(*size, train, torch.get_num_threads(), torch.float32)
    steps, valid = max(lengths) + beyond, sum(lengths)
    rows, kept = steps * len(lengths), KEPT_ROW if train else 0.0
    found = plan(tuple(staircase(sorted(lengths, reverse=True))), models.rectangles)
    expected = (
        models.padded.seconds(steps, rows) <= models.loop.seconds(max(lengths), valid)
        and models.padded.seconds(steps, rows + kept * (rows - found.rows)) <= found.seconds
    )
    assert Work(*size, train, torch.float32).pad(steps, lengths) == expected


@every_mode
def test_a_small_batch_is_left_padded_without_a_plan(train):
    """Which takes as long as the padding: 2 us a place."""
    with mock.patch.object(arrange, "plan", side_effect=AssertionError):
        assert Work(*SMALL, train, torch.float32).pad(50, [50, 44, 37, 31, 25, 19, 12, 6])
