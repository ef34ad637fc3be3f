"""What ``python -m bench clip`` times: so many gradients of so many elements, clipped or not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_TENSORS = (1, 10, 100, 1000)
CPU_ELEMENTS = (1, 1_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
GPU_TENSORS = (1, 10, 150, 1000)
GPU_ELEMENTS = (150_000, 1_000_000, 10_000_000, 100_000_000)
STEP_TENSORS = (10, 150)
TOY_ELEMENTS = 1_000


@dataclass(frozen=True)
class ClipCase:
    """One row of the table.

    Attributes:
        tensors: how many gradients.
        elements: in all of them.
        clipped: the norm is above the threshold.
        step: a step of fused AdamW follows.
    """

    tensors: int
    elements: int
    clipped: bool
    dtype: torch.dtype = torch.float32
    step: bool = False

    @property
    def section(self) -> str:
        return "clip-and-step" if self.step else "clip"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        clipped = "clipped" if self.clipped else "unclipped"
        sizes = f"{self.tensors}tensors-{self.elements}elements"
        return f"{self.section}/{sizes}-{self.dtype_name}-{clipped}"


def make_parameters(case: ClipCase, device: torch.device) -> list[Tensor]:
    """Parameters of zeros, with gradients drawn from a normal distribution."""
    size = case.elements // case.tensors
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(case.tensors):
        parameter = torch.zeros(size, dtype=case.dtype, device=device, requires_grad=True)
        parameter.grad = torch.randn(size, generator=generator).to(device, case.dtype)
        parameters.append(parameter)
    return parameters


def true_norm(parameters: Iterable[Tensor]) -> float:
    """The norm in float64."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
