"""The measured search, with a clock of its own: everything but the timing itself, on a CPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.choosing import backends, measured
from fastrnn_kernels import lstm_backward as backward_module
from fastrnn_kernels import lstm_forward as forward_module
from fastrnn_kernels import tile_store, tuning
from fastrnn_kernels.launch import CannotLaunch
from fastrnn_kernels.reference import rows_of
from fastrnn_kernels.tile_store import store_path
from fastrnn_kernels.tiling import CHIPS, Tile, fitting_tiles, forward_tile
from tests.interpreter import cooperative
from tests.kernels.problems import Problem, run_forward, tile_for

pytestmark = pytest.mark.interpreter

B, H, LENGTHS = 3, 5, [2, 1, 1]
SMALL = [
    Tile("whole", BLOCK_B=2, BLOCK_H=8, BLOCK_K=8, unit_programs=1, batch_programs=2),
    Tile("split", BLOCK_B=2, BLOCK_H=4, BLOCK_K=4, unit_programs=2, batch_programs=2),
    Tile("streamed", BLOCK_B=4, BLOCK_H=4, BLOCK_K=4, unit_programs=2, batch_programs=1),
]


class Clock:
    """Says that tile number `fastest` is so, and keeps what was launched."""

    def __init__(self, fastest: int) -> None:
        self.fastest = fastest
        self.order: list[Tile] = []

    def __call__(self, launch: Callable[[], object]) -> float:
        (tile,) = launch.args
        self.order.append(tile)
        launch()
        return 1.0 if tile == SMALL[self.fastest] else 2.0 + SMALL.index(tile)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile_store.forget()
    measured.forget()
    yield store_path()
    tile_store.forget()
    measured.forget()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for tensors on the CPU, cut by the small tiles."""
    monkeypatch.setattr(backends, "_device_reason", lambda *_: None)
    monkeypatch.setattr(tuning, "fitting_tiles", lambda *_: SMALL)
    monkeypatch.setattr(tuning, "forward_tile", lambda *_: SMALL[1])
    monkeypatch.setattr(tuning, "backward_tile", lambda *_: SMALL[1])
    with cooperative():
        yield


def tune(clock: Callable[..., float], monkeypatch: pytest.MonkeyPatch, **options: object) -> list:
    monkeypatch.setattr(tuning, "gpu_timer", lambda device: clock)
    lstm = fastrnn.LSTM(2, H, num_layers=2, batch_first=True, **options.pop("config", {}))
    return fastrnn.tune(lstm, torch.randn(B, 2, 2), lengths=LENGTHS, **options)


@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_the_fastest_tile_is_found_and_used_from_then_on(
    fastest: int, kernels: None, monkeypatch: pytest.MonkeyPatch, own_store: Path
) -> None:
    *found, inference, training = tune(Clock(fastest), monkeypatch, rounds=1)
    assert [each.which for each in found] == ["forward", "backward"]
    for each in found:
        assert each.tile == SMALL[fastest]
        assert each.microseconds == 1.0
        assert each.rule_tile == SMALL[1]
        assert each.rule_microseconds == (1.0 if fastest == 1 else 3.0)
        assert (each.measured, each.refused) == (3, 0)
    assert len(json.loads(own_store.read_text())["tiles"]) == 2
    assert "inference" in inference.call and "training" in training.call

    lstm = fastrnn.LSTM(7, H, backend="triton")  # the input's width does not matter
    x = torch.randn(1, 2, 7, requires_grad=True)
    with (
        mock.patch.object(Tile, "check", autospec=True) as checked,
        mock.patch.object(forward_module, "forward_tile", side_effect=AssertionError),
        mock.patch.object(backward_module, "backward_tile", side_effect=AssertionError),
    ):
        lstm(x)[0].sum().backward()
    used = {call.args[0].residency for call in checked.call_args_list}
    assert used == {SMALL[fastest].residency}
    assert x.grad is not None


def test_tiles_take_turns_in_another_order_every_round(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0)
    tune(clock, monkeypatch, rounds=3, training=False)
    a, b, c = SMALL
    assert clock.order == [a, b, c, b, c, a, c, a, b]


def test_inference_needs_no_backward(
    kernels: None, monkeypatch: pytest.MonkeyPatch, own_store: Path
) -> None:
    found, ways = tune(Clock(0), monkeypatch, rounds=1, training=False)
    assert found.which == "forward"
    assert set(ways.microseconds) == {"torch", "triton"}
    assert len(json.loads(own_store.read_text())["tiles"]) == 1


def test_the_median_counts() -> None:
    times = {SMALL[0]: iter([1.0, 9.0, 9.0]), SMALL[1]: iter([8.0, 2.0, 3.0])}

    def clock(launch: Callable[[], object]) -> float:
        return next(times[launch.args[0]])

    medians, refused = tuning.measure(SMALL[:2], lambda tile: None, clock, rounds=3)
    assert medians == {SMALL[0]: 9.0, SMALL[1]: 3.0}
    assert refused == 0


def test_what_the_gpu_refuses_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def launch(tile: Tile) -> None:
        if tile == SMALL[0]:
            raise CannotLaunch("too large")

    with caplog.at_level(logging.INFO, "fastrnn"):
        medians, refused = tuning.measure(SMALL, launch, lambda call: 1.0, rounds=1)
    assert [*medians] == SMALL[1:]
    assert refused == 1
    assert "too large" in caplog.text


def test_nothing_that_runs_is_an_error_with_the_reason() -> None:
    def launch(tile: Tile) -> None:
        raise CannotLaunch("too large")

    with pytest.raises(RuntimeError, match="none of 3 tiles can run here: too large"):
        tuning.measure(SMALL, launch, lambda call: 1.0, rounds=1)


def test_a_mistake_is_not_taken_for_a_refusal() -> None:
    def launch(tile: Tile) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        tuning.measure(SMALL, launch, lambda call: 1.0, rounds=1)


def test_it_leaves_parameters_and_random_state_as_they_were(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "gpu_timer", lambda device: Clock(0))
    lstm = fastrnn.LSTM(2, H)
    example = torch.randn(1, B, 2)
    weights = [weight.clone() for weight in lstm.parameters()]
    state = torch.get_rng_state()
    fastrnn.tune(lstm, example, rounds=1)
    assert torch.equal(torch.get_rng_state(), state)
    for weight, before in zip(lstm.parameters(), weights, strict=True):
        assert torch.equal(weight, before)
        assert weight.grad is None


def test_a_measured_tile_gives_the_same_numbers() -> None:
    problem = Problem(rows_of(2, 1), H=9, D=1)
    tile = tile_for(problem, "split")
    shape = ("forward", problem.S, problem.H, problem.D, problem.dtype)
    device = torch.device("cpu")
    tile_store.save_tiles({tile_store.ShapeClass.of(*shape, device, "tf32x3"): (tile, 1.0)})
    with mock.patch.object(forward_module, "forward_tile", side_effect=AssertionError):
        by_store = run_forward(problem, tile=None)
    for name, value in run_forward(problem, tile=tile)._asdict().items():
        assert torch.equal(getattr(by_store, name).nan_to_num(), value.nan_to_num())


def test_the_rule_s_tile_is_among_those_that_are_tried() -> None:
    for chip in CHIPS.values():
        for size in (7, 100, 1024):
            rule = forward_tile(48, size, 1, torch.bfloat16, chip, "tf32")
            assert rule in fitting_tiles("forward", 48, size, 1, 2, chip)


def test_it_says_why_there_is_nothing_to_tune() -> None:
    example = torch.randn(3, B, 2)
    with pytest.raises(RuntimeError, match=r"nothing to tune: the kernels run on GPUs, .* on cpu"):
        fastrnn.tune(fastrnn.LSTM(2, H), example)
    with pytest.raises(RuntimeError, match="nothing to tune: proj_size"):
        fastrnn.tune(fastrnn.LSTM(2, H, proj_size=3), example)
    with pytest.raises(RuntimeError, match=r"nothing to tune: .*float64"):
        fastrnn.tune(fastrnn.LSTM(2, H, dtype=torch.float64), example.double())


def test_mistakes_are_refused_with_what_was_expected(kernels: None) -> None:
    lstm, example = fastrnn.LSTM(2, H), torch.randn(3, B, 2)
    with pytest.raises(TypeError, match=r"must be a fastrnn\.LSTM, .* got LSTM; fastrnn\.convert"):
        fastrnn.tune(nn.LSTM(2, H), example)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        fastrnn.tune(lstm, example, rounds=0)
    with pytest.raises(ValueError, match=r"got an unbatched sequence \[3, 2\]"):
        fastrnn.tune(lstm, example[:, 0])
    with pytest.raises(ValueError, match="at least one valid step"):
        fastrnn.tune(lstm, example, lengths=[0] * B)
    with pytest.raises(RuntimeError, match='has backend="reference"'):
        fastrnn.tune(fastrnn.LSTM(2, H, backend="reference"), example)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 2)
        self.rnn = fastrnn.LSTM(2, H, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return self.rnn(self.embed(x), lengths=lengths)[0]


def test_a_model_is_tuned_as_it_calls_its_lstms(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "gpu_timer", lambda device: Clock(0))
    model = Encoder()
    given = torch.randn(B, 2, 3), LENGTHS
    *_, ways = fastrnn.tune(model, given, rounds=1, training=False)
    assert ways.way in ("torch", "triton")
    assert ways.call.startswith(f"I2 H{H} L1 D1 B<=4 T<=2 float32 lengths inference")
    assert not model.rnn._forward_pre_hooks
