"""Time `fastrnn.clip_grad_norm_` against torch's, foreach and loop: `python -m bench clip`.

Each case is one number of float32 gradients, one number of elements in all of them, one number of
threads, clipped or not. It is verified before it is timed: equal norms and gradients, or, where
fastrnn sums a long gradient in chunks, a norm no farther from the float64 one than torch's. The
three sides take turns on the same gradients, in another order every round. A clipped case lowers
its threshold at every call, so that each call has something to do and none starts from zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.timing import interleave, spread
from fastrnn.clip import clip_grad_norm_

if TYPE_CHECKING:
    from rich.table import Table

SIDES: dict[str, Callable[..., Tensor]] = {
    "fastrnn": clip_grad_norm_,
    "foreach": partial(torch.nn.utils.clip_grad_norm_, foreach=True),
    "loop": partial(torch.nn.utils.clip_grad_norm_, foreach=False),
}
TENSORS = (1, 10, 100, 1000)
ELEMENTS = (1, 1_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
SECONDS, ROUNDS = 1.0, (15, 300)  # per case: about so long, at least and at most so many rounds


def run(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    """Measure every case.

    Args:
        device: "cpu".
        quick: whether to leave out the largest sizes and most rounds.

    Returns:
        One row per case: `tensors`, `elements`, `threads`, `clipped`, `rounds`; for each side its
        median and 20th and 80th percentile in microseconds (`fastrnn_us`, `fastrnn_p20_us`, ...)
        and the relative error of its norm (`fastrnn_error`); and the ratio of torch's median to
        fastrnn's (`foreach_ratio`, `loop_ratio`; above one fastrnn is faster).
    """
    if device != "cpu":
        raise ValueError(f"the clip benchmark runs on 'cpu', got {device!r}")
    elements = ELEMENTS[:4] if quick else ELEMENTS
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for count, total in itertools.product(TENSORS, elements):
                if count <= total:
                    parameters = _parameters(count, total)
                    for clipped in (False, True):
                        row = {"tensors": count, "elements": total, "threads": threads}
                        row |= {"clipped": clipped, **_verify(parameters, clipped)}
                        rows.append(row | _time(parameters, clipped, quick))
    finally:
        torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Render the rows: medians in microseconds with the 20th to 80th percentile, and the ratios."""
    from rich.table import Table

    rendered = Table(title="clip_grad_norm_: median (p20-p80) in µs; torch / fastrnn")
    for heading in ("threads", "tensors", "elements", "clipped", *SIDES, "foreach ×", "loop ×"):
        rendered.add_column(heading, justify="right")
    for row in rows:
        times = [
            f"{row[f'{side}_us']:,.1f} ({row[f'{side}_p20_us']:,.1f}-{row[f'{side}_p80_us']:,.1f})"
            for side in SIDES
        ]
        ratios = [
            f"[{'green' if row[key] >= 1 else 'red'}]{row[key]:.2f}"
            for key in ("foreach_ratio", "loop_ratio")
        ]
        rendered.add_row(
            str(row["threads"]),
            str(row["tensors"]),
            f"{row['elements']:,}",
            "yes" if row["clipped"] else "no",
            *times,
            *ratios,
        )
    return rendered


def _parameters(count: int, total: int) -> list[Tensor]:
    parameters = [torch.empty(total // count, requires_grad=True) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def _norm(parameters: list[Tensor]) -> float:
    """Return the norm in float64."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))


def _verify(parameters: list[Tensor], clipped: bool) -> dict[str, float]:
    """Compare all sides' norms and gradients; return their norms' relative errors."""
    truth = _norm(parameters)
    max_norm = truth * (0.5 if clipped else 2.0)
    originals = [p.grad for p in parameters]
    errors = {}
    for side, function in SIDES.items():
        for p, original in zip(parameters, originals):
            p.grad = original.clone()
        norm = function(parameters, max_norm)
        errors[f"{side}_error"] = abs(norm.item() - truth) / truth
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for p, original in zip(parameters, originals):
            if not torch.equal(p.grad, original * coefficient):
                raise AssertionError(f"{side}: gradients of {p.shape} differ, {clipped=}")
    for p, original in zip(parameters, originals):
        p.grad = original
    if errors["fastrnn_error"] > errors["foreach_error"] + 2 * torch.finfo(torch.float32).eps:
        raise AssertionError(f"the norm is less accurate than torch's: {errors}")
    return errors


def _time(parameters: list[Tensor], clipped: bool, quick: bool) -> dict[str, Any]:
    """Time the sides in turns, on the same gradients."""
    threshold = _norm(parameters) * (1.0 if clipped else 4.0)

    def lower(_: list[Tensor]) -> None:
        nonlocal threshold
        threshold *= 0.999 if clipped else 1.0

    calls = {
        side: lambda grads, function=function: function(grads, threshold)
        for side, function in SIDES.items()
    }
    samples: dict[str, list[float]] = {}
    for seconds, least, most in (
        (0.0, 2, 2),
        (0.0 if quick else SECONDS, *ROUNDS),
    ):  # warm up, time
        samples = interleave(
            calls,
            lambda _: parameters,
            lower,
            budget=seconds,
            min_rounds=least,
            max_rounds=most,
        )
    row: dict[str, Any] = {"rounds": len(samples["fastrnn"])}
    for side, values in samples.items():
        times = spread(values)
        row |= {f"{side}_us": times.median * 1e6}
        row |= {f"{side}_p20_us": times.p20 * 1e6, f"{side}_p80_us": times.p80 * 1e6}
    for side in ("foreach", "loop"):
        row[f"{side}_ratio"] = row[f"{side}_us"] / row["fastrnn_us"]
    return row
