"""``python -m bench costs``: fit the models of fastrnn/choosing/costs.py to this processor.

Every path is forced upon the same ragged batches, on one thread and on two, and what it took is
fitted by non-negative least squares of the relative errors. The lines that are printed are those of
the table in fastrnn/choosing/costs.py. A quarter of a batch's time is that of its first run, when
oneDNN compiles code for its shapes, and the rest that of the others: in training shapes come again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.providers import Provider
from bench.workloads import Batch, Batches, Case, Shape
from fastrnn.choosing import choose, costs
from fastrnn.input.arguments import check_lengths
from fastrnn.input.packing import (
    Layout,
    PackedLayout,
    PaddedLayout,
    RectangleLayout,
    padded_layout,
    ragged_layout,
)
from fastrnn.ways.rectangles import plan

SHAPES = (
    *(Shape(4, 40, 12, 64), Shape(8, 50, 12, 64), Shape(32, 60, 12, 64), Shape(128, 29, 12, 64)),
    *(Shape(16, 120, 32, 96), Shape(32, 100, 64, 128), Shape(8, 200, 128, 128)),
    *(Shape(96, 60, 64, 128), Shape(64, 120, 128, 256), Shape(16, 150, 64, 256)),
    *(Shape(8, 150, 256, 512), Shape(16, 200, 256, 512)),
)
AnyLayout: TypeAlias = Layout | PaddedLayout
# What a call is made to cost, so that there are few rectangles and many.
CALL_FACTORS = (100.0, 1.0, 0.15)
LARGE = 256  # from so many hidden units on fewer batches and repetitions do


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        threads: one after the other.
        dtype: of the LSTM.
        shapes: of the batches.
    """

    threads: tuple[int, ...] = (1, 2)
    dtype: torch.dtype = torch.float32
    shapes: tuple[Shape, ...] = SHAPES


class Sample(NamedTuple):
    """One batch by one path.

    Attributes:
        weights: W, 4H (I + H).
        pieces: rectangles, or steps.
        rows: all, with half a row a step of a rectangle.
        seconds: measured.
    """

    weights: float
    pieces: float
    rows: float
    seconds: float


class Fit(NamedTuple):
    """A path's model.

    Attributes:
        coefficients: a and b of layer, call and row, each a + b W seconds.
        error: mean of the relative errors.
    """

    coefficients: tuple[float, ...]
    error: float

    def line(self) -> str:
        """As fastrnn/choosing/costs.py has it."""
        pairs = itertools.batched if hasattr(itertools, "batched") else _pairs
        parts = (f"({a:.3g}, {b:.3g})" for a, b in pairs(self.coefficients, 2))
        return f"({', '.join(parts)}),"


def _pairs(values: Sequence[float], size: int) -> list[tuple[float, ...]]:
    return [tuple(values[begin : begin + size]) for begin in range(0, len(values), size)]


def run(options: Options, console: Console) -> int:
    """Measure, fit, and print the lines."""
    before = torch.get_num_threads()
    fits: dict[tuple[costs.Path, bool], list[Fit]] = {
        (path, train): [] for path in costs.PATHS for train in (True, False)
    }
    try:
        with Progress(console=console, transient=True) as progress:
            total = len(options.threads) * 2 * len(options.shapes)
            task = progress.add_task("measuring", total=total)
            for threads, train in itertools.product(options.threads, (True, False)):
                torch.set_num_threads(threads)
                samples: dict[costs.Path, list[Sample]] = {path: [] for path in costs.PATHS}
                for shape in options.shapes:
                    for path, found in measure(shape, train=train, dtype=options.dtype).items():
                        samples[path] += found
                    progress.advance(task)
                for path in costs.PATHS:
                    fits[path, train].append(fit(samples[path]))
    finally:
        torch.set_num_threads(before)
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{capability}, {options.dtype}, threads {options.threads}", highlight=False)
    for (path, train), by_threads in fits.items():
        console.print(f'    (..., "{path}", {train}): (', highlight=False)
        for each in by_threads:
            line = f"        {each.line()}  # {each.error:.0%} off in the mean"
            console.print(line, highlight=False, soft_wrap=True)
        console.print("    ),")
    return 0


def measure(
    shape: Shape, *, train: bool, dtype: torch.dtype = torch.float32
) -> dict[costs.Path, list[Sample]]:
    """Samples of every path on the same ragged batches of a shape, in turn on each.

    So a machine that becomes slower meanwhile becomes so for all, and the ratios stand.
    """
    large = shape.hidden_size >= LARGE
    weights = 4.0 * shape.hidden_size * (shape.input_size + shape.hidden_size)
    samples: dict[costs.Path, list[Sample]] = {path: [] for path in costs.PATHS}
    for lengths in ("uniform", "lognormal"):
        case = Case("costs", shape, lengths, training=train, dtype=dtype)
        batches, provider = Batches(case), Provider("fastrnn", case)
        arrangements = [
            (path, arrange) for path in costs.PATHS for arrange in _arrangements(path, shape, train)
        ]
        for _, arrange in arrangements:
            with mock.patch.object(choose, "arrange", arrange):
                provider.run(batches[-1])  # loads what the first call loads
        for index in range(2 if large else 4):
            for path, arrange in arrangements:
                with mock.patch.object(choose, "arrange", arrange):
                    seconds = _seconds(provider, batches[index], 3 if large else 6)
                pieces, rows = _extent(arrange.layout, shape)
                samples[path].append(Sample(weights, pieces, rows, seconds))
            arrangements.append(arrangements.pop(0))
    return samples


class _Arrangement:
    """Stands in for fastrnn.choosing.arrange.arrange; keeps the layout it made last."""

    def __init__(self, make: Callable[[Any, Tensor], AnyLayout]) -> None:
        self.make = make
        self.layout: AnyLayout = PackedLayout(0, 0, torch.zeros(0, dtype=torch.int64))

    def __call__(self, form: Any, lengths: Tensor, *_: Any, **__: Any) -> AnyLayout:
        self.layout = self.make(form, lengths)
        return self.layout


def _arrangements(path: costs.Path, shape: Shape, train: bool) -> list[_Arrangement]:
    def padded(form: Any, lengths: Tensor) -> AnyLayout:
        checked = check_lengths(lengths, form.batch, form.steps, exact=True)
        return padded_layout(form.steps, checked)

    if path == "padded":
        return [_Arrangement(padded)]
    if path == "loop":
        return [_Arrangement(ragged_layout)]
    size, threads = (shape.input_size, shape.hidden_size), torch.get_num_threads()
    cost = costs.costs_of(*size, train, threads, torch.float32).rectangles

    def cut_by(call: float) -> Callable[[Any, Tensor], AnyLayout]:
        priced = cost._replace(call=call)
        return lambda form, lengths: ragged_layout(
            form, lengths, cut=lambda sizes: plan(sizes, priced).rectangles
        )

    return [_Arrangement(cut_by(factor * cost.call)) for factor in CALL_FACTORS]


def _seconds(provider: Provider, batch: Batch, times: int) -> float:
    taken = []
    for _ in range(times):
        provider.clear(batch)
        begin = time.perf_counter()
        provider.run(batch)
        taken.append(time.perf_counter() - begin)
    first, *others = taken
    return (first + 3 * min(others)) / 4


def _extent(layout: AnyLayout, shape: Shape) -> tuple[float, float]:
    """Pieces and rows."""
    if isinstance(layout, RectangleLayout):
        rows = sum((last - first) * (width + 0.5) for first, last, width in layout.rectangles)
        return len(layout.rectangles), rows
    if isinstance(layout, PaddedLayout):
        return shape.steps, shape.batch * shape.steps
    assert isinstance(layout, PackedLayout)
    return layout.batch_sizes.shape[0], layout.rows


def fit(samples: Sequence[Sample]) -> Fit:
    """The model with the least squares of relative errors, without a negative coefficient."""
    weights, pieces, rows, seconds = torch.tensor(samples, dtype=torch.float64).unbind(1)
    ones = torch.ones_like(weights)
    features = torch.stack(
        [ones, weights, pieces, pieces * weights, rows, rows * weights], 1
    ) / seconds.unsqueeze(1)
    scale = features.norm(dim=0)
    active = list(range(features.shape[1]))
    while True:
        found = torch.linalg.lstsq(
            features[:, active] / scale[active], ones.unsqueeze(1), driver="gelsd"
        ).solution.squeeze(1)
        if (found >= 0).all():
            break
        active.pop(int(found.argmin()))
    coefficients = torch.zeros_like(scale)
    coefficients[active] = found / scale[active]
    error = (features @ coefficients - 1).abs().mean()
    return Fit(tuple(coefficients.tolist()), float(error))
