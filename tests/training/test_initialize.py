"""init_lstm_: orthogonal recurrence and an open forget gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastrnn
from fastrnn.training import init_lstm_

I, H, P = 5, 8, 3
CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "proj_size": P},
]


@pytest.mark.parametrize("kind", [fastrnn.LSTM, nn.LSTM])
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=str)
def test_every_gate_of_every_layer(kind: type, config: dict[str, Any]) -> None:
    lstm = kind(I, H, **config)
    assert init_lstm_(lstm) is lstm
    columns = config.get("proj_size", H)
    for name, weight in lstm.named_parameters():
        if name.startswith("weight_hh"):
            for gate in weight.chunk(4):
                torch.testing.assert_close(gate.T @ gate, torch.eye(columns), atol=1e-5, rtol=0)
        elif name.startswith("weight_ih"):
            bound = (6 / (H + weight.shape[1])) ** 0.5
            for gate in weight.chunk(4):
                assert bound * 0.5 < gate.abs().max() <= bound
        elif name.startswith("weight_hr"):
            torch.testing.assert_close(weight @ weight.T, torch.eye(P), atol=1e-5, rtol=0)


def test_gates_are_not_copies_of_each_other() -> None:
    gates = init_lstm_(fastrnn.LSTM(I, H)).weight_hh_l0.chunk(4)
    assert not any(torch.equal(gates[0], gate) for gate in gates[1:])


@pytest.mark.parametrize("forget_bias", [1.0, 2.5])
def test_the_two_biases_add_up_to_the_forget_bias(forget_bias: float) -> None:
    lstm = init_lstm_(fastrnn.LSTM(I, H, num_layers=2, bidirectional=True), forget_bias)
    expected = torch.zeros(4, H)
    expected[1] = forget_bias
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        both = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}")
        assert torch.equal(both.view(4, H), expected)


def test_without_biases() -> None:
    assert init_lstm_(fastrnn.LSTM(I, H, bias=False)).weight_hh_l0.isfinite().all()


def test_generator_decides() -> None:
    drawn = [
        init_lstm_(fastrnn.LSTM(I, H), generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not torch.equal(drawn[0]["weight_hh_l0"], drawn[2]["weight_hh_l0"])


def test_refuses_another_rnn() -> None:
    with pytest.raises(ValueError, match=r"expected an LSTM .* got mode GRU"):
        init_lstm_(nn.GRU(I, H))


def test_refuses_weights_that_are_computed() -> None:
    lstm = parametrizations.weight_norm(fastrnn.LSTM(I, H), "weight_hh_l0")
    before = [parameter.clone() for parameter in lstm.parameters()]
    with pytest.raises(ValueError, match="weight_hh_l0 computed from others"):
        init_lstm_(lstm)
    assert all(map(torch.equal, lstm.parameters(), before))
