"""fastrnn.LSTM without data, under the modes that estimate, count and trace."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from tests.oracle import every_path, forced

B, T, I, H = 3, 7, 4, 6
CONFIGURATIONS = {
    "plain": {},
    "2-layers-bidirectional": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "projection": {"proj_size": 2},
    "recompute": {"memory": "recompute"},
    "reference": {"backend": "reference"},
}
every_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
RAGGED = {
    "dense": {},
    "lengths": {"lengths": [7, 5, 2]},
    "empty-sequence": {"lengths": [7, 0, 2]},
    "cells": {"return_cell_states": True},
}
every_ragged = pytest.mark.parametrize("ragged", RAGGED.values(), ids=RAGGED)


def train(config, ragged, device=None):
    """The shapes of the outputs and of a gradient."""
    lstm = fastrnn.LSTM(I, H, device=device, **config)
    x = torch.randn(T, B, I, device=device, dtype=config.get("dtype"), requires_grad=True)
    output, states, *cells = lstm(x, **ragged)
    output.sum().backward()
    return [value.shape for value in (output, *states, *cells, x.grad, lstm.weight_hh_l0.grad)]


@every_path
@every_ragged
@every_configuration
def test_under_a_fake_mode_shapes_are_those_of_a_real_call(config, ragged, path):
    expected = train(config, ragged)
    with forced(path), FakeTensorMode():
        assert train(config, ragged) == expected


@every_ragged
@every_configuration
def test_flops_are_counted_on_meta(config, ragged):
    expected = train(config, ragged)
    with FlopCounterMode(display=False) as counter:
        assert train(config, ragged, "meta") == expected
    assert counter.get_total_flops() > 0


@every_ragged
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("config", [{}, {"dtype": torch.float64}], ids=["float32", "float64"])
def test_make_fx_records_a_training_step(config, mode, ragged):
    lstm, x = fastrnn.LSTM(I, H, **config), torch.randn(T, B, I, **config)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(lstm(x, **ragged)[0].square().sum(), x)[0]

    graph = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    again = torch.randn_like(x)
    torch.testing.assert_close(graph(again), gradient(again), rtol=0, atol=1e-5)


@every_path
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_an_estimate_leaves_later_calls_as_they_were(bidirectional, path):
    """Hidden sizes and steps that no other test has: what is kept between calls is made here."""
    steps, lengths = 11 + bidirectional, torch.tensor([9, 8, 8])
    sizes, config = (I, 19 + 2 * bidirectional), {"bidirectional": bidirectional}
    with forced(path):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fastrnn.LSTM(*sizes, **config)(torch.randn(steps, B, I), lengths=lengths)[
                0
            ].sum().backward()
        lstm, x = fastrnn.LSTM(*sizes, **config), torch.randn(steps, B, I)
        output, _ = lstm(x, lengths=lengths)
    assert type(output) is torch.Tensor
    expected, _ = lstm(pack_padded_sequence(x, lengths))
    assert (output[9:] == 0).all()
    torch.testing.assert_close(output[:8].flatten(0, 1), expected.data[:24], rtol=0, atol=1e-6)


WITHOUT_VALUES = {
    "lengths": lambda device: {"lengths": torch.tensor([7, 5, 2], device=device)},
    "mask": lambda device: {"mask": torch.ones(T, B, dtype=torch.bool, device=device)},
}


@pytest.mark.parametrize("given", WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_lengths_without_values_are_refused_with_the_way_out(given):
    words = "must have values, got a .* that has none; .* give lengths as a list"
    with pytest.raises(ValueError, match=words):
        train({}, given("meta"), "meta")
    with FakeTensorMode(), pytest.raises(ValueError, match=words):
        train({}, given("cpu"))
