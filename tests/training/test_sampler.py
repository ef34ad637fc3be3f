"""LengthBucketSampler: every sample once, little padding, the same number of batches everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastrnn.training import LengthBucketSampler, collate_ragged


def samplers(lengths: Any, replicas: int, batch_size: int, **options: Any) -> list[Any]:
    options |= {"num_replicas": replicas, "batch_size": batch_size}
    return [LengthBucketSampler(lengths, rank=rank, **options) for rank in range(replicas)]


@given(
    lengths=st.lists(st.integers(0, 50), min_size=4, max_size=60),
    batch_size=st.integers(1, 7),
    replicas=st.integers(1, 4),
    pool=st.integers(1, 3),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_each_sample_once_and_as_many_batches_on_every_rank(
    lengths: list[int], batch_size: int, replicas: int, pool: int, shuffle: bool, epoch: int
) -> None:
    ranks = samplers(lengths, replicas, batch_size, pool_batches=pool, shuffle=shuffle)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    epochs = [list(sampler) for sampler in ranks]
    assert sorted(i for batches in epochs for batch in batches for i in batch) == list(
        range(len(lengths))
    )
    assert {len(batches) for batches in epochs} == {len(ranks[0])}
    sizes = [len(batch) for batches in epochs for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (1 if replicas > 1 else 0)


@given(count=st.integers(8, 60), batch_size=st.integers(1, 4), replicas=st.integers(1, 2))
def test_drop_last_leaves_full_batches(count: int, batch_size: int, replicas: int) -> None:
    ranks = samplers(list(range(count)), replicas, batch_size, drop_last=True)
    epochs = [list(sampler) for sampler in ranks]
    seen = [i for batches in epochs for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == count - count % (batch_size * replicas)
    assert {len(batch) for batches in epochs for batch in batches} == {batch_size}
    assert {len(batches) for batches in epochs} == {len(ranks[0])}


def padding(lengths: torch.Tensor, batches: list[list[int]]) -> int:
    return sum(int(lengths[b].max()) * len(b) - int(lengths[b].sum()) for b in batches)


def test_there_is_less_padding() -> None:
    lengths = torch.randint(1, 500, (3000,))
    bucketed = padding(lengths, list(LengthBucketSampler(lengths, 16)))
    at_random = padding(lengths, list(LengthBucketSampler(lengths, 16, pool_batches=1)))
    assert bucketed < at_random / 20


def test_ranks_are_at_similar_lengths_at_the_same_time() -> None:
    lengths = torch.randint(1, 500, (2000,))
    for batches in zip(*samplers(lengths, 4, 8)):
        means = [float(lengths[batch].double().mean()) for batch in batches]
        assert max(means) - min(means) < 30


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = torch.randint(1, 50, (100,))
    sampler = LengthBucketSampler(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(1)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthBucketSampler(lengths, 8, seed=4)) != first


def test_batches_of_equal_lengths_change_from_epoch_to_epoch() -> None:
    sampler = LengthBucketSampler([5] * 40, 4)
    first = {frozenset(batch) for batch in sampler}
    sampler.set_epoch(1)
    assert {frozenset(batch) for batch in sampler} != first


def test_unshuffled_is_by_length_within_a_pool() -> None:
    sampler = LengthBucketSampler([3, 1, 2, 9, 7, 8, 5], 2, pool_batches=2, shuffle=False)
    assert list(sampler) == [[1, 2], [0, 3], [6, 4], [5]]


def test_serves_a_data_loader() -> None:
    samples = [(torch.zeros(length, 2), length) for length in (3, 1, 2, 4, 4)]
    sampler = LengthBucketSampler([len(x) for x, _ in samples], 2)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate_ragged)  # type: ignore
    assert len(loader) == 3
    assert sorted(length for _, lengths, _ in loader for length in lengths.tolist()) == [
        *(1, 2, 3, 4, 4)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"pool_batches": 0}, "pool_batches must be at least 1, got 0"),
        ({"rank": 2, "num_replicas": 2}, "got rank 2 of 2 replicas"),
        ({"num_replicas": 6}, "at least 6 samples, 1 for each of 6 replicas, got 5"),
        ({"batch_size": 3, "num_replicas": 2, "drop_last": True}, "at least 6 samples, 3 for each"),
        ({"lengths": torch.ones(2, 2)}, r"integers of shape \[number of samples\], got \[2, 2\]"),
        ({"lengths": torch.ones(2)}, "of torch.float32"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LengthBucketSampler(**({"lengths": [1, 2, 3, 4, 5], "batch_size": 2} | options))
