"""AutoClip's threshold on the device, against numpy's percentile, through the interpreter."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrnn_kernels import gradient_threshold
from fastrnn_kernels.gradient_norm import Ring
from tests.interpreter import cooperative
from tests.kernels.mutants import mutated

pytestmark = pytest.mark.interpreter
NAN, INF = math.nan, math.inf


def ring_of(norms: list[float], capacity: int) -> Ring:
    """After steps with these norms."""
    rows = torch.full((capacity, 3), 123.0)  # what was never written must not be read
    for step, norm in enumerate(norms):
        rows[step % capacity] = norm
    return Ring(rows, torch.tensor([len(norms), 0, 0]))


def check(
    norms: list[float],
    present: float,
    percentile: float,
    max_norm: float = INF,
    capacity: int = 50,
    module: object = gradient_threshold,
    dtype: torch.dtype = torch.float32,
    **options: bool,
) -> None:
    """Raises AssertionError unless the step is settled and recorded as it should be."""
    ring = ring_of(norms, capacity)
    total = torch.tensor(present, dtype=dtype)
    with mock.patch.object(module, "BLOCK", 8), cooperative():
        found = module.settle(total, module.Ring(*ring), percentile, max_norm, **options)
    known = [norm for norm in [*norms[-capacity:], float(total)] if math.isfinite(norm)]
    bound = float(np.float32(max_norm))
    threshold = min(np.percentile(known, percentile), bound) if known else bound
    between_two = ((len(known) - 1) * percentile / 100) % 1 > 0
    assert found.threshold.item() == pytest.approx(threshold, rel=2e-6 if between_two else 0)
    coefficient = torch.clamp(found.threshold.to(dtype) / (total + 1e-6), max=1.0)
    if options.get("zero_nonfinite") and not total.isfinite():
        coefficient = torch.zeros_like(total)
    rtol = 2 * torch.finfo(dtype).eps
    close = {"rtol": rtol, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(found.coefficient, coefficient, **close)
    torch.testing.assert_close(found.inverse, found.coefficient.float().reciprocal(), **close)
    recorded = found.coefficient.float()
    if options.get("spare_nonfinite") and not total.isfinite():
        recorded = torch.tensor(NAN)
    row = torch.stack((total.float(), found.threshold, recorded))
    torch.testing.assert_close(ring.rows[len(norms) % capacity], row, **close)
    bad = int(not total.isfinite())
    assert ring.counts.tolist() == [len(norms) + 1, bad, bad]


def random(steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    values: Tensor = torch.randn(steps, generator=generator).abs() * 10.0 ** (
        4 * torch.rand(steps, generator=generator) - 2
    )
    return values.tolist()


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 100.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 8, 9, 30, 70])
def test_is_numpys_percentile(steps: int, percentile: float) -> None:
    check(random(steps), 0.7, percentile)
    check(random(steps), 1e3, percentile)


def test_of_equal_norms() -> None:
    check([1.0] * 9, 1.0, 30)
    check([1.0] * 9 + [2.0] * 9, 3.0, 50)
    check([1.0] * 9 + [2.0] * 9, 3.0, 40)
    check([0.0, 0.0, 5.0], 0.0, 70)


@pytest.mark.parametrize("present", [NAN, INF, 2.0])
@pytest.mark.parametrize("option", ["", "zero_nonfinite", "spare_nonfinite"])
def test_what_is_not_finite_is_left_out(option: str, present: float) -> None:
    norms = random(20)
    norms[3], norms[11] = INF, NAN
    options = {option: True} if option else {}
    check(norms, present, 40, **options)
    check([NAN, INF], present, 40, max_norm=3.0, **options)


def test_max_norm_bounds_it() -> None:
    check(random(20), 100.0, 90, max_norm=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_norms(dtype: torch.dtype) -> None:
    check(random(20), 40.0, 25, dtype=dtype)


MUTANTS = {
    "a rank too high": ("rank = place.to(tl.int32)", "rank = place.to(tl.int32) + 1"),
    "nothing is interpolated": ("(place - rank.to(tl.float32))", "0.0"),
    "equal norms are skipped": ("(at_most > rank + 1) | ", ""),
    "the present norm does not count": ("known = tl.where(is_finite, 1, 0)", "known = 0"),
    "norms that are not finite count": ("(bits >= 0) & (bits < LARGEST)", "(bits >= 0)"),
    "beyond what is recorded": ("tl.load(counts_ptr), capacity)", "capacity, capacity)"),
    "no bound": ("tl.minimum(threshold, max_norm)", "threshold"),
    "the lowest bit is forgotten": ("in range(31)", "in range(30)"),
    "the highest bit is forgotten": ("in range(31)", "in range(1, 31)"),
    "recorded as scaled": ('if NONFINITE == "spare":', 'if NONFINITE == "never":'),
}


def check_all(module: object) -> None:
    for steps in (0, 1, 9, 30):
        check(random(steps), 0.7, 33.3, module=module)
    check([1.0] * 9 + [2.0] * 9, 3.0, 40, module=module)
    check([1.0, 1 + 2**-23, 1 + 2**-22, 4.0], 3.0, 25, module=module)
    check([2.0, 2.5, 3.0], 900.0, 50, module=module)
    check([NAN, INF, 2.0], INF, 60, module=module, spare_nonfinite=True)
    check(random(20), 100.0, 90, max_norm=0.01, module=module)


def test_the_kernel_itself_passes() -> None:
    check_all(gradient_threshold)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    change = ("gradient_threshold.py", *MUTANTS[name], 1)
    with (
        mutated(*change, module="gradient_threshold") as module,
        pytest.raises(AssertionError),
    ):
        check_all(module)
