"""Standardize: mean and deviation of valid steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrnn.training import Standardize


def ragged() -> list[Tensor]:
    return [3 + 5 * torch.randn(steps, 4) for steps in (7, 1, 0, 30)]


def test_valid_steps_get_mean_0_and_variance_1() -> None:
    sequences = ragged()
    standardize = Standardize.fit(sequences)
    steps = torch.cat([standardize(sequence) for sequence in sequences])
    torch.testing.assert_close(steps.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.var(0, correction=0), torch.ones(4))


def test_each_step_counts_once_however_long_its_sequence_is() -> None:
    sequences = ragged()
    whole, split = Standardize.fit(sequences), Standardize.fit([torch.cat(sequences)])
    assert torch.equal(whole.mean, split.mean)
    assert torch.equal(whole.std, split.std)


def test_a_constant_feature_becomes_zero() -> None:
    standardize = Standardize.fit([torch.full((9, 1), 0.1)])
    assert standardize.std.item() == 1
    assert standardize(torch.full((9, 1), 0.1)).abs().max() < 1e-7


def test_state_dict_carries_it_over() -> None:
    standardize = Standardize.fit(ragged())
    other = Standardize(4)
    other.load_state_dict(standardize.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(standardize(x), other(x))
    assert not list(standardize.parameters())


def test_keeps_the_dtype() -> None:
    standardize = Standardize.fit([torch.randn(5, 2, dtype=torch.float64)])
    assert standardize(torch.randn(5, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([], "got none"),
        ([torch.zeros(3)], r"got \[3\]"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], r"got \[3, 2\], \[3, 4\]"),
        ([torch.zeros(0, 2)], "at least one step"),
        ([torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])], "got 2 values"),
    ],
    ids=["none", "vector", "features", "empty", "nan"],
)
def test_refuses(sequences: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Standardize.fit(sequences)
