"""fastrnn.clip_grad_norm_ and GradientClipper on a GPU, against torch's and float64."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn

# torch warns of prototype features that are used here, and of TF32 where it compiles.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16", "fp64"])
SIZES = {
    "one": [1],
    "odd": [1, 3, 63, 65, 4097],
    "matrix": [1024 * 1024],
    "many": [257] * 300,
    "empty-among-others": [5, 0, 7],
}
NORMS = (2.0, 1.0, math.inf, 3.0)


def parameters(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        parameter = torch.zeros(size, dtype=dtype, device="cuda", requires_grad=True)
        parameter.grad = torch.randn(size, generator=generator).to("cuda", dtype)
        found.append(parameter)
    return found


def twins(given: list[Tensor]) -> list[Tensor]:
    """The same parameters and gradients, in the same strides, in memory of their own."""
    found = []
    for parameter in given:
        twin = parameter.detach().clone().requires_grad_()
        grad = parameter.grad
        twin.grad = torch.empty_strided(
            grad.size(), grad.stride(), dtype=grad.dtype, device=grad.device
        ).copy_(grad)
        found.append(twin)
    return found


def assert_as_torch(given: list[Tensor], max_norm: float, norm_type: float = 2.0) -> None:
    expected = twins(given)
    theirs = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)
    ours = fastrnn.clip_grad_norm_(given, max_norm, norm_type)
    assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
    eps = 4 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=eps, atol=0.0, equal_nan=True)
    for a, b in zip(given, expected):
        limit = 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.grad, b.grad, rtol=limit, atol=0.0, equal_nan=True)


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that ``run`` starts."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


@every_dtype
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_as_torch(sizes: list[int], max_norm: float, dtype: torch.dtype) -> None:
    assert_as_torch(parameters(sizes, dtype), max_norm)


@pytest.mark.parametrize("norm_type", NORMS, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "unclipped"])
def test_every_norm(norm_type: float, max_norm: float) -> None:
    assert_as_torch(parameters([1, 65, 4097]), max_norm, norm_type)


def test_mixed_dtypes() -> None:
    given = parameters([65, 4097]) + parameters([63], torch.bfloat16)
    given += parameters([1000], torch.float16)
    assert_as_torch(given, 0.5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_non_finite(bad: float) -> None:
    given = parameters([65, 4097])
    given[1].grad[17] = bad
    assert_as_torch(given, 0.5)


def test_error_if_nonfinite_raises_before_anything_is_scaled() -> None:
    given = parameters([65])
    given[0].grad[3] = math.inf
    before = given[0].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        fastrnn.clip_grad_norm_(given, 0.5, error_if_nonfinite=True)
    assert torch.equal(given[0].grad, before)


def test_views_permutations_and_strides() -> None:
    """Unaligned slices of one buffer, as DDP's buckets are; dense but permuted; with gaps."""
    bucket = torch.randn(10_000, device="cuda")
    grads = [bucket[1:4000], bucket[4001:4003], bucket[4003:10_000]]
    grads.append(torch.randn(64, 33, device="cuda").t())
    grads.append(torch.randn(64, 66, device="cuda")[:, ::2])
    given = []
    for grad in grads:
        parameter = torch.zeros(grad.shape, device="cuda", requires_grad=True)
        parameter.grad = grad
        given.append(parameter)
    guards = bucket[[0, 4000]].clone()
    assert_as_torch(given, 0.5)
    assert torch.equal(bucket[[0, 4000]], guards)


def test_no_gradients() -> None:
    given = [torch.zeros(3, device="cuda", requires_grad=True)]
    assert torch.equal(fastrnn.clip_grad_norm_(given, 1.0), torch.tensor(0.0))


def test_one_launch_that_writes_nothing_it_need_not() -> None:
    given = parameters([4097] * 150)
    fastrnn.clip_grad_norm_(given, 1e6)
    names = kernels(lambda: fastrnn.clip_grad_norm_(given, 1e6))
    assert len([name for name in names if "gradient_norm_kernel" in name]) == 1
    versions = [p.grad._version for p in given]
    before = [p.grad.clone() for p in given]
    fastrnn.clip_grad_norm_(given, 1e6)
    assert all(p.grad._version > version for p, version in zip(given, versions))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(given, before))


def test_nothing_waits_for_the_gpu() -> None:
    given = parameters([4097] * 20)
    fastrnn.clip_grad_norm_(given, 0.5)
    with without_waiting():
        fastrnn.clip_grad_norm_(given, 0.25)


def test_the_same_again_to_the_bit() -> None:
    given = parameters([1024 * 1024, 65, 4097])
    norms = {fastrnn.clip_grad_norm_(twins(given), 0.5).item() for _ in range(20)}
    assert len(norms) == 1


def test_new_gradients_every_step() -> None:
    """Their addresses go up with each launch."""
    given = parameters([65, 4097])
    for seed in range(5):
        torch.manual_seed(seed)
        for parameter in given:
            parameter.grad = torch.randn_like(parameter)
        assert_as_torch(given, 0.5)


def test_a_captured_clip_replays() -> None:
    given = parameters([65, 4097])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fastrnn.clip_grad_norm_(given, 1e6)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fastrnn.clip_grad_norm_(given, 0.5)
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in given:
            parameter.grad.normal_()
        expected = twins(given)
        theirs = torch.nn.utils.clip_grad_norm_(expected, 0.5)
        graph.replay()
        torch.testing.assert_close(norm, theirs, rtol=1e-6, atol=0.0)
        for a, b in zip(given, expected):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0.0)


def test_streams_do_not_disturb_each_other() -> None:
    sets = [parameters([1024 * 1024, 65]) for _ in range(2)]
    expected = [torch.nn.utils.clip_grad_norm_(twins(given), 0.5) for given in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    for _ in range(20):
        copies = [twins(given) for given in sets]
        torch.cuda.synchronize()
        found = []
        for stream, given in zip(streams, copies):
            with torch.cuda.stream(stream):
                found.append(fastrnn.clip_grad_norm_(given, 0.5))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_on_two_devices() -> None:
    given = parameters([65, 4097])
    moved = given[1].detach().to("cuda:1").requires_grad_()
    moved.grad = given[1].grad.to("cuda:1")
    assert_as_torch([given[0], moved], 0.5)


@pytest.mark.slow
def test_more_elements_than_32_bits_can_count() -> None:
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    parameter = torch.empty(2**31 + 17, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[-1] = 3.0
    parameter.grad[0] = 4.0
    norm = fastrnn.clip_grad_norm_([parameter], 1.0)
    assert norm.item() == 5.0
    assert parameter.grad[-1].item() == pytest.approx(0.6, rel=2.0**-8)
    assert parameter.grad[0].item() == pytest.approx(0.8, rel=2.0**-8)


def test_float32_norm_of_float16_gradients_does_not_overflow() -> None:
    given = parameters([4096], torch.float16)
    given[0].grad.fill_(2000.0)
    clipper = fastrnn.GradientClipper(given, 1.0, norm_dtype=torch.float32)
    norm = clipper.clip()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(2000.0 * 64.0)
    assert given[0].grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "unclipped"])
def test_clip_into_a_fused_step_is_clip_and_step(max_norm: float) -> None:
    ours = parameters([65, 4097])
    theirs = twins(ours)
    optimizers = [torch.optim.AdamW(given, lr=1e-2, fused=True) for given in (ours, theirs)]
    clipper = fastrnn.GradientClipper(ours, max_norm)
    for step in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        # The first step makes the states.
        with without_waiting() if step else contextlib.nullcontext():
            norm = clipper.clip_into(optimizers[0])
            optimizers[0].step()
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizers[1].step()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            moments = [o.state[p]["exp_avg"] for o, p in zip(optimizers, (a, b))]
            torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_skipped_without_waiting() -> None:
    given = parameters([65, 4097])
    optimizer = torch.optim.AdamW(given, fused=True)
    clipper = fastrnn.GradientClipper(given, 1.0, nonfinite="skip")
    clipper.clip_into(optimizer)
    optimizer.step()
    before = [p.detach().clone() for p in given]
    state: Any = copy.deepcopy(optimizer.state_dict())
    given[0].grad.fill_(math.nan)
    with without_waiting():
        clipper.clip_into(optimizer)
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(given, before))
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state["state"][index][name]), name
    assert clipper.nonfinite_steps == 1


def names_of_a_step(optimizer: bool, **options: Any) -> list[str]:
    """Kernels that the third step of a clipper starts, but for the optimizer's own."""
    given = parameters([65, 4097])
    clipper = fastrnn.GradientClipper(given, 1.0, **options)
    adamw = torch.optim.AdamW(given, fused=True)

    def step() -> None:
        clipper.clip_into(adamw) if optimizer else clipper.clip()

    for _ in range(2):
        step()
    return kernels(step)


@pytest.mark.parametrize("nonfinite", ["keep", "zero"])
def test_a_recorded_clip_is_one_launch(nonfinite: str) -> None:
    assert len(names_of_a_step(optimizer=False, nonfinite=nonfinite)) == 1


@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
def test_a_recorded_clip_into_a_step_is_one_launch(nonfinite: str) -> None:
    assert len(names_of_a_step(optimizer=True, nonfinite=nonfinite)) == 1


@pytest.mark.parametrize("optimizer", [False, True], ids=["clip", "clip_into"])
def test_a_percentile_is_at_most_four_launches(optimizer: bool) -> None:
    assert len(names_of_a_step(optimizer=optimizer, percentile=10.0)) <= 4


@pytest.mark.parametrize("percentile", [None, 30.0])
@pytest.mark.parametrize("nonfinite", ["keep", "skip", "zero"])
def test_the_history_is_the_cpus(nonfinite: Any, percentile: float | None) -> None:
    ours = parameters([65, 4097])
    theirs = [p.detach().cpu().requires_grad_() for p in ours]
    options: Any = {"nonfinite": nonfinite, "percentile": percentile, "history": 4}
    clippers = [fastrnn.GradientClipper(made, 40.0, **options) for made in (ours, theirs)]
    for step in range(7):
        torch.manual_seed(step)
        for a, b in zip(ours, theirs):
            b.grad = torch.randn(b.shape) * step
            if step in (2, 5):
                b.grad[3] = math.nan
            a.grad = b.grad.cuda()
        for clipper in clippers:
            clipper.clip()
    histories = [clipper.history() for clipper in clippers]
    torch.testing.assert_close(*histories, rtol=1e-5, atol=0.0, equal_nan=True)
    assert clippers[0].nonfinite_steps == clippers[1].nonfinite_steps == 2


def test_replays_are_recorded() -> None:
    given = parameters([65, 4097])
    clipper = fastrnn.GradientClipper(given, 0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            clipper.clip()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipper.clip()
    for _ in range(4):
        graph.replay()
    assert clipper.steps == 7


def test_lost_memory_does_not_mislead_the_next_launch() -> None:
    """What is freed between launches is overwritten, as a pool that is let go would be."""
    for seed in range(3):
        assert_as_torch(parameters([65, 4097]), 0.5 + seed)
        free = torch.full((2**20,), -1, dtype=torch.int64, device="cuda")
        del free


def test_skips_in_a_row_name_who_is_to_blame() -> None:
    given = parameters([65, 4097])
    optimizer = torch.optim.AdamW(given, fused=True)
    clipper = fastrnn.GradientClipper(given, 1.0, nonfinite="skip", max_skips=3)
    given[1].grad[0] = math.nan
    for _ in range(2):
        clipper.clip_into(optimizer)
        optimizer.step()
    with pytest.raises(RuntimeError, match="in 3 steps in a row"):
        clipper.clip_into(optimizer)
    assert clipper.nonfinite_names() == ["1"]
