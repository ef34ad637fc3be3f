"""The backward kernel against autograd in float64, through the cooperative interpreter."""

from __future__ import annotations

import pytest
import torch

from fastrnn_kernels.lstm_backward import lstm_backward
from fastrnn_kernels.tiling import Tile
from tests.interpreter import Schedule, cooperative, schedules
from tests.kernels.problems import (
    BACKWARD_NAMES,
    RAGGED,
    Problem,
    assert_within_budget,
    backward_inputs,
    problems_and_tiles,
    run_backward,
    tile_for,
)

pytestmark = pytest.mark.interpreter

CASES = problems_and_tiles()


@pytest.mark.parametrize(
    ("problem", "tile"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_backward_matches_float64(problem: Problem, tile: Tile) -> None:
    result = run_backward(problem, tile)
    for name in BACKWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)


@pytest.mark.parametrize("schedule", schedules(), ids=str)
@pytest.mark.parametrize("residency", ["split", "streamed"])
def test_backward_does_not_depend_on_the_order_of_programs(
    residency: str, schedule: Schedule
) -> None:
    problem = Problem(RAGGED, H=13, D=2)
    tile = tile_for(problem, residency, BLOCK_B=8, BLOCK_H=4)
    result = run_backward(problem, tile, schedule)
    again = run_backward(problem, tile)
    for name in BACKWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)
        assert torch.equal(getattr(result, name), getattr(again, name))


@pytest.mark.parametrize("residency", ["whole", "split"])
def test_cell_states_may_have_no_gradient(residency: str) -> None:
    problem = Problem(RAGGED, H=5, D=2)
    result = run_backward(problem, tile_for(problem, residency), has_d_c=False)
    for name in BACKWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem, has_d_c=False)


def test_rows_beyond_the_valid_ones_are_zero() -> None:
    problem = Problem(RAGGED, H=5, D=2, spare=11)
    result = run_backward(problem, tile_for(problem, "split"))
    assert result.d_gates[problem.rows.N :].eq(0).all()


def test_nothing_given_is_written_to() -> None:
    problem = Problem(RAGGED, H=5, D=2)
    given, before = backward_inputs(problem), backward_inputs(problem)
    with cooperative():
        lstm_backward(**given, tile=tile_for(problem, "split"))
    for name, value in given.items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [7, 33])
def test_the_rule_s_own_tile(H: int, dtype: torch.dtype) -> None:
    problem = Problem(RAGGED, H=H, D=2, dtype=dtype)
    result = run_backward(problem, tile=None)
    for name in BACKWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)


@pytest.mark.parametrize("name", ["d_h", "d_h_n", "d_c_n", "gates", "c", "weight_hh"])
def test_errors_name_the_argument(name: str) -> None:
    given = backward_inputs(Problem(RAGGED, H=5, D=2))
    given[name] = given[name][..., :-1].contiguous()
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        lstm_backward(**given)
