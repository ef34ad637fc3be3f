"""The state before each row: that of the step before, or h_0."""

from __future__ import annotations

import pytest
import torch

from fastrnn_kernels.previous_states import previous_states
from fastrnn_kernels.reference import Rows
from tests.interpreter import cooperative
from tests.kernels.problems import ROWS, Problem

pytestmark = pytest.mark.interpreter


def expected(h: torch.Tensor, h_0: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Sequence by sequence, in the order of each direction."""
    N, D, H = h.shape
    found = torch.zeros(D, N, H)
    offsets = rows.offsets.tolist()
    for direction in range(D):
        for sequence, length in enumerate(rows.lengths):
            own = [offsets[step] + sequence for step in range(length)]
            before = h_0[direction, sequence]
            for row in own if direction == 0 else reversed(own):
                found[direction, row] = before
                before = h[row, direction]
    return found


@pytest.mark.parametrize("H", [1, 13, 130])
@pytest.mark.parametrize("D", [1, 2], ids=["D1", "D2"])
@pytest.mark.parametrize("layout", ROWS)
def test_every_row_of_every_layout(layout: str, D: int, H: int) -> None:
    problem = Problem(ROWS[layout], H, D)
    h, h_0 = problem._random_rows(1, D, H), problem._random(2, D, problem.S, H)
    rows = problem.rows
    with cooperative():
        found = previous_states(h, h_0, rows.batch_sizes, rows.offsets)
    assert torch.equal(found, expected(h, h_0, rows))  # zero beyond the valid ones, whatever h is


def test_nothing_is_launched_without_steps_or_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert previous_states(torch.zeros(0, 1, 4), torch.zeros(1, 2, 4), none, none).shape == (
        1,
        0,
        4,
    )
    assert not previous_states(torch.ones(3, 1, 4), torch.ones(1, 2, 4), none, none).any()
