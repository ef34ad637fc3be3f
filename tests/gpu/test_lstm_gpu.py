"""The kernels on a GPU, through the public API: backend="triton" against float64 on the CPU.

By budget: no tensor may be off by more than twice the error of the oracle in the same dtype on the
same GPU, and one rounding of what the products are made in.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.oracle import (
    Shape,
    answer,
    assert_identical,
    by_packing,
    everything,
    make_state,
    mixed_lengths,
    oracle,
    valid_steps,
)

# torch warns of prototype features that are used here, and of TF32 where it compiles.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# Of one value; float32 products are made in TF32, as torch's switch for RNNs says by default.
ROUNDING = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
STRICT = 1e-5  # of the largest entry, for float32 without TF32; with it, 1e-3 would be usual
# Weights whole in one program, split over programs, streamed; sizes that no tile divides.
SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(3, 17, 5, 65),
    Shape(16, 33, 64, 128),
    Shape(65, 9, 63, 512),
    Shape(5, 12, 32, 1024),
    Shape(2, 5, 8, 2048),
]


def make(shape: Shape, dtype: torch.dtype, **config: Any) -> fastrnn.LSTM:
    lstm = fastrnn.LSTM(shape.I, shape.H, backend="triton", **config)
    return lstm.to("cuda", dtype)


def problem(lstm: fastrnn.LSTM, shape: Shape) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x ``[T, B, I]`` and states, on the CPU."""
    dtype = lstm.weight_ih_l0.dtype
    return torch.randn(shape.T, shape.B, shape.I).to(dtype), make_state(lstm, shape.B)


Call = Callable[[fastrnn.LSTM, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, ...]]


def on_gpu(call: Call) -> Call:
    """The same with tensors of the CPU: gradients pass through the copies."""

    def run(lstm: fastrnn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        outputs = call(lstm, x.cuda(), (hx[0].cuda(), hx[1].cuda()))
        return tuple(output.cpu() for output in outputs)

    return run


def flat(result: tuple[Any, ...]) -> tuple[Tensor, ...]:
    output, (h_n, c_n), *cells = result
    return output, h_n, c_n, *cells


def assert_within_budget(
    call: Call,
    lstm: fastrnn.LSTM,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    *,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
    cells: bool = False,
) -> None:
    """Every output and every gradient of ``call``, which runs on the GPU."""
    dtype = lstm.weight_ih_l0.dtype
    found = everything(on_gpu(call), lstm, x, hx)
    truth = answer(lstm, x, hx, valid=valid, resets=resets, cells=cells)

    def slow(lstm: fastrnn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        masks = {"valid": valid, "resets": resets}
        masks = {name: None if mask is None else mask.cuda() for name, mask in masks.items()}
        return oracle(lstm, x, hx, **masks)[: 4 if cells else 3]

    with products_in_tf32(dtype == torch.float32):
        low = everything(on_gpu(slow), lstm, x, hx)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        if not exact.numel():
            continue
        largest = exact.abs().max()
        error, slow_error = (
            (results[name].cpu().double() - exact).abs().max() for results in (found, low)
        )
        budget = 2 * (slow_error + ROUNDING[dtype] * largest)
        assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"


def assert_near(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """bfloat16 results that differ by how cuBLAS sums at most: it may choose anew on a stream."""
    for ours, theirs in zip(found, expected, strict=True):
        limit = 2.0**-6 * float(theirs.detach().float().abs().max())
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=limit)


@contextlib.contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before


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
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(shape: Shape, dtype: torch.dtype) -> None:
    lstm = make(shape, dtype)
    lengths = mixed_lengths(shape.B, shape.T)

    def call(lstm: fastrnn.LSTM, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
        return flat(lstm(x, hx, lengths=lengths))

    assert_within_budget(call, lstm, *problem(lstm, shape), valid=valid_steps(lengths, shape.T))


SMALL = Shape(5, 13, 6, 65)
LENGTHS = mixed_lengths(SMALL.B, SMALL.T)
POSITIVE = [max(1, length) for length in LENGTHS]


def by_jagged(lstm: fastrnn.LSTM, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
    rows = torch.cat([x[:length, b] for b, length in enumerate(POSITIVE)])
    offsets = torch.tensor([0, *POSITIVE], device=x.device).cumsum(0)
    output, states = lstm(torch.nested.nested_tensor_from_jagged(rows, offsets), hx)
    padded = torch.nn.utils.rnn.pad_sequence(output.values().split(POSITIVE))
    return padded, *states


def form(name: str) -> tuple[Call, dict[str, Any]]:
    """A call on the GPU, and what its answer has to know."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(SMALL.T, SMALL.B, generator=generator) < 0.7
    mask[:, 1] = False
    resets = torch.rand(SMALL.T, SMALL.B, generator=generator) < 0.3
    by_lengths = {"valid": valid_steps(LENGTHS, SMALL.T)}
    named: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "dense": ({}, {}),
        "lengths": ({"lengths": LENGTHS}, by_lengths),
        "lengths-on-the-gpu": ({"lengths": torch.tensor(LENGTHS).cuda()}, by_lengths),
        "mask": ({"mask": mask.cuda()}, {"valid": mask}),
        "resets": ({"resets": resets.cuda()}, {"resets": resets}),
        "mask-and-resets": (
            {"mask": mask.cuda(), "resets": resets.cuda()},
            {"valid": mask, "resets": resets},
        ),
        "lengths-mask-and-resets": (
            {
                "lengths": torch.tensor(LENGTHS).cuda(),
                "mask": mask.cuda(),
                "resets": resets.cuda(),
            },
            {"valid": by_lengths["valid"] & mask, "resets": resets},
        ),
        "cell-states": (
            {"lengths": LENGTHS, "return_cell_states": True},
            by_lengths | {"cells": True},
        ),
    }
    if name in ("packed", "jagged"):
        by_packed: Call = lambda lstm, x, hx: by_packing(lstm, x, hx, POSITIVE)  # noqa: E731
        return by_packed if name == "packed" else by_jagged, {
            "valid": valid_steps(POSITIVE, SMALL.T)
        }
    given, known = named[name]
    return lambda lstm, x, hx: flat(lstm(x, hx, **given)), known


FORMS = (
    "dense",
    "lengths",
    "lengths-on-the-gpu",
    "mask",
    "resets",
    "mask-and-resets",
    "lengths-mask-and-resets",
    "cell-states",
    "packed",
    "jagged",
)


@every_dtype
@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_two_bidirectional_layers(name: str, dtype: torch.dtype) -> None:
    lstm = make(SMALL, dtype, num_layers=2, bidirectional=True)
    call, known = form(name)
    assert_within_budget(call, lstm, *problem(lstm, SMALL), **known)


@pytest.mark.parametrize(
    "config",
    [{"bias": False}, {"batch_first": True}, {"memory": "recompute", "bidirectional": True}],
    ids=["no-bias", "batch-first", "recompute"],
)
def test_every_option(config: dict[str, Any]) -> None:
    lstm = make(SMALL, torch.bfloat16, **config)

    def call(lstm: fastrnn.LSTM, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
        first = lstm.batch_first
        output, *states = flat(lstm(x.transpose(0, 1) if first else x, hx, lengths=LENGTHS))
        return output.transpose(0, 1) if first else output, *states

    valid = valid_steps(LENGTHS, SMALL.T)
    assert_within_budget(call, lstm, *problem(lstm, SMALL), valid=valid)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_without_tf32_is_as_exact_as_float32(shape: Shape) -> None:
    lstm = make(shape, torch.float32)
    x, hx = problem(lstm, shape)
    with strict_float32():
        found = everything(on_gpu(lambda lstm, x, hx: flat(lstm(x, hx))), lstm, x, hx)
    for name, exact in answer(lstm, x, hx).items():
        error = (found[name].cpu().double() - exact).abs().max()
        assert error <= STRICT * exact.abs().max(), f"{name}: {error:.3g}"


def test_what_stands_in_the_padding_is_not_read() -> None:
    lstm = make(SMALL, torch.bfloat16, bidirectional=True)
    x, hx = problem(lstm, SMALL)
    valid = valid_steps(LENGTHS, SMALL.T).unsqueeze(2)

    def run(padding: float) -> dict[str, Tensor]:
        filled = torch.where(valid, x, padding)
        lengths = torch.tensor(LENGTHS).cuda()
        return everything(
            on_gpu(lambda lstm, x, hx: flat(lstm(x, hx, lengths=lengths))), lstm, filled, hx
        )

    assert_identical(run(float("nan")), run(0.0))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_the_same_again_to_the_bit(shape: Shape, dtype: torch.dtype) -> None:
    lstm = make(shape, dtype, bidirectional=True)
    x, hx = problem(lstm, shape)
    lengths = mixed_lengths(shape.B, shape.T)

    def run() -> dict[str, Tensor]:
        return everything(
            on_gpu(lambda lstm, x, hx: flat(lstm(x, hx, lengths=lengths))), lstm, x, hx
        )

    first = run()
    for _ in range(5):
        assert_identical(run(), first)


def test_a_second_backward_gives_the_same() -> None:
    lstm = make(SMALL, torch.float32)
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda", requires_grad=True)
    loss = lstm(x, lengths=LENGTHS)[0].square().sum()
    leaves = [x, *lstm.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_auto_is_triton_here() -> None:
    lstm = make(SMALL, torch.bfloat16)
    auto = copy.deepcopy(lstm)
    auto.backend = "auto"
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(lstm(x, lengths=LENGTHS)[0], auto(x, lengths=LENGTHS)[0])
    names = kernels(lambda: auto(x, lengths=LENGTHS))
    assert any("lstm_forward_kernel" in name for name in names)


def test_one_launch_in_each_direction_of_differentiation() -> None:
    lstm = make(SMALL, torch.bfloat16, num_layers=2, bidirectional=True)
    x = torch.randn(40, SMALL.B, SMALL.I, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        lstm(x)[0].sum().backward()

    step()
    names = kernels(step)
    assert sum("lstm_forward_kernel" in name for name in names) == 2  # layers
    assert sum("lstm_backward_kernel" in name for name in names) == 2


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("packed", "jagged")])
def test_nothing_waits_for_the_gpu(name: str) -> None:
    """To pack, and of a jagged tensor the longest length, torch itself waits."""
    lstm = make(SMALL, torch.bfloat16, num_layers=2, bidirectional=True)
    x, hx = problem(lstm, SMALL)
    x, hx = x.cuda(), (hx[0].cuda(), hx[1].cuda())
    call, _ = form(name)

    def step() -> None:
        call(lstm, x, hx)[0].sum().backward()

    step()
    with without_waiting():
        step()


def test_new_lengths_and_steps_compile_nothing() -> None:
    import triton

    lstm = make(SMALL, torch.bfloat16)

    def step(steps: int, lengths: list[int]) -> None:
        x = torch.randn(steps, SMALL.B, SMALL.I, device="cuda", dtype=torch.bfloat16)
        lstm(x, lengths=lengths)[0].sum().backward()

    step(16, [16, 8, 4, 2, 1])
    compiled = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found)
    try:
        step(32, [32, 3, 0, 7, 9])
        step(17, [17, 17, 1, 5, 3])
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_its_dtype(dtype: torch.dtype) -> None:
    lstm = make(SMALL, torch.float32)
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda")
    with torch.autocast("cuda", dtype):
        output, states = lstm(x, lengths=LENGTHS)
    assert {output.dtype, *(state.dtype for state in states)} == {dtype}
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lstm.parameters())


def test_double_backward_is_that_of_the_step_loop() -> None:
    lstm = make(SMALL, torch.float32)
    loop = copy.deepcopy(lstm)
    loop.backend = "reference"
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda")

    def penalty(module: fastrnn.LSTM) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output = module(leaf, lengths=LENGTHS)[0]
        [gradient] = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(module.parameters())))

    with strict_float32():
        for ours, expected in zip(penalty(lstm), penalty(loop)):
            limit = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=limit)


def test_compiles_into_one_graph() -> None:
    lstm = make(SMALL, torch.bfloat16, num_layers=2, bidirectional=True)
    lengths = torch.tensor(LENGTHS).cuda()
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda", dtype=torch.bfloat16)

    def run(module: Any) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        output, (h_n, c_n) = module(leaf, lengths=lengths)
        weights = list(lstm.parameters())
        return (
            output,
            h_n,
            c_n,
            *torch.autograd.grad(output.float().square().sum(), [leaf, *weights]),
        )

    compiled = torch.compile(lstm, fullgraph=True)
    assert_near(run(compiled), run(lstm))


def test_a_captured_step_replays_with_other_data_and_lengths() -> None:
    lstm = make(SMALL, torch.bfloat16, bidirectional=True)
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor(LENGTHS).cuda()
    weights = list(lstm.parameters())

    def step() -> tuple[Tensor, ...]:
        output = lstm(x, lengths=lengths)[0]
        return output, *torch.autograd.grad(output.float().square().sum(), weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.randint(0, SMALL.T + 1, (SMALL.B,)))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert_near(replayed, step())


def test_streams_do_not_disturb_each_other() -> None:
    shape = Shape(16, 200, 64, 512)
    modules = [make(shape, torch.bfloat16, bidirectional=True) for _ in range(2)]
    inputs = [
        torch.randn(shape.T, shape.B, shape.I, device="cuda", dtype=torch.bfloat16) for _ in modules
    ]

    def step(module: fastrnn.LSTM, x: Tensor) -> list[Tensor]:
        output = module(x)[0]
        loss = output.float().square().sum()
        return [output, *torch.autograd.grad(loss, list(module.parameters()))]

    expected = [step(module, x) for module, x in zip(modules, inputs)]
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, module, x in zip(streams, modules, inputs):
            with torch.cuda.stream(stream):
                found.append(step(module, x))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected):
            assert_near(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_current() -> None:
    lstm = make(SMALL, torch.bfloat16)
    x = torch.randn(SMALL.T, SMALL.B, SMALL.I, device="cuda:0", dtype=torch.bfloat16)
    expected = lstm(x, lengths=LENGTHS)[0]
    other = copy.deepcopy(lstm).to("cuda:1")
    assert torch.cuda.current_device() == 0
    found = other(x.to("cuda:1"), lengths=LENGTHS)[0]
    assert found.device == torch.device("cuda", 1)
    assert torch.equal(found.cpu(), expected.cpu())
    found.float().sum().backward()
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
def test_more_gates_than_32_bits_can_count() -> None:
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    shape = Shape(1024, 520, 8, 1024)
    assert shape.B * shape.T * 4 * shape.H > 2**31
    lstm = make(shape, torch.bfloat16)
    x = torch.randn(shape.T, shape.B, shape.I, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = lstm(x)[0][:, -8:].clone()
        alone = lstm(x[:, -8:].contiguous())[0]
    # Cut into other tiles, products are summed in another order.
    torch.testing.assert_close(found.float(), alone.float(), rtol=0, atol=2.0**-6)


def test_gpu_reasons_are_told() -> None:
    assert fastrnn.backends()["triton"] == "available"
    lstm = fastrnn.LSTM(4, 8, proj_size=4, backend="triton", device="cuda")
    with pytest.raises(RuntimeError, match="proj_size"):
        lstm(torch.randn(3, 2, 4, device="cuda"))
    auto = fastrnn.LSTM(4, 8, proj_size=4, device="cuda")
    assert auto(torch.randn(3, 2, 4, device="cuda"))[0].shape == (3, 2, 4)
