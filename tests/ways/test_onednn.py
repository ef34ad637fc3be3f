"""Where torch's oneDNN LSTM can run, and where not."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn.ways import onednn
from tests.oracle import (
    PATHS,
    answer,
    assert_within_budget,
    by_packing,
    everything,
    forced,
    make_state,
    padded,
    valid_steps,
    without_onednn,
)

HAS_BFLOAT16 = onednn.multiplies_bfloat16()


@pytest.fixture
def has(request, monkeypatch):
    """Whether the processor is said to multiply bfloat16."""
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: request.param)
    onednn.compute_dtype.cache_clear()
    yield request.param
    onednn.compute_dtype.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_it_runs_float32_rows_on_the_cpu():
    assert onednn.available(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.float16), ("meta", torch.float32)],
    ids=["float64", "float16", "meta"],
)
def test_it_does_not_run(device, dtype):
    assert not onednn.available(torch.device(device), dtype)


def test_it_does_not_run_where_it_is_switched_off():
    with without_onednn():
        assert not onednn.available(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("has", [False, True], ids=["without", "with"], indirect=True)
def test_it_runs_bfloat16_where_the_processor_does(has):
    assert onednn.available(torch.device("cpu"), torch.bfloat16) == has
    assert onednn.compute_dtype(torch.bfloat16) == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 65504.0, 1e30], ids=str)
def test_the_carry_feature_is_not_for_weights_that_outweigh_it(value, name, dtype):
    lstm = fastrnn.LSTM(3, 5, dtype=dtype)
    weights = [weight.detach() for weight in lstm.parameters()]
    assert onednn.can_carry(weights)
    getattr(lstm, name).data.view(-1)[-1] = value
    assert not onednn.can_carry(weights)


def test_the_carry_feature_is_not_for_weights_that_nobody_can_look_at():
    with FakeTensorMode():
        assert not onednn.can_carry(list(fastrnn.LSTM(3, 5).parameters()))


needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="the processor has no bfloat16")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize(
    "has", [False, pytest.param(True, marks=needs_bfloat16)], ids=str, indirect=True
)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "loop"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_bfloat16_is_as_exact_as_nn_lstm(path, has, bidirectional):
    lengths, dtype = [3, 17, 1, 11, 17], torch.bfloat16
    config = {"num_layers": 2, "bidirectional": bidirectional, "dtype": dtype}
    ours, theirs = fastrnn.LSTM(5, 16, **config), torch.nn.LSTM(5, 16, **config)
    theirs.load_state_dict(ours.state_dict())
    x, hx = torch.randn(17, 5, 5, dtype=dtype), make_state(ours, 5)

    def call(lstm, x, hx):
        # With given states both directions of a padded batch are packed: see padded.py.
        with forced(path):
            return padded(lstm, x, None if bidirectional else hx, lengths=lengths)

    def packed(lstm, x, hx):
        return by_packing(lstm, x, None if bidirectional else hx, lengths)

    found, low = everything(call, ours, x, hx), everything(packed, theirs, x, hx)
    assert {value.dtype for value in found.values()} == {dtype}
    if bidirectional:
        hx = tuple(torch.zeros_like(state) for state in hx)
    exact = answer(ours, x, hx, valid=valid_steps(lengths, 17))
    if bidirectional:
        for results in (found, low, exact):
            del results["d_h_0"], results["d_c_0"]
    assert_within_budget(found, low, exact, dtype)
