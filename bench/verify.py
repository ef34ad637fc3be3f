"""Are the results right? By budget: no more than twice the error that nn.LSTM itself makes.

All errors are against nn.LSTM in float64, on the device that is measured, with the weights and
inputs that the case's dtype can hold; and of a tensor's largest magnitude. A tensor may be off by

    2 * (error of nn.LSTM in the case's dtype + rounding)

where nn.LSTM's error is the largest of all outputs, or of all gradients: a single tensor's may be
small by luck. In float64, where nn.LSTM is its own reference, rounding is all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Of one value in 16 bits. float32: of sums of thousands of terms in another order than nn.LSTM's
# (on the CPU fastrnn's were off by up to 1.1e-6 where nn.LSTM's were by 4.4e-7).
ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TF32_ROUNDING = 2.0**-11


class Verdict(NamedTuple):
    """The tensor that comes nearest to its budget, or exceeds it most."""

    tensor: str
    error: float
    budget: float

    @property
    def within(self) -> bool:
        return self.error <= self.budget


def errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Each tensor's largest error over its largest magnitude; inf for NaN or another shape."""
    found = {}
    for name, expected in truth.items():
        got = results[name].to(expected.dtype)
        if got.shape != expected.shape:
            found[name] = math.inf
            continue
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        error = float((got - expected).abs().max() / scale)
        found[name] = math.inf if math.isnan(error) else error
    return found


def budgets(
    reference: Mapping[str, Tensor], truth: Mapping[str, Tensor], rounding: float
) -> dict[str, float]:
    """What each tensor may be off by.

    Args:
        reference: nn.LSTM's results in the case's dtype, by name; gradients begin with ``d_``.
        truth: the same in float64.
        rounding: of :data:`ROUNDING`, or :data:`TF32_ROUNDING`.

    Raises:
        ValueError: the reference's own results are not finite, and so can judge nothing.
    """
    found = errors(reference, truth)
    if not all(map(math.isfinite, found.values())):
        raise ValueError("nn.LSTM's own results are not finite in this dtype")
    worst = {False: 0.0, True: 0.0}  # of outputs, of gradients
    for name, error in found.items():
        worst[name.startswith("d_")] = max(worst[name.startswith("d_")], error)
    return {name: 2 * (worst[name.startswith("d_")] + rounding) for name in found}


def judge(
    results: Mapping[str, Tensor], truth: Mapping[str, Tensor], allowed: Mapping[str, float]
) -> Verdict:
    """Compare with the truth."""
    verdicts = [Verdict(name, e, allowed[name]) for name, e in errors(results, truth).items()]
    return max(verdicts, key=lambda verdict: verdict.error / verdict.budget)
