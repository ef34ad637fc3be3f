"""A kernel is used after a check on the GPU at hand; here the interpreter is the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastrnn_kernels import gradient_norm, lstm_backward, lstm_forward, trust
from fastrnn_kernels.failed_waits import BarrierTimeout
from fastrnn_kernels.launch import CannotLaunch
from fastrnn_kernels.tiling import CHIPS, Chip
from tests.interpreter import cooperative
from tests.kernels.gradient_problems import several
from tests.kernels.launches import small_tile
from tests.kernels.mutants import mutated
from tests.kernels.problems import ROWS, Problem, backward_inputs

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU are on a GPU that nobody has checked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTRNN_CHECK", "first")
    monkeypatch.setattr(trust, "_needs_trust", lambda device: True)
    trust.forget()
    chip = Chip("sm_90", multiprocessors=2, shared_memory=232_448)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: chip))
    for module, name in ((lstm_forward, "forward_tile"), (lstm_backward, "backward_tile")):
        monkeypatch.setattr(module, name, lambda S, H, *_: small_tile("split", S, H))
    yield
    trust.forget()


def problem(dtype: torch.dtype = torch.float32, D: int = 1) -> Problem:
    return Problem(ROWS["ragged"], H=6, D=D, dtype=dtype)


def forward(given: Problem | None = None, save: str = "gates", **options) -> None:
    given = given or problem()
    with cooperative():
        inputs = (*given.inputs(), given.rows.batch_sizes, given.rows.offsets)
        lstm_forward.lstm_forward(*inputs, save=save, **options)


def backward(given: Problem | None = None) -> None:
    with cooperative():
        lstm_backward.lstm_backward(**backward_inputs(given or problem()))


def clip() -> None:
    with cooperative():
        gradient_norm.clip_gradients(several(torch.float32).grads, 1.0)


@pytest.fixture
def checks() -> Iterator[mock.Mock]:
    """The checks of all kernels; all pass."""
    passes = mock.Mock(return_value=None)
    with mock.patch.multiple(
        trust.checking, check_forward=passes, check_backward=passes, check_norm=passes
    ):
        yield passes


every_kernel = pytest.mark.parametrize(
    "call", [forward, backward, clip], ids=["forward", "backward", "clip"]
)


@every_kernel
def test_a_kernel_is_checked_once(call, checks: mock.Mock) -> None:
    for _ in range(3):
        call()
    assert checks.call_count == 1


@every_kernel
def test_the_verdict_is_kept_for_later_processes(call, checks: mock.Mock) -> None:
    call()
    trust.forget()
    call()
    assert checks.call_count == 1
    (path,) = trust.verdicts.path().parent.glob("verdicts-*.json")
    assert list(json.loads(path.read_text())["verdicts"].values()) == [None]


@every_kernel
def test_always_means_in_every_process(
    call, checks: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CHECK", "always")
    for _ in range(2):
        call()
        call()
        trust.forget()
    assert checks.call_count == 2


def test_each_variant_is_checked(checks: mock.Mock) -> None:
    for save in ("gates", "cells", "nothing"):
        for dtype in DTYPES:
            for D in (1, 2):
                forward(Problem(ROWS["one-step"], H=6, D=D, dtype=dtype), save)
    assert checks.call_count == 18
    forward(input_precision="tf32")
    assert checks.call_count == 19


def test_the_number_of_sequences_makes_no_other_variant(checks: mock.Mock) -> None:
    forward(Problem(ROWS["ragged"], H=6, D=1))
    forward(Problem(ROWS["one-sequence"], H=6, D=1))
    assert checks.call_count == 1


def test_who_brings_a_tile_answers_for_it(checks: mock.Mock) -> None:
    forward(tile=small_tile("split", problem().S, 6))
    assert checks.call_count == 0


@every_kernel
def test_a_kernel_that_fails_is_refused_from_then_on_with_one_warning(
    call, checks: mock.Mock, caplog: pytest.LogCaptureFixture
) -> None:
    checks.return_value = "h is off by 3, where 0.1 is allowed"
    for process in range(2):
        caplog.clear()
        for _ in range(3):
            with pytest.raises(CannotLaunch, match="failed its check on cpu, h is off by 3"):
                call()
        assert caplog.text.count("h is off by 3") == 1, process
        trust.forget()
    assert checks.call_count == 1


@every_kernel
def test_a_refusal_of_a_check_is_remembered_by_this_process_alone(call, checks: mock.Mock) -> None:
    checks.side_effect = CannotLaunch("cuda:0 refused the launch: no C compiler")
    for _ in range(2):
        with pytest.raises(CannotLaunch, match="no C compiler"):
            call()
    assert checks.call_count == 1
    trust.forget()
    checks.side_effect = None
    call()


@every_kernel
def test_a_refusal_of_a_launch_is_remembered(
    call, checks: mock.Mock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where nothing is checked."""
    monkeypatch.setenv("FASTRNN_CHECK", "0")
    refusing = mock.Mock(side_effect=CannotLaunch("too many blocks in cooperative launch"))
    for module in (lstm_forward, lstm_backward, gradient_norm):
        monkeypatch.setattr(module, "launching", refusing)
    for _ in range(3):
        with pytest.raises(CannotLaunch, match="too many blocks"):
            call()
    assert refusing.call_count == 1
    assert caplog.text.count("too many blocks") == 1


def test_full_memory_is_no_verdict(checks: mock.Mock) -> None:
    checks.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CannotLaunch, match="no memory on cpu to check"):
        forward()
    checks.side_effect = None
    forward()
    assert checks.call_count == 2


def test_a_check_whose_programs_wait_in_vain_fails(checks: mock.Mock) -> None:
    checks.side_effect = BarrierTimeout()
    with pytest.raises(CannotLaunch, match="waited for each other in vain"):
        forward()


def test_a_layer_and_the_clip_are_known_to_be_refused(checks: mock.Mock) -> None:
    grads = several(torch.float32).grads
    checks.return_value = "wrong"
    layer = (CPU, torch.float32, 6, 1)
    assert trust.refusal(*layer) is None
    assert gradient_norm.can_run(grads) is None
    for call in (forward, clip):
        with pytest.raises(CannotLaunch):
            call()
    assert "failed its check" in trust.refusal(*layer)
    assert trust.refusal(CPU, torch.bfloat16, 6, 1) is None
    assert "failed its check" in gradient_norm.can_run(grads)


@every_kernel
def test_nothing_is_checked_while_a_graph_is_captured(
    call, checks: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        mock.patch.object(trust, "_is_capturing", return_value=True),
        pytest.raises(trust.NotChecked, match="call the same once before the capture"),
    ):
        call()
    assert checks.call_count == 0
    call()
    with mock.patch.object(trust, "_is_capturing", return_value=True):
        call()
        trust.forget()
        call()  # by the verdict on disk
    assert checks.call_count == 1


@every_kernel
def test_without_checks_only_chips_that_the_gate_has_compiled_for_are_used(
    call, checks: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CHECK", "0")
    call()
    trust.forget()
    assert "sm_77" not in CHIPS
    other = Chip("sm_77", multiprocessors=2, shared_memory=232_448)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: other))
    with pytest.raises(CannotLaunch, match="sm_77 is used after a check only"):
        call()
    assert checks.call_count == 0
    trust.forget()
    monkeypatch.setenv("FASTRNN_CHECK", "first")
    call()
    assert checks.call_count == 1


def test_a_mode_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CHECK", "yes")
    with pytest.raises(ValueError, match="FASTRNN_CHECK must be one of 0, first, always, got yes"):
        forward()


# --- the checks themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residency", ["whole", "split", "streamed"])
def test_the_kernels_pass(residency: str, dtype: torch.dtype) -> None:
    tile = small_tile(residency, 9, 6)
    shape = (tile, 6, 2, dtype)
    with cooperative():
        for precision in ("tf32", "tf32x3") if dtype == torch.float32 else ("tf32",):
            for save in ("gates", "cells", "nothing"):
                assert trust.checking.check_forward(*shape, precision, save, CPU) is None
            for has_d_c in (True, False):
                assert trust.checking.check_backward(*shape, precision, has_d_c, CPU) is None


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtypes", [(dtype,) for dtype in DTYPES] + [tuple(DTYPES)], ids=str)
def test_the_clips_kernel_passes(dtypes: tuple[torch.dtype, ...], norm_type: float) -> None:
    with cooperative():
        for options in ({}, {"norm_dtype": torch.float32}, {"scale": False}):
            assert trust.checking.check_norm(norm_type, dtypes, options, CPU) is None


MUTANTS = {
    "forward": [
        ("primitives.py", "return i, f, g, o\n\n\n@triton.jit\ndef grouped_range",
         "return f, i, g, o\n\n\n@triton.jit\ndef grouped_range"),
        ("lstm_forward.py", "c = tl.where(mask, new_c, c)", "c = new_c"),
        ("lstm_forward.py", "kept = f * c", "kept = c"),
        ("lstm_forward.py", "valid = tl.load(", "valid = N + tl.load("),
    ],
    "backward": [
        ("lstm_backward.py", "(1.0 - g * g)", "(1.0 - g)"),
        ("lstm_backward.py", "d_cell += d_cells", "d_cell += 0 * d_cells"),
        ("lstm_backward.py", "tl.where(next_is_active, next_c, c_0)", "next_c"),
    ],
    "norm": [
        ("gradient_kernel.py", "tl.sum(values, axis=0)", "tl.max(values, axis=0)"),
        ("gradient_kernel.py", "(values.to(tl.float32) * coefficient)", "values.to(tl.float32)"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("which", "change"),
    [(which, change) for which in MUTANTS for change in MUTANTS[which]],
    ids=str,
)
def test_a_wrong_kernel_fails(which: str, change: tuple[str, str, str]) -> None:
    tile = small_tile("split", 9, 6)
    with mutated(*change, 1, "checking") as checking, cooperative():
        if which == "forward":
            reason = checking.check_forward(tile, 6, 2, torch.float32, "tf32x3", "gates", CPU)
        elif which == "backward":
            reason = checking.check_backward(tile, 6, 2, torch.float32, "tf32x3", True, CPU)
        else:
            reason = checking.check_norm(2.0, (torch.float32,), {}, CPU)
    assert reason is not None
    assert "is allowed" in reason


def test_a_check_is_made_outside_of_the_callers_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers run inside an operator, below autograd, and under autocast."""
    random = torch.get_rng_state()
    given = problem()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        backward(given)
    assert trust.refusal(CPU, torch.float32, 6, 1) is None
    assert torch.equal(torch.get_rng_state(), random)
