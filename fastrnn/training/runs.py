"""Which steps of a decoder can run in one call: the plan of a teacher-forced batch.

A *run* is a step whose input comes from the model, or the first step, and all forced steps after it
up to the next such step. Round k has the k-th run of each sequence that has so many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """The runs that go through the LSTM together. A sequences have one in this round.

    Attributes:
        rows: `[A]`, their places in the batch, ascending.
        kept: `[A]`, their places among the previous round's (the batch's, in the first round).
        begins: `[A]`, the step at which each run begins.
        lengths: `[A]`, its steps, at least 1.
    """

    rows: Tensor
    kept: Tensor
    begins: Tensor
    lengths: Tensor

    @property
    def steps(self) -> Tensor:
        """`[A, R]`: the step of each column of the padded runs; beyond a run's end, its last."""
        offsets = torch.arange(int(self.lengths.max()))
        return self.begins[:, None] + torch.minimum(offsets, self.lengths[:, None] - 1)

    @property
    def valid(self) -> Tensor | None:
        """`[A, R]`: which columns are steps; None: all, because the runs are equally long."""
        within = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        return None if within.all() else within


def plan_runs(forced: Tensor, lengths: Tensor) -> list[Round]:
    """Divide the valid steps of a batch into rounds.

    Args:
        forced: bool `[B, T]`, on the CPU: whether a step's input is a target. The first step's
            input is known in any case.
        lengths: `[B]` in [0, T], on the CPU.

    Returns:
        As many rounds as the sequence with the most runs has; none if all lengths are 0.
    """
    batch, steps = forced.shape
    begins = ~forced
    begins[:, 0] = True
    begins &= torch.arange(steps) < lengths[:, None]
    counts = begins.sum(1)
    # bounds[b, k] is where run k of sequence b begins, and where run k - 1 ends.
    bounds = lengths[:, None].repeat(1, int(counts.max()) + 1)
    row, step = begins.nonzero(as_tuple=True)
    bounds[row, (begins.cumsum(1) - 1)[row, step]] = step
    rounds: list[Round] = []
    rows = torch.arange(batch)
    for k in range(bounds.shape[1] - 1):
        kept = (counts[rows] > k).nonzero().flatten()
        rows = rows[kept]
        rounds.append(Round(rows, kept, bounds[rows, k], bounds[rows, k + 1] - bounds[rows, k]))
    return rounds
