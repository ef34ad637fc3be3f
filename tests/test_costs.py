"""What the models of the paths' costs promise, whatever was fitted."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrnn import costs
from fastrnn.costs import PATHS, layer_costs, step_loop_seconds

PROCESSORS = {"AVX2": "AVX2", "AVX512": "AVX512", "another": "NEON"}
every_processor = pytest.mark.parametrize(
    "capability", PROCESSORS.values(), ids=PROCESSORS, indirect=True
)
every_mode = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


@pytest.fixture
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    layer_costs.cache_clear()
    yield request.param
    layer_costs.cache_clear()


@every_processor
@every_mode
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_costs_are_not_negative_and_grow_with_the_weights(path, train, dtype, capability):
    options = {"train": train, "threads": 2, "dtype": dtype}
    small, large = (layer_costs(path, *size, **options) for size in ((12, 64), (256, 512)))
    for smaller, larger in zip(small, large):
        assert 0 <= smaller <= larger
    assert 0 < small.row < large.row


@every_processor
@every_mode
def test_many_threads_cost_no_more_than_two_and_a_row_is_not_for_nothing(train, capability):
    for path in PATHS:
        two, many = (layer_costs(path, 64, 128, train=train, threads=n) for n in (2, 64))
        assert all(after <= before for before, after in zip(two, many))
        assert two.row / 64 < many.row


def test_a_packed_batch_is_cheaper_and_never_for_nothing():
    sizes = (100, 20, 12, 64)
    for train in (False, True):
        moved, packed = (
            step_loop_seconds(*sizes, train=train, threads=1, packed=packed)
            for packed in (False, True)
        )
        assert 0 < packed < moved


def test_every_fit_is_there():
    kinds = {kind for kind, _, _ in costs._FITS}
    assert kinds == {"AVX2", "AVX512", "bfloat16"}
    for kind, path, train in itertools.product(kinds, PATHS, (False, True)):
        assert (kind, path, train) in costs._FITS
