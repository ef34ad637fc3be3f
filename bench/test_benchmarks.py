"""The benchmarks as pytest-benchmark has them: ``python -m pytest bench --benchmark-enable``.

For one case at a time, with pytest-benchmark's own comparison and history. They are collected only
where bench/ is named. Sizes are small: published figures come from ``python -m bench``. The timer
waits for the GPU.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import devices
from bench.clip_cases import ClipCase, make_parameters, true_norm
from bench.clip_providers import clips
from bench.providers import Provider
from bench.workloads import Batches, Case, Shape

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
SHAPE = Shape(32, 128, 256, 256) if ON_GPU else Shape(8, 20, 16, 32)
GRADIENTS = (10, 10_000_000 if ON_GPU else 100_000)
_wait = devices.waiting(DEVICE)


def timer() -> float:
    """Seconds, when the device has done what it was asked."""
    _wait()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=timer)


@pytest.mark.parametrize("provider", ["fastrnn", "packed", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_ragged_lstm(benchmark: Any, provider: str, training: bool) -> None:
    case = Case("ragged", SHAPE, "uniform", training)
    benchmark.group = case.name
    measured, batch = Provider(provider, case, device=DEVICE), Batches(case, device=DEVICE)[0]

    def step() -> torch.Tensor:
        measured.clear(batch)
        return measured.run(batch)[0]

    assert benchmark(step).shape == (SHAPE.batch, SHAPE.steps, SHAPE.hidden_size)


@pytest.mark.parametrize("provider", ["fastrnn", "lstm-loop", "cell-loop"])
def test_lstm_with_resets(benchmark: Any, provider: str) -> None:
    case = Case("resets", SHAPE, "full", resets=True)
    benchmark.group = case.name
    measured, batch = Provider(provider, case, device=DEVICE), Batches(case, device=DEVICE)[0]

    def step() -> torch.Tensor:
        measured.clear(batch)
        return measured.run(batch)[0]

    assert benchmark(step).shape == (SHAPE.batch, SHAPE.steps, SHAPE.hidden_size)


@pytest.mark.parametrize("side", list(clips(DEVICE)))
@pytest.mark.parametrize("clipped", [True, False], ids=["clipped", "unclipped"])
def test_clip(benchmark: Any, side: str, clipped: bool) -> None:
    case = ClipCase(*GRADIENTS, clipped)
    benchmark.group = case.id
    parameters = make_parameters(case, DEVICE)
    norm = true_norm(parameters)
    threshold = norm if clipped else 4 * norm
    run = clips(DEVICE)[side]

    def call() -> torch.Tensor:
        nonlocal threshold
        threshold *= 0.999 if clipped else 1.0  # each call has something to do
        return run(parameters, threshold)

    assert float(benchmark(call)) <= norm * 1.01
