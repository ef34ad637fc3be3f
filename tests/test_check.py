"""`python -m fastrnn check`: what it compares, what it says, how it leaves; without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from fastrnn import check as check_module
from fastrnn.check import KERNEL_DTYPES, WAY_DTYPES, WAYS, Result, check_ways, kinds
from fastrnn.choosing.environment import switch
from fastrnn.recipes.command_line import main
from fastrnn.ways import step_loop

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    switch.cache_clear()
    yield
    switch.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks kernels where it can")
def test_without_a_gpu_the_rest_is_checked_and_it_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert out.count(": passed") == len(WAYS) * len(WAY_DTYPES)
    assert "no kernel was checked: torch finds no GPU" in out
    assert out.endswith("9 passed, 0 failed\n")


def test_a_wrong_way_is_found_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    real = step_loop.StepLoop.forward

    def wrong(*arguments, **options):
        output, saved = real(*arguments, **options)
        return output._replace(h=output.h * 1.001), saved

    with mock.patch.object(step_loop.StepLoop, "forward", wrong):
        failed = {result.name for result in check_ways() if result.reason is not None}
        assert {"reference float32", "reference float64"} <= failed
        assert not any(name.startswith("torch") for name in failed)
        assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "reference float64: FAILED, output is off by" in out
    assert out.endswith(f"{9 - len(failed)} passed, {len(failed)} failed\n")


def test_a_forced_backend_is_the_only_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", "torch")
    names = [result.name for result in check_ways()]
    assert [name.split()[0] for name in names] == ["torch"] * len(WAY_DTYPES)


def test_a_switch_with_a_wrong_value_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CHECK", "sometimes")
    assert main(["check"]) == 2
    err = capsys.readouterr().err
    assert err == "fastrnn: FASTRNN_CHECK must be one of 0, first, always, got 'sometimes'\n"


def test_every_kind_of_kernel_is_among_those_that_are_checked() -> None:
    found = kinds(CPU, check_module.HIDDEN_SIZES)
    assert len(found) == len(set(found))
    recurrences = [each for each in found if type(each).__name__ == "RecurrenceVariant"]
    for which, options in (("forward", {"gates", "cells", "nothing"}), ("backward", {True, False})):
        own = [each for each in recurrences if each.which == which]
        assert {each.option for each in own} == options
        assert {each.D for each in own} == {1, 2}
        for dtype in KERNEL_DTYPES:
            of_dtype = [each for each in own if each.dtype == dtype]
            precisions = {"tf32", "tf32x3"} if dtype == torch.float32 else {"tf32"}
            assert {each.input_precision for each in of_dtype} == precisions
            residencies = {each.tile.residency for each in of_dtype}
            assert residencies == {"whole", "split", "streamed"}
    norms = [each for each in found if type(each).__name__ == "NormVariant"]
    assert {each.norm_type for each in norms} == {1.0, 2.0, float("inf")}
    recorded = {each.dtypes for each in norms if ("record", True) in each.options}
    assert recorded == {(dtype,) for dtype in KERNEL_DTYPES}
    helpers = [each for each in found if type(each).__name__ == "HelperVariant"]
    assert Counter(each.which for each in helpers) == {
        "threshold": len(KERNEL_DTYPES) * 3,
        "previous": len(KERNEL_DTYPES) * len(check_module.HIDDEN_SIZES) * 2,
        "layout": 2**4 - 2,
    }


def test_a_gpu_s_kernels_are_checked_and_failures_decide_the_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrnn_kernels import trust

    monkeypatch.setattr(check_module, "gpus", lambda: [CPU])
    monkeypatch.setattr(check_module, "can_run_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reasons = iter([*[None] * 3, "h is off by 3, where 0.1 is allowed", *[None] * 1000])
    monkeypatch.setattr(trust, "check_now", lambda variant: next(reasons))
    assert main(["check", "--hidden-size", "64"]) == 1
    out = capsys.readouterr().out
    assert "the kernels on cpu, a GPU" in out
    assert out.count("FAILED") == 1
    assert "FAILED, h is off by 3, where 0.1 is allowed" in out
    count = len(kinds(CPU, [64]))
    assert out.endswith(f"{count + 8} passed, 1 failed\n")


def test_a_gpu_that_cannot_run_the_kernels_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "gpus", lambda: [CPU])
    monkeypatch.setattr(check_module, "can_run_triton", lambda device: "it is too old")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert main(["check"]) == 0
    assert "none can run: it is too old" in capsys.readouterr().out


def test_compilation_is_timed_by_the_compilers_own_clock() -> None:
    from triton import knobs

    before = knobs.compilation.listener
    with check_module._Compilations() as compilations:
        listener = knobs.compilation.listener
        for seconds, cache_hit in ((1, False), (7, True), (2, False)):
            listener(times=mock.Mock(total=seconds * 1_000_000), cache_hit=cache_hit, src=None)
    assert knobs.compilation.listener is before
    assert str(Result("a kernel", None, compilations.seconds)) == (
        "a kernel: passed, compiled in 3.0 s"
    )
    assert str(Result("a kernel", None)) == "a kernel: passed"
