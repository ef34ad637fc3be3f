"""plan_runs: every valid step in one run, in order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn.training.runs import plan_runs


@st.composite
def batches(draw):
    batch, steps = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    coins = draw(st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps))
    lengths = draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    return torch.tensor(coins).view(batch, steps), torch.tensor(lengths)


@given(batches())
def test_rounds_cover_every_valid_step_once_and_in_order(problem) -> None:
    forced, lengths = problem
    done = torch.zeros_like(lengths)
    before = torch.arange(len(lengths))
    for number, run in enumerate(plan_runs(forced, lengths)):
        assert torch.equal(before[run.kept], run.rows)
        assert torch.equal(run.begins, done[run.rows])
        assert run.lengths.min() > 0
        valid = run.valid
        for i, (row, begin, length) in enumerate(zip(run.rows, run.begins, run.lengths)):
            assert number == 0 or not forced[row, begin]
            assert forced[row, begin + 1 : begin + length].all()
            columns = run.steps[i] if valid is None else run.steps[i][valid[i]]
            assert columns.tolist() == list(range(begin, begin + length))
        done[run.rows] += run.lengths
        before = run.rows
    assert torch.equal(done, lengths)


@given(batches())
def test_as_many_rounds_as_runs_of_the_sequence_with_most(problem) -> None:
    forced, lengths = problem
    runs = [
        1 + sum(not coin for coin in coins[1:length].tolist())
        for coins, length in zip(forced, lengths.tolist())
        if length
    ]
    assert len(plan_runs(forced, lengths)) == max(runs, default=0)
