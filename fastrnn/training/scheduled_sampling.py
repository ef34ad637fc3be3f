"""Teacher forcing that decays as training goes on (Bengio et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Schedule: TypeAlias = Literal["linear", "exponential", "inverse_sigmoid"]


@dataclass
class ScheduledSampling:
    r"""The probability that a step is fed with its target, after i training steps.

    ```
    sampling = ScheduledSampling("inverse_sigmoid", k=300)
    for batch in batches:
        outputs, _ = teacher_forced_decode(..., teacher_forcing=sampling)
        ...
        optimizer.step()
        sampling.step()
    ```

    - linear: `max(least, k - slope i)`
    - exponential: `max(least, k^i)`, with k below 1
    - inverse sigmoid: `max(least, k / (k + exp(i / k)))`, with k of at least 1

    The paper has `least` for the linear one alone.

    Args:
        schedule: "linear", "exponential" or "inverse_sigmoid".
        k: as above; for "linear" the probability at first, up to 1.
        slope: what "linear" loses with each step; 0 for the others.
        least: the probability never falls below it. Default: 0.
        steps: i, training steps made. Default: 0.

    Raises:
        ValueError: an argument out of range.

    Source: Bengio, Vinyals, Jaitly, Shazeer. Scheduled sampling for sequence prediction with
    recurrent neural networks. NeurIPS 2015, section 2.4.
    """

    schedule: Schedule
    k: float
    slope: float = 0.0
    least: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "linear": (0 <= self.k <= 1, "from 0 to 1"),
            "exponential": (0 < self.k < 1, "between 0 and 1"),
            "inverse_sigmoid": (1 <= self.k < math.inf, "of at least 1"),
        }
        if self.schedule not in ranges:
            raise ValueError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}"
            )
        fits, words = ranges[self.schedule]
        if not fits:
            raise ValueError(f"k of the schedule {self.schedule} must be {words}, got {self.k}")
        if not (self.slope >= 0 and (self.slope == 0 or self.schedule == "linear")):
            raise ValueError(
                'slope must be at least 0, and is of the schedule "linear" alone, got '
                f"{self.slope} with {self.schedule}"
            )
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be from 0 to 1, got {self.least}")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")

    @classmethod
    def halving(cls, schedule: Schedule, steps: float, least: float = 0.0) -> ScheduledSampling:
        """The schedule of this kind whose probability is 1/2 after `steps` steps.

        Args:
            schedule: "linear" (from 1), "exponential" or "inverse_sigmoid".
            steps: above 0; for "inverse_sigmoid" k is found by bisection of `k log k = steps`.
            least: as above. Default: 0.

        Raises:
            ValueError: an argument out of range.
        """
        if not 0 < steps < math.inf:
            raise ValueError(f"steps until 1/2 must be a finite number above 0, got {steps}")
        if schedule == "linear":
            return cls(schedule, 1.0, slope=0.5 / steps, least=least)
        if schedule == "exponential":
            return cls(schedule, 0.5 ** (1 / steps), least=least)
        low, high = 1.0, steps + math.e
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.log(middle) < steps else (low, middle)
        return cls(schedule, low, least=least)

    @property
    def probability(self) -> float:
        """Of a forced step now."""
        i, k = self.steps, self.k
        if self.schedule == "linear":
            value = k - self.slope * i
        elif self.schedule == "exponential":
            value = k**i
        else:
            # k / (k + exp(i / k)), in a form that does not overflow
            odds = math.log(k) - i / k
            value = 1 / (1 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1 + math.exp(odds))
        return max(self.least, value)

    def step(self) -> None:
        """Count a training step."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that it is, as plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what :meth:`state_dict` recorded, the kind of schedule included.

        Raises:
            TypeError: the state has other entries than :meth:`state_dict` gives.
            ValueError: a value out of range; nothing is changed.
        """
        self.__dict__.update(asdict(type(self)(**state)))
