"""Parameters with gradients, for the tests of GradientClipper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = [(5, 3), (7,), (1, 65), ()]


def parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes or SHAPES
    ]
    set_gradients(made, seed)
    return made


def set_gradients(made: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in made:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def spoil(made: list[nn.Parameter], value: float = math.nan) -> None:
    made[1].grad.view(-1)[3] = value


def gradients(made: list[nn.Parameter]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in made]


def assert_bits(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
