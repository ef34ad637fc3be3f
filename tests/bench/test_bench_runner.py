"""Jobs one after the other: budget, resuming, a lost device, a process that hangs; comparing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import compare, results_file, runner
from bench.__main__ import main
from bench.measure import guarded
from bench.runner import Job, Limits

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def job(name: str, do: Callable[[], None] = lambda: None, expected: float = 1.0) -> Job:
    base = {"id": name, "threads": 1, "status": "ok"}

    def measure(advance: runner.Advance) -> dict[str, Any]:
        advance(1.0)
        return guarded(dict(base), lambda record: do())

    return Job(base, "group", expected, measure)


def record() -> dict[str, Any]:
    return results_file.new_record("lstm", {}, CPU)


def run(
    jobs: list[Job], path: Path, limits: Limits = runner.NO_LIMITS, into: Any = None
) -> tuple[int, dict[str, Any], str]:
    text = io.StringIO()
    status = runner.run(
        jobs,
        into or record(),
        path,
        Console(file=text, width=100),
        table=lambda cases: " ".join(case["id"] for case in cases),
        limits=limits,
    )
    return status, results_file.load(path), text.getvalue()


def ids(found: dict[str, Any]) -> list[str]:
    return [case["id"] for case in found["cases"]]


def test_every_job_is_measured_and_shown_once(tmp_path: Path) -> None:
    status, found, printed = run([job("a"), job("b")], tmp_path / "x.json")
    assert (status, ids(found), found["left_out"]) == (0, ["a", "b"], [])
    assert "running" not in found
    assert printed.split() == ["a", "b"]


def test_results_are_on_disk_before_the_next_job(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.json", []
    jobs = [job("a"), job("b", lambda: seen.append(ids(results_file.load(path))))]
    run(jobs, path)
    assert seen == [["a"]]


def test_a_case_that_raises_is_failed_and_the_next_is_measured(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no such luck\nand a trace")

    status, found, _ = run([job("a", fail), job("b")], tmp_path / "x.json")
    assert status == 1
    assert [case["status"] for case in found["cases"]] == ["failed", "ok"]
    assert found["cases"][0]["error"] == "no such luck"


def test_no_job_begins_that_would_end_beyond_the_budget(tmp_path: Path) -> None:
    jobs = [job("a", expected=0.001), job("b", expected=1000.0), job("c", expected=0.001)]
    status, found, printed = run(jobs, tmp_path / "x.json", Limits(budget=10.0))
    assert (status, ids(found), found["left_out"]) == (0, ["a"], ["b", "c"])
    assert "2 cases are left" in printed


def test_guesses_are_corrected_by_what_jobs_took(tmp_path: Path) -> None:
    jobs = [job("a", lambda: time.sleep(0.2), 0.01), job("b", expected=1.0)]
    _, found, _ = run(jobs, tmp_path / "x.json", Limits(budget=5.0))
    assert ids(found) == ["a"]  # the first took twenty times its guess, and the second is one of 1


def test_a_run_goes_on_where_another_stopped(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    run([job("a"), job("b", expected=1000.0)], path, Limits(budget=10.0))
    again = [job("a", lambda: pytest.fail("measured again")), job("b")]
    status, found, _ = run(again, path, into=results_file.resumed(record(), path))
    assert (status, ids(found), found["left_out"]) == (0, ["a", "b"], [])


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    status, found, printed = run([job("a"), job("b", stop), job("c")], tmp_path / "x.json")
    assert (status, ids(found), found["left_out"]) == (130, ["a"], ["b", "c"])
    assert "stopped" in printed
    assert "running" not in found


def test_a_lost_device_ends_the_process_and_is_gone_on_from(tmp_path: Path) -> None:
    def lose() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "x.json"
    status, found, printed = run([job("a", lose), job("b")], path)
    assert (status, ids(found), found["left_out"]) == (runner.DEVICE_LOST, ["a"], ["b"])
    assert "run again with --resume" in printed
    status, found, _ = run([job("a"), job("b")], path, into=results_file.resumed(record(), path))
    assert (status, ids(found)) == (1, ["a", "b"])


def test_a_case_that_hangs_ends_the_process_and_is_failed_when_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from bench.runner import Limits
        from tests.bench.test_bench_runner import job, run
        jobs = [job("a"), job("b", lambda: time.sleep(60)), job("c")]
        run(jobs, Path(sys.argv[1]), Limits(job=0.5))
    """)
    hung = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert hung.returncode == 1
    assert "Timeout" in hung.stderr  # with the traceback of where it hung
    assert results_file.load(path)["running"]["id"] == "b"
    jobs = [job("a"), job("b", lambda: pytest.fail("measured again")), job("c")]
    status, found, _ = run(jobs, path, into=results_file.resumed(record(), path))
    assert (status, ids(found)) == (1, ["a", "b", "c"])
    assert found["cases"][1]["error"] == "the process died or hung while measuring it"


@pytest.mark.parametrize(
    ("where", "name"), [("environment", "torch"), ("environment", "revision"), (None, "flags")]
)
def test_what_was_begun_otherwise_is_not_gone_on_with(
    where: str | None, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    other = record()
    (other if where is None else other[where])[name] = "something else"
    results_file.save(other, path)
    with pytest.raises(ValueError, match=f"cannot be gone on with: its {name} was"):
        results_file.resumed(record(), path)


# --- compare -------------------------------------------------------------------------------------


def result(**cases: Any) -> dict[str, Any]:
    """A result with a case for each name: fastrnn's seconds, or providers, or None for failed."""
    found = record()
    for name, value in cases.items():
        case: dict[str, Any] = {"id": name, "threads": 1, "device": "cuda", "status": "ok"}
        if value is None:
            case |= {"status": "failed", "error": "wrong"}
        else:
            case["providers"] = value if isinstance(value, dict) else {"fastrnn": timed(value)}
        found["cases"].append(case)
    return found


def timed(seconds: float, spread: float = 0.01, **more: Any) -> dict[str, Any]:
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return {"seconds": {"median": seconds, "p20": low, "p80": high}, **more}


def compared(before: Any, after: Any, threshold: float = 0.1) -> tuple[int, str]:
    text = io.StringIO()
    status = compare.run(before, after, threshold, Console(file=text, width=120))
    return status, text.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (1.0, 1.0, 0),
        (1.0, 1.09, 0),
        (1.0, 1.12, 1),
        (1.0, 0.5, 0),
        ({"fastrnn": timed(1.0, 0.2)}, {"fastrnn": timed(1.3, 0.2)}, 0),  # within the spread
        (1.0, None, 1),
        (None, 1.0, 0),
        (None, None, 0),
        ({"fastrnn": {"peak_bytes": 10 << 20}}, {"fastrnn": {"peak_bytes": 12 << 20}}, 1),
        ({"fastrnn": {"peak_bytes": 1 << 20}}, {"fastrnn": {"peak_bytes": 2 << 20}}, 0),  # scatter
    ],
)
def test_what_is_worse_by_more_than_threshold_and_spread_is_a_regression(
    before: Any, after: Any, status: int
) -> None:
    found, printed = compared(result(a=before, b=1.0), result(a=after, b=1.0))
    assert found == status
    assert f"{status} regression" in printed


def test_the_threshold_is_the_users() -> None:
    assert compared(result(a=1.0), result(a=1.3), 0.5)[0] == 0
    assert compared(result(a=1.0), result(a=1.3), 0.2)[0] == 1


def test_baselines_show_what_the_machine_did() -> None:
    before = {"fastrnn": timed(1.0), "packed": timed(2.0), "padded": {"unsupported": "x"}}
    after = {"fastrnn": timed(2.0), "packed": timed(5.0), "padded": {"unsupported": "x"}}
    _, printed = compared(result(a=before), result(a=after))
    assert "2.00×" in printed
    assert "2.50×" in printed


def test_cases_of_one_result_alone_are_counted() -> None:
    _, printed = compared(result(a=1.0, b=1.0), result(a=1.0, c=1.0, d=1.0))
    assert "1 cases only in the first" in printed
    assert "2 cases only in the second" in printed


def test_results_without_anything_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match="no case in common"):
        compared(result(a=1.0), result(b=1.0))
    with pytest.raises(ValueError, match="of one kind"):
        compared(result(a=1.0), result(a=1.0) | {"kind": "clip"})


def test_compare_command_says_by_its_status(tmp_path: Path, capsys: Any) -> None:
    slow, fast = tmp_path / "slow.json", tmp_path / "fast.json"
    results_file.save(result(a=2.0), slow)
    results_file.save(result(a=1.0), fast)
    assert main(["compare", str(fast), str(slow)]) == 1
    assert main(["compare", str(slow), str(fast)]) == 0
    with pytest.raises(SystemExit, match="threshold must be positive"):
        main(["compare", str(slow), str(fast), "--threshold", "0"])
    fast.write_text(json.dumps({"schema": 0}))
    with pytest.raises(SystemExit, match="must be a result file of schema 1"):
        main(["compare", str(slow), str(fast)])
