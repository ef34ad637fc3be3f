"""The cooperative interpreter itself: it interleaves, finds deadlocks, and rounds as torch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.interpreter import (
    RELIED_ON,
    Deadlock,
    RandomOrder,
    RoundRobin,
    Schedule,
    cooperative,
    schedules,
    triton_interpreter,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip

pytestmark = pytest.mark.interpreter


@triton.jit
def ring_kernel(values_ptr, turn_ptr, LAPS: tl.constexpr):
    """Program p waits for its turn, writes its number, and passes the turn on."""
    me = tl.program_id(0)
    programs = tl.num_programs(0)
    for lap in range(LAPS):
        turn = lap * programs + me
        while tl.atomic_add(turn_ptr, 0, sem="acquire") != turn:
            pass
        tl.store(values_ptr + turn, me)
        tl.atomic_add(turn_ptr, 1, sem="release")


@triton.jit
def stuck_kernel(flag_ptr):
    """The last program never says that it came."""
    if tl.program_id(0) + 1 < tl.num_programs(0):
        tl.atomic_add(flag_ptr, 1)
    while tl.atomic_add(flag_ptr, 0) < tl.num_programs(0):
        pass


@triton.jit
def order_kernel(order_ptr, count_ptr):
    place = tl.atomic_add(count_ptr, 1)
    tl.store(order_ptr + place, tl.program_id(0))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
    tl.store(c_ptr + offsets, product.to(c_ptr.dtype.element_ty))


@triton.jit
def compared_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """A mask that one number decides about: the comparison is broadcast."""
    lanes = tl.arange(0, N)
    mask = (lanes < N) & (tl.load(x_ptr) < 3)
    tl.store(out_ptr + lanes, lanes + 1, mask=mask)


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner in RELIED_ON for name in ("", *RELIED_ON[owner])]
)
def test_triton_has_what_the_cooperative_interpreter_relies_on(owner: str, name: str) -> None:
    found = getattr(triton_interpreter, owner, None)
    complaint = (
        f"triton {triton.__version__} has no triton.runtime.interpreter.{owner} {name}: see what "
        "has taken its place, and mend tests/interpreter.py"
    )
    assert found is not None, complaint
    assert not name or hasattr(found, name), complaint


def test_no_other_file_imports_tritons_interpreter() -> None:
    folder = Path(__file__).parents[1]
    files = {
        path for path in folder.rglob("*.py") if "triton.runtime import int" in path.read_text()
    }
    assert files - {Path(__file__)} == {folder / "interpreter.py"}


@pytest.mark.parametrize("value", [2, 3])
def test_a_comparison_is_a_condition_also_when_it_is_broadcast(value: int) -> None:
    out = torch.zeros(4, dtype=torch.int32)
    with cooperative():
        compared_kernel[(1,)](torch.tensor([value], dtype=torch.int32), out, N=4)
    assert out.tolist() == ([1, 2, 3, 4] if value < 3 else [0] * 4)


@pytest.mark.parametrize("schedule", schedules(), ids=str)
def test_programs_that_wait_for_each_other_run(schedule: Schedule) -> None:
    values, turn = torch.zeros(12, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with cooperative(schedule) as trace:
        ring_kernel[(4,)](values, turn, LAPS=3)
    assert values.tolist() == [0, 1, 2, 3] * 3
    assert trace.programs == 4
    assert trace.switches > 12


@pytest.mark.parametrize("schedule", schedules(), ids=str)
def test_a_deadlock_is_reported_with_who_waits_for_what(schedule: Schedule) -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    with cooperative(schedule), pytest.raises(Deadlock) as caught:
        stuck_kernel[(3,)](flag)
    message = str(caught.value)
    assert "3 programs wait for ever" in message
    for program in range(3):
        assert f"program ({program}, 0, 0) reads flag_ptr + 0 bytes = 2" in message


def test_schedules_differ_and_repeat() -> None:
    orders = []
    for schedule in (RoundRobin(), RoundRobin(backwards=True), RandomOrder(5), RandomOrder(5)):
        order, count = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with cooperative(schedule):
            order_kernel[(6,)](order, count)
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert orders[2] == orders[3]
    assert all(sorted(order) == list(range(6)) for order in orders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_and_rounding_are_torch_s(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16, dtype=torch.float64).to(dtype)
    c = torch.empty(16, 16, dtype=dtype)
    with cooperative():
        product_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, (a.float() @ b.float()).to(dtype), rtol=0, atol=2e-6)


def test_the_interpreter_is_left_as_it_was() -> None:
    interpreter = triton_interpreter
    names = RELIED_ON["InterpreterBuilder"]
    before = [getattr(interpreter.InterpreterBuilder, name) for name in names]
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    with pytest.raises(ZeroDivisionError), cooperative():
        _ = 1 / 0
    assert before == [getattr(interpreter.InterpreterBuilder, name) for name in names]
    assert interpreter._patch_lang is patch
    assert interpreter.GridExecutor.__call__ is call
