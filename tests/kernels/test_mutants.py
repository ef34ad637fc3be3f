"""A test that could not fail is a defect: each of these mutants of the kernels must be caught.

A mutant is a copy of the package with one piece of text replaced. It is caught when a small set of
problems, run under several schedules, shows a wrong result or a deadlock; an error of any other
kind is a mutant that was made wrongly.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest

from fastrnn_kernels.tiling import Tile
from tests.interpreter import Deadlock, RandomOrder, RoundRobin, RunAhead, Starve
from tests.kernels.mutants import mutated
from tests.kernels.problems import (
    BACKWARD_NAMES,
    FORWARD_NAMES,
    ROWS,
    Problem,
    assert_within_budget,
    run_backward,
    run_forward,
    tile_for,
)

pytestmark = pytest.mark.interpreter


@dataclass(frozen=True)
class Mutant:
    """`old` stands `count` times in `file`, and becomes `new`; the pass `which` must notice."""

    name: str
    which: str
    file: str
    old: str
    new: str
    count: int = 1


BARRIER, PRIMITIVES = "grid_barrier.py", "primitives.py"
FORWARD, BACKWARD = "lstm_forward.py", "lstm_backward.py"
TARGET = "(iteration + 1) * tl.num_programs(0)"
WAIT = f"wait(tile_arrivals_ptr, {TARGET}, failed_ptr)"
EARLY, LATE = WAIT.replace(TARGET, f"{TARGET} - 1"), WAIT.replace(TARGET, f"{TARGET} + 1")
MUTANTS = [
    # the barrier
    *(
        Mutant(f"{which}: no barrier", which, file, WAIT, "pass")
        for which, file in (("forward", FORWARD), ("backward", BACKWARD))
    ),
    *(
        Mutant(
            f"{which}: one arrival too few",
            which,
            file,
            WAIT,
            WAIT.replace(TARGET, f"{TARGET} - 1"),
        )
        for which, file in (("forward", FORWARD), ("backward", BACKWARD))
    ),
    *(
        Mutant(
            f"{which}: one arrival too many",
            which,
            file,
            WAIT,
            WAIT.replace(TARGET, f"{TARGET} + 1"),
        )
        for which, file in (("forward", FORWARD), ("backward", BACKWARD))
    ),
    Mutant(
        "forward: waits for the step before",
        "forward",
        FORWARD,
        WAIT,
        WAIT.replace("iteration + 1", "iteration"),
    ),
    Mutant("arrivals are not counted", "forward", BARRIER, "arrivals_ptr, 1,", "arrivals_ptr, 0,"),
    Mutant(
        "batch tiles share a counter",
        "forward",
        FORWARD,
        "arrivals_ptr + batch_tile * 32",
        "arrivals_ptr",
    ),
    Mutant(
        "directions share a counter",
        "forward",
        FORWARD,
        "arrivals_ptr += direction * num_batch_tiles * 32",
        "arrivals_ptr += 0",
    ),
    # the exchange
    Mutant(
        "forward: h published after the arrival",
        "forward",
        FORWARD,
        "                tl.store(copy_ptr + publish_offsets, h)\n"
        "                count_arrival(tile_arrivals_ptr)\n",
        "                count_arrival(tile_arrivals_ptr)\n"
        "                tl.store(copy_ptr + publish_offsets, h)\n",
    ),
    Mutant(
        "backward: a gate published after the arrival",
        "backward",
        BACKWARD,
        "                tl.store(copy_ptr + publish_offsets + 3 * H_PADDED, d_o)\n"
        "                count_arrival(tile_arrivals_ptr)\n",
        "                count_arrival(tile_arrivals_ptr)\n"
        "                tl.store(copy_ptr + publish_offsets + 3 * H_PADDED, d_o)\n",
    ),
    Mutant(
        "forward: one copy of the exchange",
        "forward",
        FORWARD,
        "((iteration + 1) % 2) * copy_size",
        "(iteration % 2) * copy_size",
    ),
    Mutant(
        "forward: both copies are one",
        "forward",
        FORWARD,
        "copy_size = (D * num_batch_tiles)",
        "copy_size = 0 * (D * num_batch_tiles)",
    ),
    Mutant(
        "backward: both copies are one",
        "backward",
        BACKWARD,
        "copy_size = (D * num_batch_tiles)",
        "copy_size = 0 * (D * num_batch_tiles)",
    ),
    Mutant(
        "forward: an h of the step before",
        "forward",
        FORWARD,
        "blocks_ptr = exchange_tile_ptr + (iteration % 2) * copy_size",
        "blocks_ptr = exchange_tile_ptr + ((iteration + 1) % 2) * copy_size",
    ),
    Mutant(
        "forward: batch tiles share the exchange",
        "forward",
        FORWARD,
        "exchange_tile = direction * num_batch_tiles + batch_tile",
        "exchange_tile = direction * num_batch_tiles + 0 * batch_tile",
    ),
    Mutant(
        "forward: inactive rows publish what they computed",
        "forward",
        FORWARD,
        "tl.store(copy_ptr + publish_offsets, h)",
        "tl.store(copy_ptr + publish_offsets, new_h)",
    ),
    # the cell
    Mutant(
        "gates i and f swapped",
        "forward",
        PRIMITIVES,
        "    return i, f, g, o\n\n\n@triton.jit\ndef grouped_range",
        "    return f, i, g, o\n\n\n@triton.jit\ndef grouped_range",
    ),
    Mutant(
        "gates g and o loaded in turn",
        "forward",
        PRIMITIVES,
        "(offsets + 2 * H), mask=mask, other",
        "(offsets + 3 * H), mask=mask, other",
    ),
    Mutant("tanh of g left out", "forward", FORWARD, "g = tanh(g + x_g", "g = (g + x_g"),
    Mutant(
        "forward: c in 16 bits",
        "forward",
        FORWARD,
        "c = tl.where(mask, new_c, c)",
        "c = tl.where(mask, new_c, c).to(tl.bfloat16).to(tl.float32)",
    ),
    Mutant(
        "backward: d_c in 16 bits",
        "backward",
        BACKWARD,
        "d_c = tl.where(is_active, d_cell * f, d_c)",
        "d_c = tl.where(is_active, d_cell * f, d_c).to(tl.bfloat16).to(tl.float32)",
    ),
    Mutant(
        "backward: d_c not multiplied by f",
        "backward",
        BACKWARD,
        "d_cell * f, d_c)",
        "d_cell, d_c)",
    ),
    Mutant("backward: 1 - g left out", "backward", BACKWARD, "(1.0 - g * g)", "(1.0 - g)"),
    Mutant(
        "backward: c where c before is due",
        "backward",
        BACKWARD,
        "c_before = tl.where(next_is_active, next_c, c_0)",
        "c_before = tl.where(next_is_active, c, c_0)",
    ),
    Mutant(
        "backward: c_0 forgotten",
        "backward",
        BACKWARD,
        "c_before = tl.where(next_is_active, next_c, c_0)",
        "c_before = next_c",
    ),
    Mutant(
        "backward: gradient of the cell states forgotten",
        "backward",
        BACKWARD,
        "d_cell += d_cells",
        "d_cell += 0 * d_cells",
    ),
    # ragged rows
    *(
        Mutant(
            f"{which}: rows shifted by one",
            which,
            PRIMITIVES,
            "row = tl.load(offsets_ptr + step,",
            "row = 1 + tl.load(offsets_ptr + step,",
        )
        for which in ("forward", "backward")
    ),
    Mutant(
        "forward: inactive rows go on",
        "forward",
        FORWARD,
        "c = tl.where(mask, new_c, c)",
        "c = new_c",
    ),
    Mutant(
        "forward: inactive rows are stored",
        "forward",
        FORWARD,
        "row_offsets, new_h, mask=mask)",
        "row_offsets, new_h, mask=state_mask)",
    ),
    Mutant(
        "backward: units past H are stored",
        "backward",
        BACKWARD,
        "tile_row, mask = row + first_row, is_active & in_units",
        "tile_row, mask = row + first_row, is_active",
    ),
    Mutant(
        "backward: inactive rows lose d_h",
        "backward",
        BACKWARD,
        "d_h = tl.where(is_active, sum_groups(d_new, GROUPS), d_h)",
        "d_h = sum_groups(d_new, GROUPS)",
    ),
    Mutant(
        "the reverse direction begins a step late",
        "forward",
        FORWARD,
        "step = direction * (steps - 1)",
        "step = direction * (steps - 2)",
    ),
    Mutant(
        "the steps of a tile are those of its second sequence",
        "forward",
        PRIMITIVES,
        "(sizes > first_row)",
        "(sizes > first_row + 1)",
    ),
    *(
        Mutant(
            f"{which}: rows beyond the valid ones left as they were",
            which,
            file,
            "valid = tl.load(",
            "valid = N + tl.load(",
        )
        for which, file in (("forward", FORWARD), ("backward", BACKWARD))
    ),
    # the product
    *(
        Mutant(
            f"{which}: half of the groups left out",
            which,
            PRIMITIVES,
            "return even + odd",
            "return even + even",
        )
        for which in ("forward", "backward")
    ),
    Mutant(
        "forward: last block of K left out",
        "forward",
        FORWARD,
        "for k in tl.static_range(NUM_K):\n                        if",
        "for k in tl.static_range(NUM_K - 1):\n                        if",
    ),
    *(
        Mutant(
            f"{which}: one unit too few",
            which,
            file,
            "in_units = (units < H)",
            "in_units = (units < H - 1)",
        )
        for which, file in (("forward", FORWARD), ("backward", BACKWARD))
    ),
]


def trials(module: ModuleType) -> Iterator[tuple[Problem, Tile, object]]:
    """Problems that between them exercise every line, each under its schedule."""
    # Mutants may write a few rows too many: there is room for them.
    ragged = Problem(ROWS["ragged"], H=13, D=2, spare=20)
    split = tile_for(ragged, "split", BLOCK_B=8)
    many = tile_for(ragged, "split", BLOCK_B=4, batch_programs=3)
    long = Problem(ROWS["one-sequence"], H=13, D=1, spare=20)
    yield ragged, split, RoundRobin()
    yield ragged, many, RandomOrder(1)
    yield long, tile_for(long, "split"), RunAhead(0)
    yield long, tile_for(long, "split"), RunAhead(-1)
    yield ragged, split, Starve(0)
    yield ragged, split, Starve(-1)
    yield ragged, many, RandomOrder(2)
    yield ragged, tile_for(ragged, "split", groups=2, in_flight=2), RoundRobin()


def check(module: ModuleType, which: str) -> None:
    """Raises if this module's kernel gives a wrong result, or none."""
    run = run_forward if which == "forward" else run_backward
    for problem, tile, schedule in trials(module):
        result = run(problem, tile, schedule, module=module)
        for name in FORWARD_NAMES if which == "forward" else BACKWARD_NAMES:
            assert_within_budget(name, getattr(result, name), problem)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_kernels_themselves_pass(which: str) -> None:
    check(importlib.import_module(f"fastrnn_kernels.lstm_{which}"), which)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_caught(mutant: Mutant) -> None:
    change = (mutant.file, mutant.old, mutant.new, mutant.count)
    with (
        mutated(*change, module=f"lstm_{mutant.which}") as module,
        pytest.raises((AssertionError, Deadlock)),
    ):
        check(module, mutant.which)
