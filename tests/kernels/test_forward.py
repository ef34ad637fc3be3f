"""The forward kernel against the float64 reference, through the cooperative interpreter."""

from __future__ import annotations

import pytest
import torch

from fastrnn_kernels.tiling import Tile
from tests.interpreter import Schedule, schedules
from tests.kernels.problems import (
    FORWARD_NAMES,
    RAGGED,
    Problem,
    assert_within_budget,
    problems_and_tiles,
    run_forward,
    tile_for,
)

pytestmark = pytest.mark.interpreter

CASES = problems_and_tiles()


@pytest.mark.parametrize(
    ("problem", "tile"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_forward_matches_float64(problem: Problem, tile: Tile) -> None:
    result = run_forward(problem, tile)
    for name in FORWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)


@pytest.mark.parametrize("schedule", schedules(), ids=str)
@pytest.mark.parametrize("residency", ["split", "streamed"])
def test_forward_does_not_depend_on_the_order_of_programs(
    residency: str, schedule: Schedule
) -> None:
    problem = Problem(RAGGED, H=13, D=2)
    tile = tile_for(problem, residency, BLOCK_B=8, BLOCK_H=4)
    result = run_forward(problem, tile, schedule)
    for name in FORWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)
    again = run_forward(problem, tile)
    for name in ("h", "h_n", "c_n", "c"):
        assert torch.equal(getattr(result, name), getattr(again, name))


def test_rows_beyond_the_valid_ones_are_zero() -> None:
    problem = Problem(RAGGED, H=5, D=2, spare=11)
    result = run_forward(problem, tile_for(problem, "split"))
    assert result.h[problem.rows.N :].eq(0).all()
    assert result.c[problem.rows.N :].eq(0).all()


def test_sequences_of_length_zero_keep_their_state() -> None:
    problem = Problem(RAGGED, H=5, D=2)
    _, _, h_0, c_0 = problem.inputs()
    result = run_forward(problem, tile_for(problem, "split"))
    assert torch.equal(result.h_n[:, -2:], h_0[:, -2:])
    assert torch.equal(result.c_n[:, -2:], c_0[:, -2:])


@pytest.mark.parametrize("save", ["gates", "cells", "nothing"])
def test_save_keeps_what_it_says(save: str) -> None:
    problem = Problem(RAGGED, H=5, D=1)
    tile = tile_for(problem, "split")
    result = run_forward(problem, tile, save=save)
    everything = run_forward(problem, tile)
    assert (result.gates is not None) == (save == "gates")
    assert (result.c is not None) == (save != "nothing")
    assert torch.equal(result.h, everything.h)
    if result.c is not None:
        assert torch.equal(result.c, everything.c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [7, 33])
def test_the_rule_s_own_tile(H: int, dtype: torch.dtype) -> None:
    problem = Problem(RAGGED, H=H, D=2, dtype=dtype)
    result = run_forward(problem, tile=None)
    for name in FORWARD_NAMES:
        assert_within_budget(name, getattr(result, name), problem)


def test_inputs_are_not_written_to() -> None:
    problem = Problem(RAGGED, H=5, D=2)
    before = problem.inputs()
    given = tuple(x.clone() for x in before)
    from fastrnn_kernels.lstm_forward import lstm_forward
    from tests.interpreter import cooperative

    with cooperative():
        lstm_forward(
            *given,
            problem.rows.batch_sizes,
            problem.rows.offsets,
            save="gates",
            tile=tile_for(problem, "split"),
        )
    for x, y in zip(given, before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("empty", ["T", "S", "H"])
def test_nothing_to_do(empty: str) -> None:
    from fastrnn_kernels.lstm_forward import lstm_forward

    T, S, H = (0 if empty == name else 2 for name in "TSH")
    gates_x = torch.zeros(0 if empty in "TS" else T * S, 1, 4 * H)
    h_0, c_0 = torch.ones(1, S, H), torch.full((1, S, H), 2.0)
    sizes = torch.full((T,), S, dtype=torch.int64)
    weight_hh = torch.zeros(1, 4 * H, H)
    result = lstm_forward(
        gates_x, weight_hh, h_0, c_0, sizes, sizes.cumsum(0) - sizes, save="gates"
    )
    assert result.h.shape == (gates_x.shape[0], 1, H)
    assert torch.equal(result.h_n, h_0)
    assert torch.equal(result.c_n, c_0)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("gates_x", lambda x: x[:, 0], "gates must have shape"),
        ("gates_x", lambda x: x.double(), "float32, bfloat16 or float16"),
        ("gates_x", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
        ("weight_hh", lambda x: x[:, 1:], "weight_hh must have shape"),
        ("h_0", lambda x: x.half(), "h_0 must have dtype"),
        ("c_0", lambda x: x[0], "c_0 must have shape"),
        ("batch_sizes", lambda x: x.int(), "batch_sizes must have dtype"),
        ("offsets", lambda x: x[1:], "offsets must have shape"),
    ],
)
def test_errors_say_what_was_expected(argument: str, change: object, message: str) -> None:
    from fastrnn_kernels.lstm_forward import lstm_forward

    problem = Problem(RAGGED, H=5, D=2)
    names = ("gates_x", "weight_hh", "h_0", "c_0")
    given = dict(zip(names, problem.inputs(), strict=True))
    given |= {"batch_sizes": problem.rows.batch_sizes, "offsets": problem.rows.offsets}
    given[argument] = change(given[argument])
    with pytest.raises(ValueError, match=message):
        lstm_forward(**given, save="gates")
