"""A kernel is used after a check on the GPU at hand; here the interpreter is the GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastrnn_kernels import (
    bounded_layout,
    gradient_norm,
    gradient_threshold,
    lstm_backward,
    lstm_forward,
    previous_states,
    trust,
)
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


def ring() -> gradient_norm.Ring:
    return gradient_norm.Ring(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))


def clip(**options) -> None:
    with cooperative():
        gradient_norm.clip_gradients(several(torch.float32).grads, 1.0, **options)


def recorded_clip() -> None:
    clip(ring=ring())


def threshold(**options) -> None:
    with cooperative():
        gradient_threshold.settle(torch.tensor(2.0), ring(), 50.0, 1.0, **options)


def layout(**flags) -> None:
    with cooperative():
        given = {"lengths": torch.tensor([2, 4]), "mask": None, "resets": None} | flags
        bounded_layout.bounded_layout(2, 4, **given, time_major=True, device=CPU)


def previous(given: Problem | None = None) -> None:
    given = given or problem()
    gates_x, _, h_0, _ = given.inputs()
    h = gates_x[..., : given.H].contiguous()
    with cooperative():
        steps = given.rows.batch_sizes, given.rows.offsets
        previous_states.previous_states(h, h_0, *steps)


@pytest.fixture
def checks() -> Iterator[mock.Mock]:
    """The checks of all kernels; all pass."""
    passes = mock.Mock(return_value=None)
    names = ("forward", "backward", "norm", "threshold", "layout", "previous")
    with mock.patch.multiple(trust.checking, **{f"check_{name}": passes for name in names}):
        yield passes


every_kernel = pytest.mark.parametrize(
    "call",
    [forward, backward, clip, recorded_clip, threshold, layout, previous],
    ids=lambda call: call.__name__,
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


def test_each_variant_around_the_layers_is_checked(checks: mock.Mock) -> None:
    flags = torch.ones(2, 4, dtype=torch.bool)
    calls = [
        *(clip, recorded_clip, threshold, layout, previous),
        lambda: threshold(spare_nonfinite=True),
        lambda: layout(mask=flags),
        lambda: layout(resets=flags),
        lambda: previous(problem(D=2)),
        lambda: previous(problem(torch.bfloat16)),
    ]
    for count, call in enumerate(calls, start=1):
        for _ in range(2):
            call()
            assert checks.call_count == count
    assert len(trust.verdicts.findings()) == len(calls)


def test_a_layer_is_not_used_without_its_previous_states(checks: mock.Mock) -> None:
    checks.return_value = "previous is off by 3, where 0 is allowed"
    with pytest.raises(CannotLaunch):
        previous()
    assert "previous is off by 3" in trust.refusal(CPU, torch.float32, 6, 1)
    assert trust.refusal(CPU, torch.float32, 6, 2) is None


@pytest.mark.parametrize("call", [threshold, layout], ids=lambda call: call.__name__)
def test_no_layer_is_refused_for_a_kernel_that_it_can_do_without(call, checks: mock.Mock) -> None:
    checks.return_value = "wrong"
    with pytest.raises(CannotLaunch):
        call()
    assert trust.refusal(CPU, torch.float32, 6, 1) is None
    assert gradient_norm.can_run(several(torch.float32).grads) is None


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
    recurrence = (lstm_forward, lstm_backward, previous_states)
    for module in (*recurrence, gradient_norm, gradient_threshold, bounded_layout):
        monkeypatch.setattr(module, "launching", refusing)
    for _ in range(3):
        with pytest.raises(CannotLaunch, match="too many blocks"):
            call()
    assert refusing.call_count == 1
    assert caplog.text.count("too many blocks") == 1


def test_full_memory_is_no_verdict(checks: mock.Mock, caplog: pytest.LogCaptureFixture) -> None:
    checks.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CannotLaunch, match="no memory on cpu to check"):
        forward()
    assert "no memory on cpu to check" in caplog.text
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
        for options in ({}, {"norm_dtype": torch.float32}, {"scale": False}, {"record": True}):
            assert trust.checking.check_norm(norm_type, dtypes, options, CPU) is None


@pytest.mark.parametrize("nonfinite", ["scale", "zero", "spare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_thresholds_kernel_passes(dtype: torch.dtype, nonfinite: str) -> None:
    with cooperative():
        assert trust.checking.check_threshold(dtype, nonfinite, CPU) is None


@pytest.mark.parametrize("given", [*itertools.product((False, True), repeat=4)][2:], ids=str)
def test_the_layouts_kernels_pass(given: tuple[bool, bool, bool, bool]) -> None:
    with cooperative():
        assert trust.checking.check_layout(*given, CPU) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 2])
def test_the_previous_states_kernel_passes(D: int, dtype: torch.dtype) -> None:
    with cooperative():
        for H in (6, 130):
            assert trust.checking.check_previous(H, D, dtype, CPU) is None


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
    "record": [
        ("gradient_kernel.py", "tl.store(row_ptr + 1, max_norm)", "tl.store(row_ptr + 1, total)"),
        ("gradient_kernel.py", "steps % capacity * 3", "steps // capacity * 0"),
        ("gradient_kernel.py", "(tl.load(counts_ptr + 2) + 1) * nonfinite", "nonfinite + 1"),
    ],
    "threshold": [
        ("gradient_threshold.py", "rank = place.to(tl.int32)", "rank = place.to(tl.int32) + 1"),
        ("gradient_threshold.py", "(bits >= 0) & (bits < LARGEST)", "(bits >= 0)"),
        ("gradient_threshold.py", "(place - rank.to(tl.float32))", "0.0"),
        ("gradient_threshold.py",
         "total, threshold, coefficient, is_finite", "total, max_norm, coefficient, is_finite"),
    ],
    "layout": [
        ("bounded_layout.py", "resets - reset, last_resets", "resets, last_resets"),
        ("bounded_layout.py", "(first & keeps)", "first"),
        ("bounded_layout.py", "total += tl.sum(size, 0)", "total += 0"),
        ("bounded_layout.py", "tl.where(valid, row, N - 1)", "row"),
    ],
    "previous": [
        ("previous_states.py", "before = step - 1 + 2 * direction", "before = step - 1"),
        ("previous_states.py", "tl.where(known[:, None], h, h_0)", "h"),
        ("previous_states.py", "known = used & active", "known = used"),
        ("previous_states.py", "used = row < valid", "used = row < N"),
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
        elif which == "threshold":
            reason = checking.check_threshold(torch.float32, "scale", CPU)
        elif which == "layout":
            reason = checking.check_layout(True, True, True, False, CPU)
        elif which == "previous":
            reason = checking.check_previous(6, 2, torch.float32, CPU)
        else:
            options = {"record": True} if which == "record" else {}
            reason = checking.check_norm(2.0, (torch.float32,), options, CPU)
    assert reason is not None
    assert "is allowed" in reason


def test_a_check_is_made_outside_of_the_callers_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers run inside an operator, below autograd, and under autocast."""
    random = torch.get_rng_state()
    inputs = backward_inputs(problem())  # by autograd, which is out of reach below
    with (
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch._C._AutoDispatchBelowAutograd(),
        cooperative(),
    ):
        lstm_backward.lstm_backward(**inputs)
    assert trust.refusal(CPU, torch.float32, 6, 1) is None
    assert torch.equal(torch.get_rng_state(), random)
