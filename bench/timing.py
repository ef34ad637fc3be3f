"""Interleaved measurement in one process, and the statistics of it.

Every round runs each provider once on one batch. The order rotates from round to round, and turns
round after each full rotation, so no provider always follows the same other. Whatever else the
machine does meanwhile then falls on all of them. A GPU is waited for before and after each run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Batch = TypeVar("Batch")


class Spread(NamedTuple):
    """Median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class Samples(NamedTuple):
    """Seconds of one provider in each round.

    Attributes:
        seconds: until the work was done.
        host: until the call returned; on a GPU, work may go on after it.
    """

    seconds: list[float]
    host: list[float]


def spread(samples: Sequence[float]) -> Spread:
    return Spread(*(quantile(samples, q) for q in (0.5, 0.2, 0.8)))


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile, linear between neighbours."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def speedup(baseline: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times faster ``ours`` is.

    Returns:
        As ``median`` the ratio of the two medians; as ``p20`` and ``p80`` the spread of the ratio
        within a round, where both saw the same batch and much the same machine.
    """
    rounds = spread([theirs / own for theirs, own in zip(baseline, ours, strict=True)])
    return rounds._replace(median=quantile(baseline, 0.5) / quantile(ours, 0.5))


def rotated(names: Sequence[str], index: int) -> list[str]:
    """The order of round ``index``."""
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if index // len(names) % 2 else order


def interleave(
    runs: Mapping[str, Callable[[Batch], object]],
    batch_of: Callable[[int], Batch],
    prepare: Callable[[Batch], None],
    *,
    budget: float,
    min_rounds: int,
    max_rounds: int,
    on_round: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Seconds of each provider in each round; all are warm already.

    Args:
        runs: the timed part, by provider.
        batch_of: makes a round's batch, outside the timing.
        prepare: run before each timed part, outside the timing; clears gradients.
        budget: seconds; no round begins that is expected to end later.
        min_rounds: measured whatever they cost.
        max_rounds: not exceeded.
        on_round: told the seconds that each round took, all in all.
        clock: in seconds.
        wait: returns when the device has done all that was asked of it; the CPU has by then.

    Returns:
        As many samples for each provider as there were rounds.
    """
    samples = {name: Samples([], []) for name in runs}
    elapsed = 0.0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(max_rounds):
            started = clock()
            batch = batch_of(index)
            for name in rotated(list(runs), index):
                prepare(batch)
                wait()
                begin = clock()
                runs[name](batch)
                returned = clock()
                wait()
                samples[name].seconds.append(clock() - begin)
                samples[name].host.append(returned - begin)
            took = clock() - started
            elapsed += took
            on_round(took)
            if index + 1 >= min_rounds and elapsed + elapsed / (index + 1) > budget:
                break
    finally:
        if collecting:
            gc.enable()
    return samples
