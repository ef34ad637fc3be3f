"""What a clip did, step after step: a ring on the gradients' device, read when somebody asks.

To record a step launches a few operations and waits for nothing; to read waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class History(NamedTuple):
    """The latest recorded steps, oldest first, on the CPU.

    S steps; tensors are `[S]`, or `[S, groups]` where a clipper has several groups.

    Attributes:
        step: the step's number, from 0, `[S]` int64.
        norm: the total norm before clipping.
        max_norm: the threshold in force.
        coefficient: by which gradients were scaled, at most 1; NaN also where the step was not
            taken.
        clipped: whether the coefficient was below 1.
        nonfinite: whether the norm was infinite or NaN.
    """

    step: Tensor
    norm: Tensor
    max_norm: Tensor
    coefficient: Tensor
    clipped: Tensor
    nonfinite: Tensor


class Ring:
    """The last `capacity` steps of a clipper with `groups` thresholds.

    Args:
        capacity: how many steps are kept, at least 1.
        groups: how many norms a step has.
    """

    def __init__(self, capacity: int, groups: int) -> None:
        self.capacity = capacity
        self.groups = groups
        # norm, threshold and coefficient of each group; a row never written is NaN.
        self._rows = torch.full((capacity, groups, 3), math.nan, dtype=torch.float32)
        # Steps recorded; those of them with a norm that was not finite; how many such came last, in
        # a row. On the device, so that a replayed CUDA graph counts too.
        self._counts = torch.zeros(3, dtype=torch.int64)
        # Steps on the CPU: to append numbers to a list costs less there than one tensor operation.
        self._unwritten: list[tuple[tuple[float, float, float], ...]] = []
        # What the host knows without waiting: at most so many rows are written, and at most so
        # many steps that were not finite came last.
        self._rows_written = 0
        self._nonfinite_in_a_row = 0

    def record(self, norms: Tensor, thresholds: Tensor, coefficients: Tensor) -> None:
        """Write a step.

        Args:
            norms: before clipping `[groups]`.
            thresholds: the max_norm in force `[groups]`.
            coefficients: by which gradients are scaled `[groups]`.
        """
        if not norms.is_cpu:
            self._record_on_device(norms, thresholds, coefficients)
            return
        found = norms.tolist()
        self._unwritten.append(tuple(zip(found, thresholds.tolist(), coefficients.tolist())))
        finite = all(map(math.isfinite, found))
        self._nonfinite_in_a_row = 0 if finite else self._nonfinite_in_a_row + 1
        if len(self._unwritten) == self.capacity:
            self._write()

    def tensors_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what a kernel on a device writes a step to, and count the step as written.

        Returns:
            Rows of norm, threshold and coefficient `[capacity, groups, 3]` float32, and counts
            `[3]` int64: of steps, of those that were not finite, and of those that came last.
        """
        self._write()
        if self._rows.device != device:
            self._rows = self._rows.to(device)
            self._counts = self._counts.to(device)
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._rows_written += self.capacity if captured else 1  # it may be replayed at any time
        self._nonfinite_in_a_row += 1
        return self._rows, self._counts

    def _record_on_device(self, norms: Tensor, thresholds: Tensor, coefficients: Tensor) -> None:
        rows, counts = self.tensors_on(norms.device)
        row = torch.stack((norms, thresholds, coefficients), dim=1).to(rows.dtype)
        rows.index_copy_(0, counts[:1].remainder(self.capacity), row[None])
        nonfinite = norms.isfinite().all().logical_not()
        counts[0].add_(1)
        counts[1].add_(nonfinite)
        counts[2].add_(1).mul_(nonfinite)

    def _write(self) -> None:
        """Write to the ring what waits for it."""
        if not self._unwritten:
            return
        rows = torch.tensor(self._unwritten, dtype=torch.float32)
        steps = self._counts[0].item()
        self._rows[torch.arange(steps, steps + len(rows)) % self.capacity] = rows
        self._counts[0] += len(rows)
        self._counts[1] += rows[:, :, 0].isfinite().all(dim=1).logical_not().sum()
        self._counts[2] = self._nonfinite_in_a_row
        self._rows_written += len(rows)
        self._unwritten.clear()

    def percentile(self, percent: float, norms: Tensor | None = None) -> Tensor:
        """Return the percentile of each group's finite norms `[groups]`; NaN if there are none.

        It sorts what is recorded.

        Args:
            percent: from 0 to 100; between two norms it is interpolated.
            norms: one more step's `[groups]`, which is not recorded.
        """
        self._write()
        known = self._rows[: self._rows_written, :, 0]
        if norms is not None:
            known = torch.cat((known.to(norms.device), norms.to(known.dtype)[None]))
        if not len(known):
            return known.new_full((self.groups,), math.nan)
        finite = known.isfinite()
        count = finite.sum(dim=0)
        ordered = known.where(finite, math.inf).sort(dim=0).values
        place = (count - 1).clamp(min=0) * (percent / 100)
        below, above = (
            ordered.gather(0, index.long()[None])[0] for index in (place.floor(), place.ceil())
        )
        return torch.lerp(below, above, place.frac().to(below.dtype)).where(count > 0, math.nan)

    def counts(self) -> tuple[int, int]:
        """Return the number of steps recorded, and of those that were not finite. Waits."""
        self._write()
        steps, nonfinite, _ = self._counts.tolist()
        return steps, nonfinite

    def nonfinite_in_a_row(self, least: int) -> int:
        """Return how many steps that were not finite came last, or 0 where fewer than `least` did.

        Waits for the device only where it may be so many: once in `least` steps.
        """
        if self._nonfinite_in_a_row >= least:
            self._write()
            self._nonfinite_in_a_row = int(self._counts[2].item())
        return self._nonfinite_in_a_row if self._nonfinite_in_a_row >= least else 0

    def read(self) -> History:
        """Return what is kept. Waits for the device."""
        steps, _ = self.counts()
        rows = self._rows.cpu()
        kept = min(steps, self.capacity)
        numbers = torch.arange(steps - kept, steps)
        rows = rows[numbers % self.capacity]
        norm, max_norm, coefficient = (rows[:, 0] if self.groups == 1 else rows).unbind(-1)
        return History(
            numbers, norm, max_norm, coefficient, coefficient < 1, norm.isfinite().logical_not()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors."""
        self._write()
        return {"rows": self._rows.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved ring.

        Raises:
            ValueError: it is of another capacity, or another number of groups.
        """
        rows, counts = state["rows"], state["counts"]
        counts = torch.cat((counts, counts.new_zeros(3 - len(counts))))  # of an earlier version: 2
        if rows.shape != self._rows.shape:
            capacity, groups = rows.shape[:2]
            raise ValueError(
                f"the saved history is of {capacity} steps and {groups} groups, this one of "
                f"{self.capacity} and {self.groups}; create the GradientClipper as it was when "
                "it was saved"
            )
        self._unwritten.clear()
        self._rows = rows.to(self._rows.device, torch.float32, copy=True)
        self._counts = counts.to(self._counts.device, copy=True)
        self._rows_written, _, self._nonfinite_in_a_row = counts.tolist()
