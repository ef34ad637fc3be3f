"""The gradient-norm plot, for norms of every kind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastrnn.recipes.plots import plot_gradient_norms


@pytest.mark.parametrize(
    ("norms", "max_norm"),
    [
        ([0.5, 3.0, 1.0], 2.0),
        ([0.5, 3.0, 1.0], math.inf),
        ([5.0, 3.0], 2.0),
        ([1.0], 2.0),
        ([0.0, 1.0, 0.0], 2.0),
    ],
    ids=["some-clipped", "no-threshold", "all-clipped", "one-step", "zeros"],
)
def test_writes_a_png(tmp_path: Path, norms: list[float], max_norm: float) -> None:
    path = tmp_path / "norms.png"
    plot_gradient_norms(path, norms, max_norm, steps_per_epoch=2, title="test")
    assert path.read_bytes().startswith(b"\x89PNG")
