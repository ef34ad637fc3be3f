"""A wait that nobody will ever end: it gives up, all programs leave, and the next call says so."""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import pytest
import torch
import triton.language as tl

from tests.interpreter import RandomOrder, RoundRobin, RunAhead, Schedule, Starve, cooperative
from tests.kernels.gradient_problems import several
from tests.kernels.mutants import mutated
from tests.kernels.problems import ROWS, Problem, run_backward, run_forward, tile_for

pytestmark = pytest.mark.interpreter

PATIENCE = 10_000  # polls; the interpreter's own is the wait of a launch that is merely slow
LOST = {
    "every arrival": "0",
    "one program's arrivals": "(tl.program_id(0) != 0).to(tl.int32)",
    "the last program's arrivals": "(tl.program_id(0) + 1 < tl.num_programs(0)).to(tl.int32)",
}
SCHEDULES = [RoundRobin(), RandomOrder(1), RunAhead(0), Starve(0)]


def losing(arrivals: str, module: str):
    """A mutant of the package in which arrivals are lost."""
    return mutated("grid_barrier.py", "arrivals_ptr, 1,", f"arrivals_ptr, {arrivals},", 1, module)


def impatient(module: ModuleType):
    """Waits of the interpreter's size: the real ones poll for tens of seconds."""
    barrier = __import__(f"{module.__package__}.grid_barrier", fromlist=["MOST_POLLS"])
    return mock.patch.multiple(barrier, MOST_POLLS=tl.constexpr(24), POLLS_PER_LOOK=tl.constexpr(8))


def assert_raises_and_then_refuses(module: ModuleType, call) -> None:
    package = __import__(module.__package__, fromlist=["failed_waits", "launch"])
    with pytest.raises(package.failed_waits.BarrierTimeout, match=r"gave up waiting.*worthless"):
        call()
    for _ in range(2):
        with pytest.raises(package.launch.CannotLaunch, match=r"gave up waiting.*earlier"):
            call()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("arrivals", LOST.values(), ids=LOST)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_lost_arrival_ends_in_an_error(which: str, arrivals: str, schedule: Schedule) -> None:
    """Every program leaves, and so does every batch tile that is still to come."""
    problem = Problem(ROWS["tile-borders"], H=13, D=2)
    tile = tile_for(problem, "split", batch_programs=1)
    run = run_forward if which == "forward" else run_backward
    with losing(arrivals, f"lstm_{which}") as module, impatient(module):

        def call():
            return run(problem, tile, schedule, module=module, patience=PATIENCE)

        call()
        assert_raises_and_then_refuses(module, call)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("arrivals", LOST.values(), ids=LOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["one-barrier", "two"])
def test_a_lost_arrival_of_the_clip_ends_in_an_error(
    dtype: torch.dtype, arrivals: str, schedule: Schedule
) -> None:
    grads = several(dtype).grads
    with losing(arrivals, "gradient_norm") as module, impatient(module):

        def call():
            with cooperative(schedule, PATIENCE):
                return module.clip_gradients(grads, 1.0, programs=3)

        call()
        assert_raises_and_then_refuses(module, call)


def test_after_a_failure_other_tiles_do_not_wait_as_long_again() -> None:
    """The word is looked at in every wait: here each may poll for ever by itself."""
    problem = Problem(ROWS["tile-borders"], H=13, D=1)
    tile = tile_for(problem, "split", batch_programs=1)
    lost = LOST["every arrival"]
    with losing(lost, "lstm_forward") as module, impatient(module):
        package = __import__(module.__package__, fromlist=["failed_waits", "grid_barrier"])
        word = package.failed_waits.failed_waits(torch.device("cpu")).word
        with (
            mock.patch.object(package.grid_barrier, "MOST_POLLS", tl.constexpr(2**31 - 1)),
            mock.patch.object(module, "launching") as launching,
        ):
            launching.return_value.__enter__.return_value = word.fill_(1)
            run_forward(problem, tile, module=module, patience=PATIENCE)
    assert word.item() == 1


def test_a_launch_without_a_failure_leaves_the_word_alone() -> None:
    from fastrnn_kernels import lstm_forward
    from fastrnn_kernels.failed_waits import failed_waits

    problem = Problem(ROWS["ragged"], H=13, D=2)
    run_forward(problem, tile_for(problem, "split"), module=lstm_forward)
    waits = failed_waits(torch.device("cpu"))
    assert waits.word.item() == 0
    assert waits.reason() is None
