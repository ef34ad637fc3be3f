"""Batches of samples of similar length, on one process or on each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Sampler


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of samples of similar length: less padding, less waiting, still in random order.

    In each epoch the samples are shuffled and dealt into pools of `pool_batches` batches; each pool
    is sorted by length and cut into batches; the batches are shuffled. So a batch is ragged by
    about 1 / `pool_batches` of the range of lengths, and no two epochs have the same batches.

    ```
    batches = LengthBucketSampler(lengths, batch_size=32)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=collate_ragged)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, lengths, targets in loader:
            ...
    ```

    Several replicas together go through every sample once an epoch, each through as many batches as
    the others, and the batches of one moment are of similar lengths on all of them, so that none
    waits for another. Each replica draws the same numbers; they need not talk to each other.

    Args:
        lengths: of the samples, ``[number of samples]`` integers, at least 0.
        batch_size: samples in a batch of one replica.
        pool_batches: batches sorted together. 1: no sorting across batches; the larger, the less
            padding and the less chance. Default: 50.
        shuffle: whether the order is random. False: pools and batches in the samples' order, as
            an evaluation wants it. Default: True.
        seed: of the order, the same on every replica. Default: 0.
        drop_last: leave out samples that do not fill a batch on every replica. False: the last
            batch is dealt out evenly; where it has fewer samples than there are replicas, they join
            the batch before, which is then larger by one on some replicas. Default: False.
        rank: of this replica. Default: torch.distributed's if it is initialised, else 0.
        num_replicas: how many there are. Default: likewise, else 1.

    Raises:
        ValueError: an argument out of range, or fewer samples than one for each replica.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        *,
        pool_batches: int = 50,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if grouped else 1
        if rank is None:
            rank = dist.get_rank() if grouped else 0
        self.lengths = torch.as_tensor(lengths).cpu()
        if self.lengths.dim() != 1 or self.lengths.dtype.is_floating_point:
            raise ValueError(
                "lengths must be integers of shape [number of samples], got "
                f"{list(self.lengths.shape)} of {self.lengths.dtype}"
            )
        for name, value in (("batch_size", batch_size), ("pool_batches", pool_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"rank must lie in [0, num_replicas), got rank {rank} of {num_replicas} replicas"
            )
        needed = num_replicas * (batch_size if drop_last else 1)
        if len(self.lengths) < needed:
            raise ValueError(
                f"expected at least {needed} samples, {needed // num_replicas} for each of "
                f"{num_replicas} replicas, got {len(self.lengths)}: use fewer replicas"
                + (", a smaller batch_size, or drop_last=False" if drop_last else "")
            )
        self.batch_size = batch_size
        self.pool_batches = pool_batches
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.num_replicas = num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; the same one on every replica."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The batches of an epoch, the same number on every replica."""
        return len(self._sizes())

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        sizes = self._sizes()
        order = order[: sum(sizes)]
        pool = self.pool_batches * self.batch_size * self.num_replicas
        # Ties stay in random order, or equal lengths would meet the same neighbours in each epoch.
        pools = [part[self.lengths[part].argsort(stable=True)] for part in order.split(pool)]
        batches = torch.cat(pools).split(sizes)
        if self.shuffle:
            turns = torch.randperm(len(batches), generator=generator).tolist()
        else:
            turns = list(range(len(batches)))
        for turn in turns:
            # Dealt out in turn: each replica gets long ones and short ones.
            yield batches[turn][self.rank :: self.num_replicas].tolist()

    def _sizes(self) -> list[int]:
        """Samples of each batch, all replicas together."""
        whole = self.batch_size * self.num_replicas
        batches, rest = divmod(len(self.lengths), whole)
        sizes = [whole] * batches
        if self.drop_last or not rest:
            return sizes
        if rest >= self.num_replicas:
            return [*sizes, rest]
        return [*sizes[:-1], whole + rest]
