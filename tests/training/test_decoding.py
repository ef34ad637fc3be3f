"""greedy_decode and beam_decode: against every sequence there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.training import Decoded, LuongAttention, beam_decode, greedy_decode

B, V, I, H, S, E = 3, 4, 3, 5, 6, 2
START, END = 2, 1


class Decoder(nn.Module):
    def __init__(self, kind: type = fastrnn.LSTM, attend: bool = True, **config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, I)
        self.lstm = kind(I, H, **{"batch_first": True, **config})
        self.project = nn.Linear(H, V)
        self.attention = LuongAttention(H, E) if attend else None
        self.memory = nn.Parameter(torch.randn(B, S, E))
        self.double()
        layers = self.lstm.num_layers
        self.state = torch.randn(2, layers, B, H, dtype=torch.float64).unbind()
        with torch.no_grad():  # so that the tokens are told apart
            for parameter in self.parameters():
                parameter.mul_(3)

    def options(self, **options: Any) -> dict[str, Any]:
        attend = self.attention and self.attention.over(self.memory, [6, 2, 0])
        return {"start": START, "end": END, "attend": attend, **options}

    def greedy(self, **options: Any) -> Decoded:
        return greedy_decode(
            self.lstm, self.embed, self.project, self.state, **self.options(**options)
        )

    def beam(self, **options: Any) -> Decoded:
        return beam_decode(
            self.lstm, self.embed, self.project, self.state, **self.options(**options)
        )

    @torch.no_grad()
    def log_p(self, b: int, tokens: list[int]) -> float:
        """Of the tokens, by one call over all of them."""
        state = tuple(state[:, b : b + 1].contiguous() for state in self.state)
        x = self.embed(torch.tensor([[START, *tokens[:-1]]]))
        h = self.lstm(x if self.lstm.batch_first else x.transpose(0, 1), state)[0]
        h = h if self.lstm.batch_first else h.transpose(0, 1)
        if self.attention is not None:
            h = self.attention.over(self.memory[b : b + 1], [[6, 2, 0][b]])(h)
        scores: Tensor = self.project(h)[0].log_softmax(-1)
        return sum(float(scores[t, token]) for t, token in enumerate(tokens))


def every_sequence(max_steps: int) -> list[list[int]]:
    """Those that end, and those that are cut off."""
    others = [token for token in range(V) if token != END]
    return [
        [*head, *tail]
        for n in range(max_steps + 1)
        for head in itertools.product(others, repeat=n)
        for tail in ([END] if n < max_steps else [],)
    ]


def written(tokens: Tensor, length: int, max_steps: int) -> list[int]:
    """The tokens with the end, where it came."""
    assert (tokens[length:] == END).all()
    return tokens[:length].tolist() + [END] * (length < max_steps)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "config",
    [{}, {"attend": False}, {"num_layers": 2}, {"batch_first": False}, {"kind": nn.LSTM}],
    ids=str,
)
def test_a_beam_wide_enough_finds_the_best_in_order(
    config: dict[str, Any], length_penalty: float
) -> None:
    model, max_steps = Decoder(**config), 3
    sequences = every_sequence(max_steps)
    decoded = model.beam(width=len(sequences), max_steps=max_steps, length_penalty=length_penalty)
    for b in range(B):
        scored = sorted((model.log_p(b, s) / len(s) ** length_penalty, s) for s in sequences)
        for k, (score, sequence) in enumerate(scored[::-1]):
            length = int(decoded.lengths[b, k])
            assert written(decoded.tokens[b, k], length, max_steps) == sequence
            assert float(decoded.scores[b, k]) == pytest.approx(score, abs=1e-9)


def test_greedy_takes_the_likeliest_token_at_each_step() -> None:
    model, max_steps = Decoder(), 6
    decoded = model.greedy(max_steps=max_steps)
    for b in range(B):
        tokens = written(decoded.tokens[b], int(decoded.lengths[b]), max_steps)
        for n in range(len(tokens)):
            others = [model.log_p(b, [*tokens[:n], token]) for token in range(V)]
            assert others.index(max(others)) == tokens[n]
        assert float(decoded.scores[b]) == pytest.approx(model.log_p(b, tokens), abs=1e-9)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("config", [{}, {"batch_first": False}, {"kind": nn.LSTM}], ids=str)
def test_a_beam_of_one_is_greedy(config: dict[str, Any], length_penalty: float) -> None:
    model = Decoder(**config)
    greedy = model.greedy(max_steps=9)
    beam = model.beam(max_steps=9, width=1, length_penalty=length_penalty)
    assert torch.equal(beam.tokens[:, 0], greedy.tokens)
    assert torch.equal(beam.lengths[:, 0], greedy.lengths)


def test_sequences_end_at_different_steps() -> None:
    """Otherwise the tests above would say little."""
    lengths = Decoder().beam(max_steps=3, width=8).lengths
    assert len(set(lengths.flatten().tolist())) >= 3


def test_length_penalty_prefers_longer_ones() -> None:
    model = Decoder()
    short, long = (model.beam(max_steps=4, width=90, length_penalty=p) for p in (0.0, 1.0))
    assert long.lengths[:, 0].sum() > short.lengths[:, 0].sum()


def test_fewer_sequences_than_the_beam_is_wide() -> None:
    scores = Decoder().beam(max_steps=1, width=6).scores
    assert (scores.isinf().sum(1) == 6 - V).all()
    assert scores[:, :V].isfinite().all()


@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_stops_when_all_have_ended(decode: str) -> None:
    model = Decoder(attend=False)
    calls = []
    model.lstm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.project.bias[END] += 100
    options = {"width": 1} if decode == "beam" else {}
    decoded = getattr(model, decode)(max_steps=50, **options)
    assert len(calls) == 1
    assert decoded.tokens.shape[-1] == 0
    assert not decoded.lengths.any()


@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_starts_of_its_own_for_each_sequence(decode: str) -> None:
    model = Decoder()
    start = torch.tensor([0, 2, 3])
    together = getattr(model, decode)(max_steps=5, start=start)
    alone = [getattr(model, decode)(max_steps=5, start=int(token)) for token in start]
    for b in range(B):
        torch.testing.assert_close(together.scores[b], alone[b].scores[b])


@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_no_gradients(decode: str) -> None:
    assert not getattr(Decoder(), decode)(max_steps=2).scores.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_steps": 1, "width": 0}, "width must be at least 1, got 0"),
        ({"max_steps": 1, "length_penalty": -1}, "at least 0, got -1"),
        ({"max_steps": 1, "length_penalty": math.inf}, "finite .* got inf"),
    ],
    ids=str,
)
def test_beam_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decoder().beam(**options)


def test_greedy_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        Decoder().greedy(max_steps=0)


@pytest.mark.parametrize("decode", [greedy_decode, beam_decode])
def test_refuses_a_bidirectional_lstm(decode: Any) -> None:
    lstm, state = fastrnn.LSTM(I, H, bidirectional=True), (torch.zeros(2, B, H),) * 2
    with pytest.raises(ValueError, match="bidirectional=True"):
        decode(lstm, nn.Embedding(V, I), nn.Linear(2 * H, V), state, start=0, end=1, max_steps=2)
