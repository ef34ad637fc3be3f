"""The fit of the cost models finds what was put in, and the command prints lines for the table."""

from __future__ import annotations

import ast
import io

import pytest
from rich.console import Console

from bench import costs
from bench.costs import Sample, fit
from bench.workloads import Shape
from fastrnn.choosing.costs import PATHS

TRUE = (1e-3, 0.0, 5e-5, 2e-10, 1e-6, 5e-11)
EXTENTS = [
    (weights, pieces, rows)
    for weights in (2e4, 1e5, 1e6)
    for pieces in (1, 4, 30)
    for rows in (300, 2000, 9000)
]


def seconds(weights: float, pieces: float, rows: float) -> float:
    layer, layer_w, call, call_w, row, row_w = TRUE
    pairs = ((1, layer, layer_w), (pieces, call, call_w), (rows, row, row_w))
    return sum(count * (a + b * weights) for count, a, b in pairs)


def test_the_fit_finds_the_model() -> None:
    found = fit([Sample(*extent, seconds(*extent)) for extent in EXTENTS])
    assert found.coefficients == pytest.approx(TRUE, rel=1e-6, abs=1e-15)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_no_coefficient_is_negative() -> None:
    found = fit([Sample(*extent, max(1e-5, seconds(*extent) - 1e-3)) for extent in EXTENTS])
    assert min(found.coefficients) >= 0


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_each_path_is_forced_and_its_extent_known(train: bool) -> None:
    found = costs.measure(Shape(64, 60, 3, 8), train=train)  # worth cutting
    assert set(found) == set(PATHS)
    for samples in found.values():
        assert all(sample.weights == 4 * 8 * 11 and sample.seconds > 0 for sample in samples)
    assert {(sample.pieces, sample.rows) for sample in found["padded"]} == {(60, 64 * 60)}
    assert {sample.pieces for sample in found["loop"]} == {60}
    assert all(60 <= sample.rows < 64 * 60 for sample in found["loop"])
    pieces = {sample.pieces for sample in found["rectangles"]}
    assert min(pieces) == 1 < max(pieces)


def test_the_command_prints_the_table() -> None:
    file = io.StringIO()
    options = costs.Options((1,), shapes=(Shape(3, 6, 4, 8),))
    assert costs.run(options, Console(file=file, width=110)) == 0
    heading, _, table = file.getvalue().strip().partition("\n")
    assert heading.endswith("threads (1,)")
    found = ast.literal_eval("{" + table.replace("(..., ", "(0, ") + "}")
    assert found.keys() == {(0, path, train) for path in PATHS for train in (True, False)}
    assert all(len(fits) == 1 and len(fits[0]) == 3 for fits in found.values())
