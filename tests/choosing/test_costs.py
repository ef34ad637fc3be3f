"""What the models of the paths' costs promise, whatever was fitted."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrnn.choosing import costs
from fastrnn.choosing.costs import PATHS, costs_of
from tests.oracle import every_processor

every_mode = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


@every_processor
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_costs_are_not_negative_and_grow_with_the_weights(train, dtype, capability):
    for small, large in zip(costs_of(12, 64, train, 2, dtype), costs_of(256, 512, train, 2, dtype)):
        assert all(0 <= smaller <= larger for smaller, larger in zip(small, large))
        assert 0 < small.row < large.row


@every_processor
@every_mode
def test_many_threads_cost_no_more_than_two_and_a_row_is_not_for_nothing(train, capability):
    for two, many in zip(*(costs_of(64, 128, train, n, torch.float32) for n in (2, 64))):
        assert all(after <= before for before, after in zip(two, many))
        assert two.row / 64 < many.row


@every_processor
@every_mode
def test_a_packed_batch_costs_no_more(train, capability):
    found = costs_of(12, 64, train, 1, torch.float32)
    assert 0 < found.packed.seconds(20, 100) <= found.loop.seconds(20, 100)
    assert found.packed.layer < found.loop.layer


def test_every_fit_is_there():
    kinds = {kind for kind, _, _ in costs._FITS}
    assert kinds == {"AVX2", "AVX512", "bfloat16"}
    for kind, path, train in itertools.product(kinds, PATHS, (False, True)):
        assert (kind, path, train) in costs._FITS
