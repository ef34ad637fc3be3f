"""What is promised of every norm: the same bits again, and grouping changes but rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastrnn import GradientClipper, clip_grad_norm_


def values(elements: int) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(2))


def cut(whole: Tensor, pieces: int) -> list[nn.Parameter]:
    """The same elements as so many gradients of uneven sizes."""
    generator = torch.Generator().manual_seed(pieces)
    cuts = torch.randint(1, len(whole), (pieces - 1,), generator=generator).sort().values
    made = []
    for part in torch.tensor_split(whole, cuts):
        p = nn.Parameter(torch.zeros_like(part))
        p.grad = part.clone()
        made.append(p)
    return made


# torch sums up to 2**22 elements in one go, with an error that grows with their number; see _LONG
# in gradient_norms.
@pytest.mark.parametrize(("elements", "rtol"), [(1_000, 1e-6), (100_000, 5e-6), (5_000_000, 1e-4)])
@pytest.mark.parametrize("pieces", [1, 2, 17, 400])
def test_the_float32_norm_does_not_depend_on_the_grouping(
    pieces: int, elements: int, rtol: float
) -> None:
    whole = values(elements)
    exact = whole.double().norm().item()
    assert clip_grad_norm_(cut(whole, pieces), math.inf).item() == pytest.approx(exact, rel=rtol)
    made = cut(whole, pieces)
    groups = [{"params": made[: len(made) // 2 + 1]}, {"params": made[len(made) // 2 + 1 :]}]
    norm = GradientClipper([g for g in groups if g["params"]], math.inf).clip()
    assert norm.item() == pytest.approx(exact, rel=rtol)


@pytest.mark.parametrize("elements", [100_000, 5_000_000])
def test_the_same_bits_again(elements: int) -> None:
    whole = values(elements)
    runs = []
    for _ in range(3):
        made = cut(whole, 7)
        runs.append([clip_grad_norm_(made, 1.0), *(p.grad for p in made)])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
