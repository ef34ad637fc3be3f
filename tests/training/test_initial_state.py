"""LearnedInitialState: states of the LSTM's shapes, which learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.training import LearnedInitialState

B, T, I, H = 3, 4, 5, 6


@pytest.mark.parametrize("kind", [fastrnn.LSTM, nn.LSTM])
@pytest.mark.parametrize(
    "config",
    [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "proj_size": 2}],
    ids=str,
)
def test_starts_where_the_lstm_starts_and_learns(kind: type, config: dict[str, Any]) -> None:
    lstm = kind(I, H, batch_first=True, dtype=torch.float64, **config)
    initial = LearnedInitialState(lstm)
    x = torch.randn(B, T, I, dtype=torch.float64)
    out, _ = lstm(x, initial(B))
    torch.testing.assert_close(out, lstm(x)[0])
    out.square().sum().backward()
    for parameter in initial.parameters():
        assert parameter.grad is not None
        assert parameter.grad.all()


def test_every_sequence_has_the_same() -> None:
    initial = LearnedInitialState(fastrnn.LSTM(I, H, num_layers=2))
    for parameter in initial.parameters():
        nn.init.normal_(parameter)
    for state, parameter in zip(initial(B), initial.parameters()):
        assert state.is_contiguous()
        assert torch.equal(state, torch.stack([parameter] * B, 1))


def test_the_lstm_is_not_kept() -> None:
    initial = LearnedInitialState(fastrnn.LSTM(I, H))
    assert set(initial.state_dict()) == {"h_0", "c_0"}
