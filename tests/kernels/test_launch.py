"""What the launchers make of a failure: something to fall back from, or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

from fastrnn_kernels import gradient_norm, gradient_threshold, launch
from fastrnn_kernels.failed_waits import FailedWaits
from fastrnn_kernels.launch import CannotLaunch, assert_no_spill, launching

CPU = torch.device("cpu")


@contextlib.contextmanager
def on_gpu() -> Iterator[SimpleNamespace]:
    """A tensor that says it is on a GPU."""
    waits = FailedWaits(CPU)
    with (
        mock.patch.object(launch, "failed_waits", lambda _: waits),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        yield SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)


class OutOfResources(Exception):
    """Triton's, by name."""


class PTXASError(Exception):
    """Triton's, by name."""


REFUSED = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    PermissionError(13, "Permission denied", "/root/.triton/cache"),
    OSError(30, "Read-only file system", "/home/user/.triton"),
    PTXASError("PTXAS error: Internal Triton PTX codegen error"),
    OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
    RuntimeError("Triton Error [CUDA]: operation not supported"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("0 active drivers ([]). There should only be one."),
    ImportError("libcuda.so cannot found!"),
    AssertionError("a compiler's"),
    TypeError("an argument's"),
]
STICKY = [
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "Triton Error [CUDA]: unspecified launch failure",
    "Triton Error [CUDA]: misaligned address",
    "CUDA error: an illegal instruction was encountered",
    "Triton Error [CUDA]: operation not supported on global/shared address space",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: uncorrectable ECC error encountered",
]


@pytest.mark.parametrize("error", REFUSED, ids=lambda error: str(error)[:40])
def test_whatever_fails_before_the_kernel_runs_is_a_refusal(error: Exception) -> None:
    with (
        on_gpu() as tensor,
        pytest.raises(CannotLaunch, match="cuda:0 refused") as found,
        launching(tensor),
    ):
        raise error
    assert type(error).__name__ in str(found.value)
    assert str(error) in str(found.value)
    assert found.value.__cause__ is error


@pytest.mark.parametrize("words", STICKY)
def test_an_error_that_leaves_no_gpu_is_raised_as_it_is(words: str) -> None:
    error = RuntimeError(words)
    with on_gpu() as tensor, pytest.raises(RuntimeError) as found, launching(tensor):
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), SystemExit()])
def test_full_memory_and_exits_are_nobodys_refusal(error: BaseException) -> None:
    with on_gpu() as tensor, pytest.raises(type(error)) as found, launching(tensor):
        raise error
    assert found.value is error


def test_an_error_of_the_interpreter_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    error = RuntimeError("a test's")
    with pytest.raises(RuntimeError) as found, launching(torch.zeros(1)):
        raise error
    assert found.value is error


def test_a_spill_is_an_error_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = SimpleNamespace(name="lstm_forward_kernel", n_spills=3)
    assert_no_spill(spilling)
    monkeypatch.setenv("FASTRNN_ASSERT_NO_SPILL", "1")
    assert_no_spill(SimpleNamespace(name="lstm_forward_kernel", n_spills=0))
    assert_no_spill(None)
    with pytest.raises(RuntimeError, match="lstm_forward_kernel spills 3 registers"):
        assert_no_spill(spilling)


def clip() -> None:
    gradient_norm.clip_gradients([torch.ones(3)], 1.0)


def settle() -> None:
    ring = gradient_norm.Ring(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    gradient_threshold.settle(torch.tensor(1.0), ring, 50.0, 1.0)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (gradient_norm, "gradient_norm_kernel", clip),
        (gradient_threshold, "threshold_kernel", settle),
    ],
    ids=["norm", "threshold"],
)
def test_a_spill_of_a_clip_too(
    module: ModuleType, name: str, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.return_value = SimpleNamespace(name=name, n_spills=3)
    monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(gradient_norm, "_cannot_run_on", lambda device: None)
    call()
    monkeypatch.setenv("FASTRNN_ASSERT_NO_SPILL", "1")
    with pytest.raises(RuntimeError, match=f"{name} spills 3 registers"):
        call()
