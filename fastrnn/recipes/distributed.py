"""Data-parallel training: `torchrun --nproc_per_node=N -m fastrnn RECIPE`.

Each of the N processes, a rank, reads every batch, draws the same random numbers, and trains on its
rows of the batch; DistributedDataParallel averages the gradients. So the batches, and the losses
but for rounding, are those of one process, whatever N is. Rank 0 alone prints and writes.

Limits: dropout would draw the same mask on every rank. Reading every batch on every rank is cheap
for data of this size; where it is not, see :class:`fastrnn.training.LengthBucketSampler`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastrnn.recipes.device import find_device


@dataclass(frozen=True)
class World:
    """The processes that train together; without torchrun, this one alone.

    Args:
        rank: of this process.
        size: N, how many there are.
        local_rank: of this process on its machine, which says which GPU is its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device `name`; where it is just `cuda`, each rank has a GPU of its own.

        Raises:
            RecipeError: torch does not know the device, or cannot use it here.
        """
        if name == "cuda" and self.size > 1:
            name = f"cuda:{self.local_rank}"
        device = find_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def replicate(self, model: nn.Module) -> nn.Module:
        """The module to call in training: its backward leaves the ranks' mean gradient."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def share(self, rows: int, valid: Tensor | None = None) -> tuple[slice, float]:
        """This rank's part of a batch that every rank has.

        ```
        mine, weight = world.share(len(x))
        loss = weight * F.cross_entropy(model(x[mine]), targets[mine])
        ```

        Args:
            rows: B, sequences in the batch.
            valid: ``[B]``, over how many values the loss takes its mean in each row, not all 0.
                Default: the same number in each.

        Returns:
            The rows, and the weight of the mean over them, such that the ranks' mean of
            `weight * mean over their rows` is the mean over the batch: unequal shares count as much
            as they hold. Where B is less than N, a rank without a row of its own is given the first
            with weight 0, because DistributedDataParallel waits for every rank's backward.
        """
        begin, end = (rank * rows // self.size for rank in (self.rank, self.rank + 1))
        if valid is None:
            weight = self.size * (end - begin) / rows
        else:
            weight = self.size * float(valid[begin:end].sum()) / float(valid.sum())
        return slice(begin, end) if begin < end else slice(0, 1), weight

    def mean(self, values: Tensor) -> Tensor:
        """The ranks' mean of a tensor that each of them has; every rank must call it."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values


ALONE = World()


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    None leaves before all have come to the end, so what rank 0 writes is there for all of them.
    Where the process group is there already, it is used and left as it is.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield ALONE
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), local_rank)
        dist.barrier()
        return
    dist.init_process_group()  # of every backend torch has here: gloo for the CPU, nccl for GPUs
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()
