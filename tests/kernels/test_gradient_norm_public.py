"""fastrnn.clip_grad_norm_ and GradientClipper through the norm kernel, in the interpreter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.clip import clip_grad_norm as clip
from fastrnn.clip import gradient_norms
from fastrnn_kernels import gradient_norm, gradient_threshold, trust
from fastrnn_kernels.launch import CannotLaunch
from tests.interpreter import RandomOrder, RunAhead, Schedule, cooperative
from tests.kernels.gradient_problems import (
    BF16,
    F16,
    F32,
    INF,
    assert_equal,
    by_a_rounding,
    random,
    scaled,
)

pytestmark = pytest.mark.interpreter
KERNEL, THRESHOLD_KERNEL = "gradient_norm_kernel", "threshold_kernel"


@contextlib.contextmanager
def on_kernel(schedule: Schedule | None = None) -> Iterator[mock.Mock]:
    """The kernel for gradients on the CPU. Yields what counts its launches."""
    original = gradient_norm.clip_gradients

    def in_five_programs(*arguments: object, **options: object) -> object:
        return original(*arguments, **options, programs=5)

    launches = mock.Mock(wraps=in_five_programs)
    with (
        mock.patch.object(clip, "cpu_groups", lambda grads: None),
        mock.patch.object(gradient_norms, "can_run_kernel", gradient_norm.can_run),
        mock.patch.object(gradient_norm, "clip_gradients", launches),
        cooperative(schedule),
    ):
        yield launches


class Launches(TorchDispatchMode):
    """Names of what would be started on a GPU: operations, but for views and allocations."""

    FREE = ("aten.empty", "aten.select", "aten.slice", "aten.unbind", "aten.unsqueeze", "aten.view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not str(operation).startswith(self.FREE):
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_a_gpu(kernel: mock.Mock) -> Iterator[Launches]:
    """Counts launches; what the host does before one, and where it asks, are not among them.

    Gradients lie on the CPU, where a clipper asks for values; here it believes that they do not.
    """
    original = kernel._mock_wraps

    def unseen(*arguments: object, **options: object) -> object:
        with torch.utils._python_dispatch._disable_current_modes():
            found = original(*arguments, **options)
        launches.names.append(KERNEL)
        return found

    settle = gradient_threshold.settle

    def unseen_settle(*arguments: object, **options: object) -> object:
        with torch.utils._python_dispatch._disable_current_modes():
            found = settle(*arguments, **options)
        launches.names.append(THRESHOLD_KERNEL)
        return found

    kernel._mock_wraps = unseen
    with (
        mock.patch.object(gradient_threshold, "settle", unseen_settle),
        mock.patch.object(torch.Tensor, "is_cpu", False),
        Launches() as launches,
    ):
        yield launches


def parameters_with(grads: Iterable[Tensor]) -> list[torch.nn.Parameter]:
    parameters = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        parameters.append(parameter)
    return parameters


def lstm_gradients(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    """The parameters of a layer after a backward pass, one without a gradient among them."""
    layer = fastrnn.LSTM(3, 10, num_layers=2, bidirectional=True)
    output, _ = layer(torch.randn(5, 4, 3))
    output.sum().backward()
    parameters = parameters_with(p.grad.to(dtype) for p in layer.parameters())
    return [*parameters[:3], torch.nn.Parameter(torch.ones(2)), *parameters[3:]]


def assert_same(mine: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if b.grad is None:
            assert a.grad is None
        else:
            # The norm may differ by a rounding, the coefficient and the product by one more each.
            assert_equal(f"gradient {index}", a.grad, b.grad, 3 * by_a_rounding(b.grad.dtype))


@pytest.mark.parametrize("norm_type", [2, 1.0, INF], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clip_grad_norm_is_torch_s(max_norm: float, dtype: torch.dtype, norm_type: float) -> None:
    torch.manual_seed(1)
    mine = lstm_gradients(dtype)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    for a, b in zip(mine, theirs, strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    with on_kernel(RandomOrder(1)) as launches:
        total_norm = fastrnn.clip_grad_norm_((p for p in mine), max_norm, norm_type)
    assert launches.call_count == 1
    assert_equal("total norm", total_norm, expected, by_a_rounding(dtype))
    assert_same(mine, theirs)


@pytest.mark.parametrize("value", [math.nan, INF, 1.0])
def test_error_if_nonfinite(value: float) -> None:
    mine, theirs = (parameters_with([random(40), torch.tensor([value])]) for _ in range(2))
    with on_kernel(RunAhead(0)) as launches:
        if math.isfinite(value):
            fastrnn.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True)
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        else:
            with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
                fastrnn.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True)
    assert launches.call_count == 1
    assert_same(mine, theirs)  # untouched where it raised


def test_what_the_kernel_does_not_take_is_torch_s() -> None:
    for grads, norm_type in (
        ([random(9)], 3.0),
        ([random(9), random(4, dtype=torch.float64)], 2.0),
    ):
        mine, theirs = parameters_with(grads), parameters_with(grads)
        with on_kernel() as launches:
            total_norm = fastrnn.clip_grad_norm_(mine, 1.0, norm_type)
        assert not launches.called
        assert_equal("norm", total_norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type))


def test_a_refused_launch_is_torch_s() -> None:
    mine, theirs = (parameters_with([random(40), random(7, seed=1)]) for _ in range(2))
    with on_kernel() as launches:
        launches.side_effect = CannotLaunch("too many programs")
        total_norm = fastrnn.clip_grad_norm_(mine, 1.0)
    assert launches.call_count == 1
    assert_equal("norm", total_norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0), 1e-6)
    assert_same(mine, theirs)


def test_a_parameter_that_comes_twice() -> None:
    (parameter,) = parameters_with([random(40)])
    before = parameter.grad.clone()
    with on_kernel():
        total_norm = fastrnn.clip_grad_norm_([parameter, parameter], 1.0)
    coefficient = 1.0 / (total_norm + 1e-6)
    assert_equal("norm", total_norm, torch.cat((before, before)).norm(), 1e-6)
    assert_equal("gradient", parameter.grad, before * coefficient * coefficient, 1e-6)


def test_gradient_clipper_norms_and_history() -> None:
    parameters = parameters_with([random(300), random(20, dtype=BF16), random(3, seed=2)])
    before = [p.grad.clone() for p in parameters]
    clipper = fastrnn.GradientClipper(parameters, 1.0, norm_dtype=F32)
    with on_kernel() as launches:
        norm = clipper.clip()
        clipper.clip()
    assert launches.call_count == 2
    assert norm.dtype == F32
    exact = torch.cat([grad.double() for grad in before]).norm()
    assert abs(float(norm) - float(exact)) <= 1e-6 * float(exact)
    coefficient = 1.0 / (norm + 1e-6)
    once = [scaled(grad, coefficient) for grad in before]
    total = torch.cat([grad.float() for grad in once]).norm()
    for parameter, grad in zip(parameters, once, strict=True):
        expected = scaled(grad, torch.clamp(1.0 / (total + 1e-6), max=1.0))
        assert_equal("gradient", parameter.grad, expected, by_a_rounding(grad.dtype))


@pytest.mark.parametrize("value", [math.nan, INF])
def test_gradient_clipper_zeroes(value: float) -> None:
    parameters = parameters_with([random(300), torch.tensor([value, 1.0])])
    clipper = fastrnn.GradientClipper(parameters, 1.0, nonfinite="zero")
    with on_kernel() as launches:
        norm = clipper.clip()
    assert launches.call_count == 1
    assert not norm.isfinite()
    assert all(p.grad.eq(0).all() for p in parameters)


def launches_of(call: str, optimizer: bool, **options: object) -> list[str]:
    """What the second of two steps of a clipper starts."""
    parameters = parameters_with([random(300), random(20, seed=1), random(3, seed=2)])
    clipper = fastrnn.GradientClipper(parameters, 1.0, **options)
    adam = torch.optim.AdamW(parameters, fused=True)
    with on_kernel() as kernel:
        for _ in range(2):
            with as_on_a_gpu(kernel) as launches:
                clipper.clip_into(adam) if optimizer else clipper.clip()
    assert clipper.steps == 2
    return launches.names


@pytest.mark.parametrize("nonfinite", ["keep", "zero"])
def test_a_clip_is_one_launch(nonfinite: str) -> None:
    assert launches_of("clip", optimizer=False, nonfinite=nonfinite) == [KERNEL]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_clip_that_has_to_ask_is_one_launch_and_the_answer(nonfinite: str) -> None:
    launches = launches_of("clip", optimizer=False, nonfinite=nonfinite)
    assert [name for name in launches if "_local_scalar_dense" not in name] == [KERNEL]


@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
def test_a_clip_into_a_step_is_one_launch(nonfinite: str) -> None:
    assert launches_of("clip_into", optimizer=True, nonfinite=nonfinite) == [KERNEL]


@pytest.mark.parametrize("into", [False, True], ids=["clip", "clip_into"])
@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
def test_a_percentile_is_at_most_three_launches(nonfinite: str, into: bool) -> None:
    launches = launches_of("", optimizer=into, nonfinite=nonfinite, percentile=10)
    started = [name for name in launches if "_local_scalar_dense" not in name]
    scaled = [] if into else ["aten._foreach_mul_.Tensor"]
    assert started == [KERNEL, THRESHOLD_KERNEL, *scaled]


def recorded(
    by_kernel: bool, into: bool, nonfinite: str, percentile: float | None
) -> tuple[object, tuple[int, int], int, list[Tensor]]:
    """The history, counts and gradients (or parameters) of six steps."""
    parameters = parameters_with([random(40), random(9, seed=1)])
    optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
    clipper = fastrnn.GradientClipper(
        parameters, 3.0, nonfinite=nonfinite, history=4, percentile=percentile
    )
    for step in range(6):
        for index, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=index + step, scale=0.3 * step)
        if step in (2, 5):
            parameters[0].grad[7] = math.nan
        with on_kernel() if by_kernel else contextlib.nullcontext():
            if into:
                clipper.clip_into(optimizer)
                optimizer.step()
            else:
                clipper.clip()
    grads = [p.detach() if into else p.grad for p in parameters]
    return clipper.history(), clipper._ring.counts(), clipper._ring._counts[2], grads


@pytest.mark.parametrize("percentile", [None, 30.0])
@pytest.mark.parametrize("nonfinite", ["keep", "skip", "zero"])
@pytest.mark.parametrize("into", [False, True], ids=["clip", "clip_into"])
def test_the_kernel_records_what_torchs_operations_would(
    into: bool, nonfinite: str, percentile: float | None
) -> None:
    if into and nonfinite == "zero":
        pytest.skip("a fused step cannot zero gradients")

    options = (into, nonfinite, percentile)
    both = recorded(True, *options), recorded(False, *options)
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_refused_threshold_is_torchs_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = mock.Mock(side_effect=CannotLaunch("no C compiler"))
    monkeypatch.setattr(gradient_threshold, "launching", refusing)
    trust.forget()
    history, counts, _, grads = recorded(True, False, "keep", 30.0)
    trust.forget()
    expected_history, expected_counts, _, expected = recorded(False, False, "keep", 30.0)
    both = (history, counts, grads), (expected_history, expected_counts, expected)
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert refusing.call_count == 1
    assert caplog.text.count("no C compiler") == 1
