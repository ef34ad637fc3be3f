"""The norm kernel against torch.nn.utils.clip_grad_norm_ and float64, through the interpreter."""

from __future__ import annotations

import functools
import gc
import math
import sys
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastrnn_kernels import gradient_norm, gradient_table
from fastrnn_kernels.gradient_norm import Ring, can_run, clip_gradients
from fastrnn_kernels.gradient_table import Plans
from tests.interpreter import RandomOrder, Schedule, cooperative, schedules
from tests.kernels.gradient_problems import (
    BF16,
    F16,
    F32,
    INF,
    PROBLEMS,
    Memory,
    assert_equal,
    by_a_rounding,
    check_clip,
    exact_norm,
    mixed,
    random,
    run,
    run_by_torch,
    scaled,
    several,
    torch_coefficient,
    watched,
    without_empty,
)

pytestmark = pytest.mark.interpreter
NAN = math.nan
NORM_TYPES = (2.0, 1.0, INF)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


@pytest.fixture(autouse=True)
def _own_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plans]:
    """Each test begins without plans: an earlier one may have cut segments to another length."""
    plans = Plans()
    monkeypatch.setattr(gradient_norm, "_plans", plans)
    yield plans


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_clips_as_torch_does(problem: str, norm_type: float) -> None:
    memory = PROBLEMS[problem]()
    result = check_clip(without_empty(memory) if norm_type == INF else memory, 0.5, norm_type)
    assert result.coefficient < 1


@pytest.mark.parametrize("schedule", schedules(), ids=str)
def test_the_order_of_programs_changes_no_bit(schedule: Schedule) -> None:
    first, second = mixed(), mixed()
    expected = run(first.grads)
    result = run(second.grads, schedule=schedule)
    for name, actual, wanted in zip(result._fields, result, expected, strict=True):
        assert_equal(name, actual, wanted)
    for grad, wanted in zip(second.grads, first.grads, strict=True):
        assert_equal("gradient", grad, wanted)


@pytest.mark.parametrize("programs", [1, 2, 3, 17])
def test_any_number_of_programs(programs: int) -> None:
    check_clip(mixed(), programs=programs, schedule=RandomOrder(programs))


def test_the_launcher_s_own_number_of_programs_and_blocks() -> None:
    grads = [random(30_000), random(9, dtype=BF16), random(20_001, dtype=F16)]
    total_norm, expected = run_by_torch(grads, 1.0, 2.0)
    with cooperative() as trace:
        result = clip_gradients(grads, 1.0)
    assert trace.programs == 6  # 160 KB and three segments of 8 KB at 32 KB each
    assert_equal("total norm", result.total_norm, total_norm, 1e-6)
    for grad, wanted in zip(grads, expected, strict=True):
        assert_equal("gradient", grad, wanted, by_a_rounding(grad.dtype))


@DTYPES
@pytest.mark.parametrize("elements", [1, 7, 8, 9, 64, 131])
def test_every_alignment(elements: int, dtype: torch.dtype) -> None:
    memory = Memory()
    for offset in range(16 // dtype.itemsize):
        memory.add(random(elements, dtype=dtype, seed=offset), offset)
    check_clip(memory, programs=2)


def test_segments_of_limited_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_table, "MAX_ELEMENTS", 40)
    check_clip(mixed(), programs=2)


def test_nothing_but_empty_gradients() -> None:
    result = run([torch.empty(0), torch.empty(3, 0)])
    assert_equal("total norm", result.total_norm, torch.tensor(0.0))
    assert_equal("coefficient", result.coefficient, torch.tensor(1.0))
    assert_equal("norms", result.norms, torch.zeros(2))


# What happens from the norm on.


BELOW_ONE = (1.0, 0.0, -2.0, -INF, 1e-30, 5.0, 4.99)  # coefficients for a norm of 5


@pytest.mark.parametrize("max_norm", [*BELOW_ONE, INF, NAN, 1e300, 5.01])
@DTYPES
def test_thresholds(dtype: torch.dtype, max_norm: float) -> None:
    values = torch.tensor([3.0, 4.0], dtype=dtype)
    result = check_clip(Memory().add(values, 1), max_norm)
    if dtype == F32:  # in 16 bits 5 + 1e-6 is 5
        assert bool(result.coefficient < 1) == (max_norm in BELOW_ONE)


def test_a_norm_equal_to_the_threshold_scales() -> None:
    grad = torch.ones(1)
    result = run([grad], 1.0)
    assert_equal("gradient", grad, 1 / (torch.ones(1) + 1e-6))
    assert grad < 1
    assert result.coefficient < 1


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, 1e-30, 0.0])
@pytest.mark.parametrize("place", [0, 40, 64, 69])  # head, body, second block, tail
def test_extreme_values(place: int, value: float, norm_type: float) -> None:
    values = random(70) if value else torch.zeros(70)
    values[place] = value
    memory = Memory().add(random(70, seed=1) * bool(value)).add(values, 1)
    check_clip(memory, 1.0, norm_type, programs=2)


@pytest.mark.parametrize("max_norm", [1e-3, 0.0, 10.0])
@DTYPES
def test_zero_gradients(dtype: torch.dtype, max_norm: float) -> None:
    # In float16 1 / 1e-6 is inf, and 0 * inf is NaN: with max_norm 0 torch makes NaN of zeros.
    check_clip(Memory().add(torch.zeros(50, dtype=dtype)), max_norm)


def stores_of(grads: list[Tensor], max_norm: float, **options: object) -> list[tuple[int, int]]:
    with watched(grads) as accesses:
        run(grads, max_norm, **options)
    return accesses.stores


def test_what_is_not_clipped_is_not_written() -> None:
    assert stores_of(mixed().grads, 1e4) == []
    assert stores_of(mixed().grads, 1e4, zero_nonfinite=True) == []
    assert stores_of(mixed().grads, 1.0, scale=False) == []


def test_what_is_clipped_is_written_once_and_the_last_block_first() -> None:
    first, second = Memory().add(random(256)), Memory().add(random(130), 1)
    stores = stores_of([*first.grads, *second.grads], 1.0, programs=1)
    # Blocks of 64 elements; the unaligned head of the second gradient, with its tail, comes last.
    assert stores == [(1, 12 + 256), (1, 12), (1, 0), (0, 768), (0, 512), (0, 256), (0, 0)]


# Options.


def test_norms_only() -> None:
    memory, whole = mixed(), mixed()
    before = [grad.clone() for grad in memory.grads]
    versions = [grad._version for grad in memory.grads]
    result = run(memory.grads, scale=False)
    for actual, expected in zip(result, run(whole.grads), strict=True):
        assert_equal("result", actual, expected)
    for grad, old in zip(memory.grads, before, strict=True):
        assert_equal("gradient", grad, old)
    assert [grad._version for grad in memory.grads] == versions


@pytest.mark.parametrize("value", [NAN, INF, 1.0])
def test_zero_nonfinite(value: float) -> None:
    memory = mixed()
    memory.grads[2][5] = value
    before = [grad.clone() for grad in memory.grads]
    result = run(memory.grads, zero_nonfinite=True)
    if math.isfinite(value):
        assert 0 < result.coefficient < 1
        for grad, old in zip(memory.grads, before, strict=True):
            assert_equal("gradient", grad, scaled(old, result.coefficient))
    else:
        assert not result.total_norm.isfinite()
        assert result.coefficient == 0
        assert all(grad.eq(0).all() for grad in memory.grads)
    memory.assert_guarded()


@pytest.mark.parametrize(("value", "expected"), [(1.0, 0.0), (NAN, 1.0), (INF, 1.0), (-INF, 1.0)])
@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
def test_found_inf(norm_type: float, value: float, expected: float) -> None:
    found_inf = torch.full((2,), NAN)
    run([torch.tensor([2.0, value])], norm_type=norm_type, found_inf=found_inf[1:])
    assert found_inf[1] == expected
    assert found_inf[0].isnan()


@DTYPES
def test_float32_norms_of_16_bit_gradients(dtype: torch.dtype) -> None:
    memory = several(dtype)
    before = [grad.clone() for grad in memory.grads]
    result = run(memory.grads, 0.5, norm_dtype=F32)
    assert {x.dtype for x in result} == {F32}
    exact = exact_norm(before, 2.0)
    assert abs(float(result.total_norm) - exact) <= 5e-7 * exact
    for norm, old in zip(result.norms, before, strict=True):
        assert abs(float(norm) - exact_norm([old], 2.0)) <= 5e-7 * exact
    assert_equal("coefficient", result.coefficient, torch_coefficient(result.total_norm, 0.5))
    for grad, old in zip(memory.grads, before, strict=True):
        assert_equal("gradient", grad, scaled(old, result.coefficient))


def test_a_float16_norm_overflows_as_torch_s_does_and_not_in_float32() -> None:
    values = torch.full((1000,), 3000.0, dtype=F16)
    # Its own norm is too large for float16; that the total is of float32 does not help.
    for others in ([], [random(5)]):
        memory = Memory().add(values, 1)
        for other in others:
            memory.add(other)
        result = check_clip(memory)
        assert result.total_norm.isinf()
    result = run([values.clone()], norm_dtype=F32)
    assert_equal("total norm", result.total_norm, torch.tensor(3000.0 * 1000**0.5), 1e-6)


def test_norms_are_rounded_one_by_one() -> None:
    """The total is that of rounded norms, as torch's is, and not the rounded total."""
    grads = [torch.tensor([1.0, 0.0859375], dtype=BF16) for _ in range(49)]  # of norm 1.00369
    assert run(grads, scale=False, norm_dtype=F32).total_norm.to(BF16) == 7.03125
    assert run_by_torch(grads, 1.0, 2.0)[0] == 7.0
    assert run(grads).total_norm == 7.0


# Gradients that the kernel cannot walk.


def strided(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """With a gap after each element."""
    grad = torch.full((*shape, 2), NAN, dtype=dtype)[..., 0]
    return grad.copy_(random(*shape, dtype=dtype))


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
def test_other_gradients_are_left_to_torch_and_join_the_total(norm_type: float) -> None:
    grads = [strided(6, 5), random(70), strided(9, dtype=BF16), random(40, dtype=F16)]
    grads.insert(3, torch.complex(random(8), random(8, seed=1)))
    before = [grad.clone() for grad in grads]
    total_norm, expected = run_by_torch(grads, 1.0, norm_type)
    result = run(grads, 1.0, norm_type)
    assert_equal("total norm", result.total_norm, total_norm, 1e-6)
    norms = torch.stack([torch.linalg.vector_norm(g, norm_type).float() for g in before])
    assert_equal("norms", result.norms, norms, 1e-6)
    for index, (grad, wanted) in enumerate(zip(grads, expected, strict=True)):
        assert_equal(f"gradient {index}", grad, wanted, by_a_rounding(grad.dtype))


def test_nothing_but_other_gradients() -> None:
    grads = [strided(6, 5), strided(3)]
    total_norm, expected = run_by_torch(grads, 1.0, 2.0)
    result = run(grads)
    assert_equal("total norm", result.total_norm, total_norm, 1e-6)
    for grad, wanted in zip(grads, expected, strict=True):
        assert_equal("gradient", grad, wanted, 1e-6)


@pytest.mark.parametrize("value", [NAN, 1.0])
def test_options_hold_for_other_gradients(value: float) -> None:
    grads = [strided(7, dtype=F16), random(5)]
    grads[0][1] = value
    versions = [grad._version for grad in grads]
    result = run(grads, scale=False, norm_dtype=F32)
    assert result.norms.dtype == F32
    assert [grad._version for grad in grads] == versions
    if math.isfinite(value):
        exact = exact_norm(grads[:1], 2.0)
        assert abs(float(result.norms[0]) - exact) <= 5e-7 * exact
    old = [grad.clone() for grad in grads]
    result = run(grads, zero_nonfinite=True)
    for grad, before in zip(grads, old, strict=True):
        wanted = scaled(before, result.coefficient) if value == 1.0 else torch.zeros_like(before)
        assert_equal("gradient", grad, wanted)


def test_a_gradient_that_comes_twice_counts_twice_and_is_scaled_twice() -> None:
    grad, other = random(300), random(20, seed=1)
    old = grad.clone()
    result = run([grad, other, grad], 1.0)
    assert_equal("norms", result.norms[0], result.norms[2], 1e-6)
    assert abs(float(result.total_norm) - exact_norm([old, random(20, seed=1), old], 2.0)) < 1e-5
    assert_equal("gradient", grad, old * result.coefficient * result.coefficient)


def test_gradients_that_share_memory_are_scaled_one_after_another() -> None:
    memory = random(100)
    old = memory.clone()
    c = run([memory[:60], memory[40:]], 1.0).coefficient
    expected = torch.cat((old[:40] * c, old[40:60] * c * c, old[60:] * c))
    assert_equal("memory", memory, expected)


def test_an_expanded_gradient_is_torch_s_error() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        run([random(10), torch.ones(1).expand(7)])


# What the launcher keeps, and refuses.


def test_version_counters_rise_whether_clipped_or_not() -> None:
    for max_norm in (1.0, 1e4):
        grads = [*mixed().grads, strided(5)]
        versions = [grad._version for grad in grads]
        run(grads, max_norm)
        assert all(grad._version > old for grad, old in zip(grads, versions, strict=True))


def test_nothing_lies_on_the_device_between_launches(
    _own_plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launch was given may be overwritten, as by a pool that is let go."""
    tables = []
    upload = gradient_table.Plan.upload

    def keep(plan: gradient_table.Plan, *arguments: object) -> Tensor:
        tables.append(upload(plan, *arguments))
        return tables[-1]

    monkeypatch.setattr(gradient_table.Plan, "upload", keep)
    for schedule in schedules():
        check_clip(mixed(), schedule=schedule)
        tables[-1].fill_(0x7777777777777777)
    assert len({table.data_ptr() for table in tables}) == len(tables)


def test_a_plan_is_kept_until_sizes_or_dtypes_are_others(_own_plans: Plans) -> None:
    with mock.patch.object(gradient_table.Plan, "build", wraps=gradient_table.Plan.build) as build:
        for _ in range(3):
            memory = mixed()  # at new addresses
            check_clip(memory, 3.0, 1.0)
        assert build.call_count == 1
        grads = memory.grads
        run(grads, programs=3)
        run([*grads[1:], grads[0]])
        run([grads[0].view(F16), *grads[1:]])
        run([grads[0][1:], *grads[1:]])
        assert build.call_count == 5
        run(grads)
        assert build.call_count == 5


def test_the_same_sizes_in_another_layout_have_a_plan_of_their_own(_own_plans: Plans) -> None:
    memory = random(4, 4)
    layouts = [memory, memory.t(), memory.as_strided((4, 4), (1, 1))]
    plans = []
    for layout in layouts:
        run([layout], scale=False)
        plans.append(_own_plans.find([layout], 5))
    assert len({id(plan) for plan in plans}) == 3
    assert [plan.others for plan in plans if plan is not None] == [[], [], [0]]


def test_gradients_that_come_to_share_memory_are_noticed(_own_plans: Plans) -> None:
    apart = [random(60), random(60, seed=1), torch.empty(0)]
    run(apart)
    memory = random(100)
    for grads in ([memory[:60], memory[40:]], [memory[40:], memory[:60]]):
        old, before = memory.clone(), [grad.clone() for grad in grads]
        result = run([*grads, torch.empty(0)], 0.5)
        assert abs(float(result.total_norm) - exact_norm(before, 2.0)) <= 1e-5
        c = result.coefficient
        expected = torch.cat((old[:40] * c, old[40:60] * c * c, old[60:] * c))
        assert_equal("memory", memory, expected)
    check_clip(Memory().add(random(60)).add(random(60, seed=1)).add(torch.empty(0)))


def test_gradients_that_come_to_be_misaligned_are_noticed() -> None:
    run([random(10)])
    odd = torch.frombuffer(bytearray(41), dtype=torch.float32, count=10, offset=1)
    odd.copy_(random(10))
    result = run([odd], scale=False)
    assert abs(float(result.total_norm) - exact_norm([odd], 2.0)) <= 1e-5


def test_no_gradient_is_kept_alive() -> None:
    grads = [random(50), strided(5)]
    alive = [weakref.ref(grad) for grad in grads]
    run(grads)
    del grads
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_only_so_many_plans_are_kept(_own_plans: Plans) -> None:
    _own_plans.most = 3
    held = [[random(5 + seed)] for seed in range(5)]
    for grads in held:
        run(grads)
    found = [_own_plans.find(grads, 5) is not None for grads in held]
    assert found == [False, False, True, True, True]


def test_capture_needs_memory_that_was_there_before(
    _own_plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = mixed().grads
    monkeypatch.setattr(gradient_table, "_captured", [])
    monkeypatch.setattr(gradient_norm, "_is_capturing", lambda device: True)
    assert "being captured" in can_run(grads)
    # A GPU, as far as the plan can see; its kernel is interpreted.
    plan, table = _own_plans.locate(grads, 5)
    plan.spare = torch.empty_like(plan.template)
    _own_plans._add(gradient_table._key(grads, None), plan)
    assert can_run(grads) is None
    gpu = mock.Mock(type="cuda")
    with mock.patch.object(Tensor, "to", lambda tensor, *_, **__: tensor):
        captured = plan.upload(table, gpu, capturing=True)
    assert captured is gradient_table._captured[0]  # a graph reads it from now on
    assert_equal("table", captured, table)
    with pytest.raises(RuntimeError, match="Clip them once before"):
        plan.upload(table, gpu, capturing=True)
    assert "being captured" in can_run(grads)
    with (
        mock.patch.object(Tensor, "to", lambda tensor, *_, **__: tensor),
        mock.patch.object(Tensor, "pin_memory", Tensor.clone),
    ):
        plan.upload(table, gpu)  # an ordinary step sets memory aside for the next capture
    assert can_run(grads) is None


# What is recorded.


def new_ring(capacity: int = 3) -> Ring:
    return Ring(torch.full((capacity, 3), NAN), torch.zeros(3, dtype=torch.int64))


def test_steps_are_recorded_in_a_ring() -> None:
    ring, norms = new_ring(), []
    for step, max_norm in enumerate((1.0, 2.0, 1e4, 3.0, 0.5)):
        memory = mixed()
        if step == 2:
            memory.grads[0][3] = INF
        result = run(memory.grads, max_norm, ring=ring, schedule=RandomOrder(step))
        norms.append(result)
        assert ring.counts.tolist() == [step + 1, int(step >= 2), int(step == 2)]
        row = torch.stack((result.total_norm, torch.tensor(max_norm), result.coefficient))
        assert_equal("row", ring.rows[step % 3], row)


def test_not_finite_steps_in_a_row_are_counted() -> None:
    ring = new_ring()
    for step, value in enumerate((NAN, INF, -INF)):
        run([torch.tensor([value])], ring=ring)
        assert ring.counts.tolist() == [step + 1, step + 1, step + 1]
    run([torch.ones(1)], ring=ring)
    assert ring.counts.tolist() == [4, 3, 0]


@DTYPES
def test_recorded_norms_are_those_that_are_returned(dtype: torch.dtype) -> None:
    ring = new_ring()
    result = run(several(dtype).grads, 0.5, ring=ring)
    assert_equal("norm", ring.rows[0, 0], result.total_norm.float())
    assert_equal("coefficient", ring.rows[0, 2], result.coefficient.float())


@pytest.mark.parametrize("value", [NAN, INF, 1.0])
def test_spare_nonfinite(value: float) -> None:
    memory = mixed()
    memory.grads[2][5] = value
    grads = [*memory.grads, strided(7)]
    before = [grad.clone() for grad in grads]
    ring = new_ring()
    result = run(grads, spare_nonfinite=True, ring=ring)
    spared = not math.isfinite(value)
    assert ring.rows[0, 2].isnan() == spared
    for grad, old in zip(grads, before, strict=True):
        assert_equal("gradient", grad, old if spared else scaled(old, result.coefficient))
    memory.assert_guarded()


@pytest.mark.parametrize("max_norm", [0.5, 1e4, 0.0])
@DTYPES
def test_what_a_fused_step_takes(dtype: torch.dtype, max_norm: float) -> None:
    result = run(several(dtype).grads, max_norm, scale=False)
    assert_equal("inverse", result.inverse, result.coefficient.float().reciprocal())
    assert result.nonfinite == 0.0
    result = run([torch.tensor([1.0, NAN], dtype=dtype)], scale=False)
    assert result.inverse.isnan()
    assert result.nonfinite == 1.0


# What it costs the host.


def lines_run(function: object) -> int:
    """Lines of Python that a call executes: a loop over gradients would show."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def test_new_addresses_cost_no_line_of_python_for_each_gradient(_own_plans: Plans) -> None:
    counts = {}
    for gradients in (16, 1000):
        old, new = (list(memory) for memory in torch.randn(2, gradients, 40))
        plan, _ = _own_plans.locate(old, 7)

        def anew(grads: list[Tensor], plan: gradient_table.Plan) -> None:
            found, table = _own_plans.locate(grads, 7)
            assert found is plan
            found.upload(table, grads[0].device)

        counts[gradients] = lines_run(functools.partial(anew, new, plan))
    assert counts[16] == counts[1000] < 80


@pytest.mark.parametrize(
    ("grads", "norm_type", "reason"),
    [
        ([], 2.0, "no gradients"),
        ([torch.ones(2)], 3.0, "not 3.0"),
        ([torch.ones(2)], -INF, "not -inf"),
        ([torch.ones(2), torch.nn.Parameter(torch.ones(2))], 2.0, "not Parameter"),
        ([torch.ones(2).to_sparse()], 2.0, "sparse"),
        ([torch.ones(2), torch.ones(2, device="meta")], 2.0, "several devices: cpu, meta"),
        ([torch.ones(2, dtype=torch.float64)], 2.0, "too short for gradients of torch.float64"),
        ([torch.ones(2), torch.ones(0)], INF, "empty gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_can_run_says_why_not(grads: list[Tensor], norm_type: float, reason: str) -> None:
    assert reason in can_run(grads, norm_type)
    if grads and not grads[0].is_sparse:
        with pytest.raises(ValueError, match=r"norm_type must be|cannot be clipped by the kernel"):
            clip_gradients(grads, 1.0, norm_type)


def test_can_run_on_what_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        grad = torch.ones(2)
    assert "inference mode" in can_run([grad])


def test_an_empty_gradient_is_refused_by_a_warm_plan_too() -> None:
    grads = [torch.ones(2), torch.ones(0)]
    run(grads)
    with pytest.raises(ValueError, match="empty gradient"):
        run(grads, norm_type=INF)


def test_can_run() -> None:
    for norm_type in (1, 2, INF):
        assert can_run(without_empty(mixed()).grads, norm_type) is None
    assert can_run([strided(4), torch.ones(3, dtype=torch.complex64)]) is None


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_dtype must be None or torch\.float32"):
        clip_gradients([torch.ones(2)], 1.0, norm_dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one gradient"):
        clip_gradients([], 1.0)
