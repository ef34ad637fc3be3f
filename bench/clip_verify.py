"""Which sides of the clip benchmark are right; where fastrnn is not, nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.clip_cases import true_norm
from bench.clip_providers import EPSILON, Clip, Step, clips
from bench.measure import Failed
from bench.results_file import Record


def verified_clips(
    record: Record, parameters: Sequence[Tensor], max_norm: float
) -> dict[str, Clip]:
    """The sides that are right; fastrnn must be.

    Raises:
        Failed: fastrnn's norm is farther from the true one than torch's, or a gradient is not
            scaled by the coefficient.
    """
    truth, originals = true_norm(parameters), [p.grad for p in parameters]
    device, dtype = parameters[0].device, parameters[0].dtype
    sides, errors, wrong = clips(device), {}, {}
    for name, side in sides.items():
        for parameter, original in zip(parameters, originals):
            parameter.grad = original.clone()
        norm = side(parameters, max_norm)
        errors[name] = abs(float(norm) - truth) / truth
        coefficient = torch.clamp(max_norm / (norm + EPSILON), max=1.0)
        # On the CPU to the bit; a GPU's kernels multiply in float32 and round once.
        tolerance = 0.0 if device.type == "cpu" else 2 * torch.finfo(dtype).eps
        for parameter, original in zip(parameters, originals):
            if not torch.allclose(parameter.grad, original * coefficient, tolerance, 0.0):
                wrong[name] = (
                    f"gradients of {list(parameter.shape)} are not scaled by {coefficient}"
                )
    for parameter, original in zip(parameters, originals):
        parameter.grad = original
    allowed = errors["foreach"] + 2 * torch.finfo(dtype).eps
    for name, error in errors.items():
        if not error <= allowed:
            wrong.setdefault(name, f"the norm is off by {error:.1e}, torch's by {allowed:.1e}")
    record["verification"] = {"reference": "float64", "errors": errors, "budget": allowed}
    return _without_wrong(record, sides, wrong)


def verified_steps(
    record: Record, parameters: Sequence[Tensor], max_norm: float
) -> dict[str, Clip]:
    """The same for clip and step; AdamW's first moment shows the scale, its first step does not.

    Raises:
        Failed: the moments are farther from the true ones than torch's, or the parameters differ
            from those after torch's clip and step.
    """
    originals = [(p.detach().clone(), p.grad.clone()) for p in parameters]
    coefficient = min(max_norm / (true_norm(parameters) + EPSILON), 1.0)
    stepped: dict[str, list[Tensor]] = {}
    errors, wrong = {}, {}
    for name in Step.NAMES:
        step = Step(parameters, max_norm)
        step.side(name)(parameters, max_norm)
        share = 1.0 - step.optimizer.defaults["betas"][0]
        errors[name] = max(
            _difference(step.optimizer.state[p]["exp_avg"], grad.double() * (share * coefficient))
            for p, (_, grad) in zip(parameters, originals)
        )
        stepped[name] = [p.detach().clone() for p in parameters]
        for parameter, (value, grad) in zip(parameters, originals):
            parameter.detach().copy_(value)
            parameter.grad = grad.clone()
    # The step divides by the inverse where torch multiplies.
    allowed = errors["foreach"] + 2.0**-20
    for name, values in stepped.items():
        apart = max(map(_difference, values, stepped["foreach"]))
        if not max(errors[name], apart) <= allowed:
            wrong[name] = (
                f"moments are off by {errors[name]:.1e} and parameters differ from torch's by "
                f"{apart:.1e} (budget {allowed:.1e})"
            )
    record["verification"] = {"reference": "float64", "errors": errors, "budget": allowed}
    step = Step(parameters, max_norm)
    return _without_wrong(record, {name: step.side(name) for name in Step.NAMES}, wrong)


def _difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def _without_wrong(
    record: Record, sides: dict[str, Clip], wrong: dict[str, str]
) -> dict[str, Clip]:
    if "fastrnn" in wrong:
        raise Failed(f"fastrnn: {wrong['fastrnn']}")
    record["wrong"] = wrong
    return {name: side for name, side in sides.items() if name not in wrong}
