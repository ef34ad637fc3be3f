"""``python -m bench gpu`` and the pytest-benchmark suite at toy size; a GPU played by the CPU."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import clip, footprint, gpu, lstm, measure, results_file, tables
from bench.__main__ import main
from bench.clip_cases import ClipCase, make_parameters
from bench.gpu import Plan, Stages
from bench.measure import Effort, base_record, fill_times
from bench.providers import Provider
from bench.results_file import load
from bench.workloads import Case, Shape
from fastrnn.choosing import cudnn

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def run(plan: Plan) -> tuple[int, str]:
    text = io.StringIO()
    status = gpu.run(plan, Console(file=text, width=200))
    return status, text.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the GPU's own tests where there is one")
@pytest.mark.slow
def test_every_stage_runs_once_and_is_not_run_again(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "out", budget=400.0, toy=True)
    status, printed = run(plan)
    logs = "".join(path.read_text() for path in plan.out.glob("*.log"))
    assert status == 0, printed + logs
    assert "tests: done" in printed
    assert "skipped" in (plan.out / "tests.log").read_text()
    assert "<testsuites" in (plan.out / "tests.xml").read_text()
    for kind in ("lstm", "clip"):
        (path,) = plan.out.glob(f"{kind}-*.json")
        record = load(path)
        assert record["kind"] == kind
        assert record["left_out"] == []
        assert {case["status"] for case in record["cases"]} == {"ok"}
    report = (plan.out / "report.md").read_text()
    assert "speech-512" in report
    assert "clip_grad_norm_" in report
    status, printed = run(plan)
    assert status == 0
    assert "within" not in printed  # no stage began


def test_a_gpu_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        main(["gpu", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_another_revisions_results_are_not_gone_on_with(tmp_path: Path) -> None:
    Stages(tmp_path).finish("tests", 0)
    assert Stages(tmp_path).done == {"tests": 0}
    state = json.loads((tmp_path / "stages.json").read_text())
    results_file.save(state | {"revision": "another"}, tmp_path / "stages.json")
    with pytest.raises(ValueError, match="holds results of revision another"):
        Stages(tmp_path)


def test_a_stage_that_was_cut_short_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stage(plan: Plan, seconds: float) -> int | None:
        asked.append(round(seconds))
        return None if len(asked) == 2 else 0

    for name in ("_tests", "_compile", "_lstm", "_clip"):
        monkeypatch.setattr(gpu, name, stage)
    plan = Plan(tmp_path, budget=1000.0, toy=True)
    status, printed = run(plan)
    assert (status, asked) == (4, [400, 200, 750, 900])  # each took no time
    assert "the same command goes on" in printed
    assert run(plan)[0] == 0
    assert asked[4:] == [200]


def fake(path: Path, cases: int, *, left: int, running: bool = False) -> None:
    record = results_file.new_record("lstm", {}, CPU)
    record["cases"] = [{"id": str(index), "status": "ok"} for index in range(cases)]
    record["left_out"] = ["x"] * left
    results_file.save(record | ({"running": {"id": "y"}} if running else {}), path)


@pytest.mark.parametrize(
    ("runs", "status"),
    [
        ([(3, 0, False)], 0),
        ([(1, 2, True), (3, 0, False)], 0),  # the process died in a case: another goes on
        ([(1, 2, False), (1, 2, False)], None),  # the budget ended, and then there was no progress
    ],
    ids=["at-once", "after-a-hang", "budget"],
)
def test_a_benchmark_goes_on_after_a_case_that_took_the_process_with_it(
    runs: list[tuple[int, int, bool]],
    status: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, commands = tmp_path / "lstm-x.json", []
    fake(path, 0, left=3)

    def python(arguments: list[str], seconds: float, log: Path) -> int:
        cases, left, running = runs[len(commands)]
        commands.append(arguments)
        fake(path, cases, left=left, running=running)
        return 0

    monkeypatch.setattr(gpu, "_python", python)
    assert gpu._benchmark(Plan(tmp_path), "lstm", 100.0) == status
    assert len(commands) == len(runs)
    assert all("--resume" in command and str(path) in command for command in commands)


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert (
        gpu._python(["-c", "print('begun', flush=True); import time; time.sleep(60)"], 3.0, log)
        is None
    )
    assert gpu._python(["-c", "import sys; sys.exit(7)"], 30.0, log) == 7


def test_sources_come_first_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    parts = gpu._environment()["PYTHONPATH"].split(os.pathsep)
    assert parts == [str(ROOT), str(ROOT / "kernels"), "elsewhere"]


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 whose work the CPU does."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cudnn.Gpu, "of", lambda device: cudnn.Gpu((9, 0), 132))

    def peak_bytes(step: Any, device: torch.device) -> int:
        step()
        return 1 << 20

    def launches(step: Any, device: torch.device) -> int:
        step()
        return 3

    monkeypatch.setattr(footprint, "peak_bytes", peak_bytes)
    monkeypatch.setattr(footprint, "launches", launches)


@pytest.mark.usefixtures("played_gpu")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("lengths", ["full", "uniform"])
def test_a_gpu_adds_memory_launches_algorithms_and_the_floor(lengths: str, training: bool) -> None:
    case = Case("life", Shape(8, 6, 64, 64), lengths, training, torch.bfloat16)
    options = lstm.Options(CPU)
    record = base_record(case)
    providers = fill_times(
        record, case, options.providers(case), Effort(CPU, 0.0, 1), lambda part: None
    )
    lstm._add_gpu(record, case, providers, options)
    ours = record["providers"]["fastrnn"]
    assert (ours["peak_bytes"], ours["launches"]) == (1 << 20, 3)
    assert record["floor"]["gpu"] == "H100 SXM"
    assert 0 < ours["of_floor"] < 1
    passes = ("forward", "backward") if training else ("forward",)
    expected = {"padded": dict.fromkeys(passes, "PERSIST_STATIC_SMALL_H")}
    if lengths == "uniform":
        expected["packed"] = dict.fromkeys(passes, "STANDARD")
    assert record["cudnn"] == expected
    json.dumps(record, allow_nan=False)  # what a result file takes


@pytest.mark.parametrize(
    ("reason", "messages", "expected"),
    [
        (None, [], None),
        ("no tile", [], "no tile"),
        (None, ["the GPU refused"], "the GPU refused"),
    ],
)
def test_a_step_loop_measured_on_a_gpu_is_named(
    reason: str | None, messages: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "can_run_triton", lambda *layer: reason)
    record = base_record(Case("life", Shape(3, 6, 4, 8)))
    measure.note_fall_back(record, Case("life", Shape(3, 6, 4, 8)), torch.device("cuda"), messages)
    assert record.get("fell_back") == expected
    assert len(tables.fall_back_notes([record])) == (expected is not None)


def test_fastrnns_warnings_are_heard_and_its_other_words_are_not() -> None:
    logger = logging.getLogger("fastrnn")
    with measure.warnings_of_fastrnn() as messages:
        logger.warning("the step loop stands in: %s", "refused")
        logger.info("which backend")
    logger.warning("later")
    assert messages == ["the step loop stands in: refused"]


@pytest.mark.usefixtures("played_gpu")
def test_memory_alone_is_of_verified_providers_and_not_timed() -> None:
    case = Case("life", Shape(8, 6, 64, 64), "uniform", dtype=torch.bfloat16)
    options = lstm.Options(CPU, timing=False)
    record = base_record(case)
    lstm._fill(record, case, options, lambda part: None)
    assert record["providers"] == {"fastrnn": {}, "packed": {}, "padded": {}}
    assert "fastrnn" in record["verification"]["errors"]
    names = list(record["providers"])
    providers = {name: Provider(name, case) for name in names}
    lstm._add_gpu(record, case, providers, options)
    assert record["providers"] == {name: {"peak_bytes": 1 << 20} for name in names}
    assert record["ratios"] == {name: {"median": 1.0} for name in names[1:]}
    assert "floor" not in record


@pytest.mark.usefixtures("played_gpu")
@pytest.mark.parametrize("step", [False, True], ids=["clip", "clip-and-step"])
def test_a_gpu_adds_launches_and_the_floor_of_a_clip(step: bool) -> None:
    case = ClipCase(3, 3000, True, step=step)
    parameters = make_parameters(case, CPU)
    record: dict[str, Any] = {"providers": {"fastrnn": {"seconds": {"median": 1.0}}}}
    calls = {"fastrnn": lambda given: None}
    clip._add_gpu(record, case, calls, parameters, lambda _: None, CPU)
    assert record["providers"]["fastrnn"]["launches"] == 3
    assert record["fell_back"]  # these gradients are the CPU's
    assert ("floor" in record) is not step


def test_the_pytest_benchmark_suite_runs_where_it_is_named() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider"]
    # In a worker's environment pytest-benchmark takes itself for one of several, and stops.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    found = subprocess.run(
        [*command, "--benchmark-enable", "--benchmark-min-rounds=1", "--benchmark-max-time=0.001"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_ragged_lstm[training-fastrnn]" in found.stdout
    assert "15 passed" in found.stdout
