"""ScheduledSampling: the three curves of Bengio et al. (2015)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastrnn.training import ScheduledSampling

SCHEDULES = ["linear", "exponential", "inverse_sigmoid"]


def curve(sampling: ScheduledSampling, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(sampling.probability)
        sampling.step()
    return values


def test_linear() -> None:
    values = curve(ScheduledSampling("linear", k=0.9, slope=0.25, least=0.1), 6)
    assert values == pytest.approx([0.9, 0.65, 0.4, 0.15, 0.1, 0.1])


def test_exponential() -> None:
    assert curve(ScheduledSampling("exponential", k=0.5, least=0.2), 4) == [1, 0.5, 0.25, 0.2]


def test_inverse_sigmoid() -> None:
    k = 10.0
    expected = [k / (k + math.exp(i / k)) for i in range(100)]
    assert curve(ScheduledSampling("inverse_sigmoid", k=k), 100) == pytest.approx(expected)


def test_inverse_sigmoid_ends_at_zero_without_overflow() -> None:
    assert ScheduledSampling("inverse_sigmoid", k=1.0, steps=10**9).probability == 0


@pytest.mark.parametrize("steps", [1, 37.5, 10_000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_halving_is_at_a_half_when_it_says(schedule: Any, steps: float) -> None:
    sampling = ScheduledSampling.halving(schedule, steps)
    assert sampling.probability > 0.5
    sampling.steps = steps  # type: ignore[assignment]
    assert sampling.probability == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_state_dict_carries_it_over(schedule: Any) -> None:
    first = ScheduledSampling.halving(schedule, 5, least=0.1)
    curve(first, 3)
    second = ScheduledSampling("linear", k=0.5)
    second.load_state_dict(first.state_dict())
    assert second == first
    assert curve(second, 5) == curve(first, 5)


def test_a_bad_state_changes_nothing() -> None:
    sampling = ScheduledSampling("linear", k=0.5)
    with pytest.raises(ValueError, match="k of the schedule linear"):
        sampling.load_state_dict({**sampling.state_dict(), "k": 2})
    with pytest.raises(TypeError):
        sampling.load_state_dict({**sampling.state_dict(), "more": 2})
    assert sampling == ScheduledSampling("linear", k=0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"schedule": "cosine", "k": 1},
            "one of linear, exponential, inverse_sigmoid, got 'cosine'",
        ),
        ({"schedule": "linear", "k": 1.5}, "k of the schedule linear must be from 0 to 1, got 1.5"),
        ({"schedule": "linear", "k": math.nan}, "got nan"),
        ({"schedule": "exponential", "k": 1.0}, "between 0 and 1, got 1.0"),
        ({"schedule": "inverse_sigmoid", "k": 0.5}, "of at least 1, got 0.5"),
        ({"schedule": "linear", "k": 1, "slope": -1}, "slope must be at least 0"),
        ({"schedule": "exponential", "k": 0.9, "slope": 1}, "slope .* got 1 with exponential"),
        ({"schedule": "linear", "k": 1, "least": 2}, "least must be from 0 to 1, got 2"),
        ({"schedule": "linear", "k": 1, "steps": -1}, "steps must be at least 0, got -1"),
    ],
    ids=str,
)
def test_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScheduledSampling(**arguments)


@pytest.mark.parametrize("steps", [0, -1, math.inf, math.nan])
def test_halving_refuses(steps: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        ScheduledSampling.halving("linear", steps)
