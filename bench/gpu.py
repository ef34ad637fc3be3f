"""``python -m bench gpu``: on a CUDA machine, the GPU's tests and then all its benchmarks.

Every stage is a process of its own, with its part of the time: a kernel that hangs, or an error
after which CUDA answers no more, costs one case and not the run. A stage that was cut short goes on
where it stopped, in this run or in the next with the same directory:

- ``tests``: pytest -m gpu, in several processes where pytest-xdist is there;
- ``compile``: every case's kernels, in several processes, so that the benchmark finds them;
- ``lstm``, ``clip``: the benchmarks;
- ``report``: tables and a plot, from what there is.

With ``--toy`` all of it runs in a minute on the CPU, where the GPU's tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench import report, results_file
from bench.results_file import Record

ROOT = Path(__file__).parents[1]
# Of the time that is left when the stage begins.
_SHARES = {"tests": 0.4, "compile": 0.2, "lstm": 0.75, "clip": 0.9}
_GRACE = 20.0  # seconds that a stage may end late
_TEST_LIMIT = 100  # seconds for one test
_TOY_CASES = "life/(speech-512|rl-rollout).*-bfloat16-.*training|^clip/10tensors"


@dataclass(frozen=True)
class Plan:
    """What a run was asked for.

    Attributes:
        out: directory of everything that is written.
        budget: seconds for all stages.
        case_limit: seconds after which a case is taken to hang.
        tests: run the tests first.
        toy: tiny cases, on the CPU where there is no GPU.
    """

    out: Path
    budget: float = 540.0
    case_limit: float = 90.0
    tests: bool = True
    toy: bool = False


def run(plan: Plan, console: Console) -> int:
    """Run every stage that is not done.

    Returns:
        The exit status: 0; 1 where a test or a case failed; 4 where the budget ended first: the
        same command goes on.

    Raises:
        ValueError: there is no GPU, or the directory has another revision's results.
    """
    if not torch.cuda.is_available() and not plan.toy:
        raise ValueError("torch sees no GPU here; use `python -m bench cpu`, or --toy")
    started = time.monotonic()
    plan.out.mkdir(parents=True, exist_ok=True)
    stages = Stages(plan.out)
    statuses: dict[str, int | None] = {}

    def left() -> float:
        return plan.budget - (time.monotonic() - started)

    for name, stage in (("tests", _tests), ("compile", _compile), ("lstm", _lstm), ("clip", _clip)):
        if name == "tests" and not plan.tests:
            continue
        if name not in stages.done:
            seconds = left() * _SHARES[name]
            console.print(f"[bold]{name}[/] within {seconds:.0f} s")
            if (status := stage(plan, seconds)) is not None:
                stages.finish(name, status)
            console.print(f"{name}: {_WORDS.get(status, 'failures')}")
        statuses[name] = stages.done.get(name)
    for line in report.page(plan.out):
        console.print(line)
    if None in statuses.values():
        console.print(f"the budget is used; the same command goes on (in {plan.out})")
        return 4
    return int(any(statuses.values()))


_WORDS: dict[int | None, str] = {0: "done", None: "cut short"}


class Stages:
    """Which stages are done, and with which exit status; kept in ``stages.json``.

    Raises:
        ValueError: the directory has another revision's results.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / "stages.json"
        revision = results_file.environment()["revision"]
        state: Record = {"revision": revision, "done": {}}
        if self._path.exists():
            state = json.loads(self._path.read_text())
        if state["revision"] != revision:
            raise ValueError(
                f"{out} holds results of revision {state['revision']}, and this is {revision}; "
                "give another --out"
            )
        self._state = state
        self._save()

    @property
    def done(self) -> dict[str, int]:
        found: dict[str, int] = self._state["done"]
        return found

    def finish(self, name: str, status: int) -> None:
        self.done[name] = status
        self._save()

    def _save(self) -> None:
        results_file.save(self._state, self._path)


def _workers() -> int:
    return max(1, min(8, results_file.cpu_count() // 2))


def _tests(plan: Plan, seconds: float) -> int | None:
    """Pytest's exit status; None where it was cut short. A hanging test ends its worker only."""
    command = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    command.append(f"--junitxml={(plan.out / 'tests.xml').resolve()}")
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={_TEST_LIMIT}", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") and not plan.toy:
        command += ["-n", str(_workers())]
    return _python(command, seconds, plan.out / "tests.log")


def _compile(plan: Plan, seconds: float) -> int | None:
    """Always 0: what does not compile fails where it is measured, with its reason."""
    if plan.toy:
        return 0
    workers = _workers()
    command = [sys.executable, "-m", "bench", "lstm", "--device", "cuda"]
    log = plan.out / "compile.log"
    with log.open("ab") as file:
        running = [
            subprocess.Popen(
                [*command, "--compile", f"{part}/{workers}"],
                cwd=ROOT,
                env=_environment(),
                stdout=file,
                stderr=file,
            )
            for part in range(workers)
        ]
        end = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return 0


def _lstm(plan: Plan, seconds: float) -> int | None:
    return _benchmark(plan, "lstm", seconds)


def _clip(plan: Plan, seconds: float) -> int | None:
    return _benchmark(plan, "clip", seconds)


def _benchmark(plan: Plan, kind: str, seconds: float) -> int | None:
    """Run a benchmark, again where a case took the process with it; None where time ended."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = sorted(plan.out.glob(f"{kind}-*.json"))
    path = found[-1] if found else plan.out / results_file.file_name(kind, device)
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0:
        command = ["-m", "bench", kind, "--device", device.type, "--resume", "--out"]
        command += [str(path.resolve()), "--budget", f"{remaining:.0f}"]
        command += ["--case-limit", str(plan.case_limit)]
        command += ["--toy", "--cases", _TOY_CASES] if plan.toy else []
        before = _measured(path)
        status = _python(command, remaining + _GRACE, plan.out / f"{kind}.log")
        record = results_file.load(path) if path.exists() else None
        if record is None:
            return status or 1  # it did not begin; its log says why
        if not record["left_out"] and "running" not in record:
            return int(any(case["status"] == "failed" for case in record["cases"]))
        # A process that died has left a case to be entered as failed, and so goes on after it.
        if _measured(path) == before and "running" not in record:
            break
    return None


def _measured(path: Path) -> int:
    return len(results_file.load(path)["cases"]) if path.exists() else 0


def _python(arguments: Sequence[str], seconds: float, log: Path) -> int | None:
    """A process's exit status, its output in ``log`` and here; None where it took too long."""
    with log.open("ab") as file:
        try:
            run = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=_environment(),
                stdout=file,
                stderr=file,
                timeout=max(1.0, seconds),
            )
        except subprocess.TimeoutExpired:
            return None
    return run.returncode


def _environment() -> dict[str, str]:
    """Ours, with the sources first on the path: nothing needs to be installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
