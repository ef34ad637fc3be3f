"""collate_ragged: padded batch, lengths and targets."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from fastrnn.training import collate_ragged


def test_pads_with_zeros_to_the_longest_sequence() -> None:
    samples = [(torch.full((steps, 3), 7.0), target) for steps, target in ((2, 5), (4, 0), (0, 1))]
    x, lengths, targets = collate_ragged(samples)
    assert x.shape == (3, 4, 3)
    assert lengths.tolist() == [2, 4, 0]
    assert targets.tolist() == [5, 0, 1]
    for row, length in zip(x, lengths):
        assert (row[:length] == 7).all()
        assert (row[length:] == 0).all()


def test_serves_a_data_loader() -> None:
    samples = [(torch.randn(1 + i, 2), i) for i in range(5)]
    batches = list(DataLoader(samples, batch_size=2, collate_fn=collate_ragged))  # type: ignore
    assert [lengths.tolist() for _, lengths, _ in batches] == [[1, 2], [3, 4], [5]]


def test_keeps_the_dtype() -> None:
    x, lengths, _ = collate_ragged([(torch.randn(3, 2, dtype=torch.float64), 0)])
    assert (x.dtype, lengths.dtype) == (torch.float64, torch.int64)


def test_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        collate_ragged([])


@pytest.mark.parametrize("shape", [(4, 2), (4,), (1, 4, 3)], ids=str)
def test_names_the_sample_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[T, 3\] .* in sample 1"):
        collate_ragged([(torch.randn(4, 3), 0), (torch.randn(shape), 0)])
