"""teacher_forced_decode: the plain loop of steps, in as few calls as can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.training import LuongAttention, ScheduledSampling, teacher_forced_decode

B, T, V, I, H, S, E = 5, 9, 7, 4, 6, 8, 3
RAGGED = [9, 4, 0, 1, 7]


class Decoder(nn.Module):
    """Embedding, LSTM, attention and projection, in float64."""

    def __init__(self, kind: type = fastrnn.LSTM, **config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, I)
        self.lstm = kind(I, H, **{"batch_first": True, **config})
        width = self.lstm.proj_size or H
        self.attention = LuongAttention(width, E)
        self.project = nn.Linear(width, V)
        layers = self.lstm.num_layers
        self.h_0 = nn.Parameter(torch.randn(layers, B, width))
        self.c_0 = nn.Parameter(torch.randn(layers, B, H))
        self.memory = nn.Parameter(torch.randn(B, S, E))
        self.double()
        self.calls = 0
        self.lstm.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.calls += 1

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        return self.h_0, self.c_0

    def attend(self) -> Callable[[Tensor], Tensor]:
        return self.attention.over(self.memory, [8, 3, 5, 8, 1])

    def decode(self, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        options = {"start": 1, "state": self.state, **options}
        return teacher_forced_decode(self.lstm, self.embed, self.project, targets, **options)


def plain_loop(
    model: Decoder,
    targets: Tensor,
    forced: Tensor,
    *,
    embed: Callable[[Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
    attend: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Every step by itself, over all T steps, as a tutorial has it; batch first."""
    lstm, state, inputs, outputs = model.lstm, model.state, [], []
    batch_first = lstm.batch_first
    token = torch.ones_like(targets[:, 0])
    for t in range(targets.shape[1]):
        if t:
            own = feed(outputs[-1])
            mine = forced[:, t][(...,) + (None,) * (own.dim() - 1)]
            token = torch.where(mine, targets[:, t - 1], own)
        inputs.append(token)
        out, state = lstm(embed(token).unsqueeze(1 if batch_first else 0), state)
        out = out if batch_first else out.transpose(0, 1)
        outputs.append(model.project(attend(out) if attend else out)[:, 0])
    return torch.stack(outputs, 1), torch.stack(inputs, 1).detach()


def gradients(model: Decoder, outputs: Tensor, weight: Tensor) -> list[Tensor | None]:
    loss = (outputs * weight).sum()
    parameters = list(model.parameters())
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def valid_steps(lengths: list[int] | None) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths or [T] * B)[:, None]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def assert_is_the_loop(
    model: Decoder, per: str, lengths: list[int] | None, probability: float, attend: bool
) -> None:
    targets = torch.randint(V, (B, T))
    forced = (torch.rand((T,) if per == "step" else (B, T)) < probability).expand(B, T)
    valid = valid_steps(lengths)
    padded = targets.masked_fill(~valid, -100)
    coins = forced
    if not model.lstm.batch_first:
        padded, coins = padded.t(), coins.t()
    bound = model.attend() if attend else None
    outputs, inputs = model.decode(padded, teacher_forcing=coins, lengths=lengths, attend=bound)
    if not model.lstm.batch_first:
        outputs, inputs = outputs.transpose(0, 1), inputs.t()
    expected, fed = plain_loop(
        model, targets, forced, embed=model.embed, feed=lambda y: y.argmax(-1), attend=bound
    )
    assert torch.equal(inputs[valid], fed[valid])
    assert not inputs[~valid].any()
    assert_equal(outputs[valid], expected[valid])
    weight = torch.randn(B, T, V, dtype=torch.float64) * valid[:, :, None]
    assert_equal(gradients(model, outputs, weight), gradients(model, expected, weight))


@pytest.mark.parametrize("attend", [False, True], ids=["plain", "attention"])
@pytest.mark.parametrize("probability", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize("per", ["step", "element"])
def test_equals_the_loop_of_steps(
    per: str, lengths: list[int] | None, probability: float, attend: bool
) -> None:
    assert_is_the_loop(Decoder(), per, lengths, probability, attend)


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 2},
        {"proj_size": 2},
        {"batch_first": False},
        {"num_layers": 3, "proj_size": 2, "batch_first": False, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("per", ["step", "element"])
def test_equals_the_loop_for_every_lstm(per: str, config: dict[str, Any]) -> None:
    assert_is_the_loop(Decoder(**config), per, RAGGED, 0.6, attend=True)


def test_nn_lstm_will_do_where_nothing_is_ragged() -> None:
    assert_is_the_loop(Decoder(nn.LSTM), "step", None, 0.5, attend=False)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["dense", "ragged"])
def test_all_forced_is_one_call(lengths: list[int] | None) -> None:
    model = Decoder()
    model.decode(torch.randint(V, (B, T)), lengths=lengths)
    assert model.calls == 1


@pytest.mark.parametrize(
    ("forced", "calls"),
    [
        ("FFFFFFFFF", 1),
        ("MFFFFFFFF", 1),  # the first step has `start`, whatever its coin
        ("FFFFMFFFF", 2),
        ("FMMFFFMFF", 4),
        ("FFFFFFFFM", 2),
        ("MMMMMMMMM", 9),
    ],
)
def test_a_call_for_each_model_fed_step_and_one_more(forced: str, calls: int) -> None:
    model = Decoder()
    coins = torch.tensor([coin == "F" for coin in forced])
    model.decode(torch.randint(V, (B, T)), teacher_forcing=coins)
    assert model.calls == calls


def test_sequences_have_their_runs_side_by_side() -> None:
    model = Decoder()
    coins = torch.ones(B, T, dtype=torch.bool)
    coins[0, 3] = coins[1, 5] = coins[1, 8] = coins[3, 8] = coins[4, 7] = False
    model.decode(torch.randint(V, (B, T)), teacher_forcing=coins)
    assert model.calls == 3
    model.calls = 0
    model.decode(torch.randint(V, (B, T)), teacher_forcing=coins, lengths=[9, 8, 9, 8, 7])
    assert model.calls == 2  # what lies beyond a length is not run


@pytest.mark.parametrize("per", ["step", "element"])
def test_coins_are_the_generators(per: str) -> None:
    model, targets = Decoder(), torch.randint(V, (B, T))
    shape = (T,) if per == "step" else (B, T)
    coins = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = model.decode(targets, teacher_forcing=coins)
    drawn = torch.Generator().manual_seed(3)
    actual = model.decode(targets, teacher_forcing=0.4, per=per, generator=drawn)
    assert all(map(torch.equal, actual, expected))
    again = model.decode(targets, teacher_forcing=0.4, per=per, generator=drawn)
    assert not torch.equal(again[1], expected[1])


def test_a_schedule_gives_its_probability_of_now() -> None:
    model, targets = Decoder(), torch.randint(V, (B, T))
    sampling = ScheduledSampling("linear", k=1.0, slope=1.0)
    model.decode(targets, teacher_forcing=sampling)
    assert model.calls == 1
    sampling.step()
    model.decode(targets, teacher_forcing=sampling)
    assert model.calls == 1 + T


def test_values_are_fed_with_their_gradient_unless_detached() -> None:
    model = Decoder()
    model.embed = nn.Linear(V, I).double()
    targets = torch.randn(B, T, V, dtype=torch.float64)
    forced, valid = torch.rand(B, T) < 0.5, valid_steps(RAGGED)
    padded = targets.masked_fill(~valid[:, :, None], math.nan)
    weight = torch.randn(B, T, V, dtype=torch.float64) * valid[:, :, None]
    found = []
    for feed in (lambda y: 2 * y, lambda y: 2 * y.detach()):
        outputs, inputs = model.decode(
            padded, teacher_forcing=forced, lengths=RAGGED, feed=feed, start=torch.ones(B, V)
        )
        expected, fed = plain_loop(model, targets, forced, embed=model.embed, feed=feed)
        assert_equal(inputs[valid], fed[valid])
        assert_equal(outputs[valid], expected[valid])
        found.append(gradients(model, outputs, weight))
        assert_equal(found[-1], gradients(model, expected, weight))
    assert not torch.allclose(found[0][0], found[1][0])


def test_no_sequence_has_a_step() -> None:
    model = Decoder()
    outputs, inputs = model.decode(torch.full((B, T), -100), lengths=[0] * B)
    assert model.calls == 0
    assert_equal(outputs, model.project.bias.expand(B, T, V))
    assert not inputs.any()


def test_starts_of_its_own_for_each_sequence() -> None:
    model, start = Decoder(), torch.randint(V, (B,))
    _, inputs = model.decode(torch.randint(V, (B, T)), start=start)
    assert torch.equal(inputs[:, 0], start)


def test_state_is_zeros_by_default() -> None:
    model, targets = Decoder(), torch.randint(V, (B, T))
    zeros = torch.zeros(1, B, H, dtype=torch.float64)
    options = {"teacher_forcing": torch.rand(B, T) < 0.5, "lengths": RAGGED}
    default, given = (model.decode(targets, state=s, **options) for s in (None, (zeros, zeros)))
    assert_equal(default.outputs, given.outputs)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher_forcing": 1.1}, ValueError, "a probability, from 0 to 1, got 1.1"),
        ({"teacher_forcing": math.nan}, ValueError, "from 0 to 1, got nan"),
        ({"teacher_forcing": torch.ones(T)}, ValueError, r"must be bool of shape \[9\]"),
        ({"teacher_forcing": torch.ones(T - 1) > 0}, ValueError, r"got torch.bool \[8\]"),
        ({"per": "word"}, ValueError, 'must be "step" or "element", got \'word\''),
        ({"lengths": [T + 1] * B}, ValueError, "at most the 9 steps"),
        ({"lengths": [T]}, ValueError, r"shape \[5\] \(one per sequence\), got \[1\]"),
        ({"start": torch.ones(2)}, ValueError, r"start must be one value, or have shape \[5\]"),
    ],
    ids=["p", "nan", "float-coins", "few-coins", "per", "long", "few-lengths", "start"],
)
def test_refuses(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = Decoder()
    with pytest.raises(error, match=words):
        model.decode(torch.randint(V, (B, T)), **options)
    assert model.calls == 0


def test_refuses_a_bidirectional_lstm() -> None:
    lstm = fastrnn.LSTM(I, H, batch_first=True, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional=True"):
        teacher_forced_decode(
            lstm, nn.Embedding(V, I), nn.Linear(2 * H, V), torch.ones(B, T), start=0
        )


@pytest.mark.parametrize("shape", [(B,), (0, T), (B, 0)], ids=str)
def test_refuses_targets_without_steps(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one sequence and one step"):
        Decoder().decode(torch.zeros(shape, dtype=torch.int64))


def test_values_must_say_how_they_are_fed() -> None:
    with pytest.raises(TypeError, match="pass feed"):
        Decoder().decode(torch.zeros(B, T, V))
