"""Measure job after job: a progress bar with the time left, results kept at every step.

After each job the whole record is written, so that Ctrl-C, a time budget or a lost machine costs
one job at most. A run can go on where another stopped: what stands in the file is not measured
again, and what was being measured when a process died is entered as failed.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from bench import results_file
from bench.measure import Advance
from bench.results_file import Record

_REDRAW = 0.5  # seconds between two drawings of the progress bar
INTERRUPTED, DEVICE_LOST = 130, 3


@dataclass(frozen=True)
class Job:
    """One case to measure.

    Attributes:
        base: the case's record before anything is measured; ``id`` and ``threads`` make it unique.
        group: cases of one table; neighbours.
        expected: seconds, a guess for the progress bar and the budget.
        measure: does it, and returns the case's record.
    """

    base: Record
    group: Hashable
    expected: float
    measure: Callable[[Advance], Record]


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Attributes:
        budget: seconds for all jobs; none begins that is expected to end later. Default: no end.
        job: seconds after which a job is taken to hang, and the process is ended with its traceback
            on stderr; a kernel that waits for ever cannot be stopped otherwise. Default: no end.
    """

    budget: float | None = None
    job: float | None = None


NO_LIMITS = Limits()


def run(
    jobs: Sequence[Job],
    record: Record,
    path: Path,
    console: Console,
    *,
    table: Callable[[list[Record]], RenderableType],
    limits: Limits = NO_LIMITS,
) -> int:
    """Measure the jobs that ``record`` has no case of, into it and its file.

    Args:
        jobs: in order.
        record: of :func:`bench.results_file.new_record`, or an earlier run's to go on with.
        path: of its file.
        console: that shows the bar and each finished table.
        table: of the cases of one group.
        limits: of time.

    Returns:
        The exit status: 0; 1 where a case failed; 3 where the device can do no more in this
        process; 130 where the user stopped it. ``record["left_out"]`` has the ids of jobs that
        were not measured.
    """
    cases: list[Record] = record["cases"]
    bury(record)
    done = {(case["id"], case["threads"]) for case in cases}
    waiting = [job for job in jobs if (job.base["id"], job.base["threads"]) not in done]
    record["left_out"] = [job.base["id"] for job in waiting]
    status, shown = 0, len(cases)
    try:
        for group in _measure_all(waiting, record, path, console, limits):
            console.print(table(group))
            shown += len(group)
    except KeyboardInterrupt:
        status = INTERRUPTED
        kept = f"what was measured until then is kept ({len(cases)} cases)"
        console.print(f"\n[yellow]stopped: {kept}[/]")
    except DeviceLost:
        status = DEVICE_LOST
        console.print("\n[red]the GPU can do no more in this process; run again with --resume[/]")
    finally:
        faulthandler.cancel_dump_traceback_later()
        record.pop("running", None)
    if rest := cases[shown:]:
        console.print(table(rest))
    if record["left_out"] and not status:
        left = f"{len(record['left_out'])} cases are left"
        console.print(f"[yellow]the budget is used and {left}; run again with --resume[/]")
    record["environment"]["load_average_after"] = results_file.load_average()
    results_file.save(record, path)
    return status or int(any(case["status"] == "failed" for case in cases))


class DeviceLost(Exception):
    """A CUDA error after which every call in this process fails."""


def bury(record: Record) -> None:
    """Enter as failed what was being measured when an earlier process died."""
    running = record.pop("running", None)
    if running is not None:
        record["cases"].append(
            running | {"status": "failed", "error": "the process died or hung while measuring it"}
        )


def _measure_all(
    jobs: Sequence[Job], record: Record, path: Path, console: Console, limits: Limits
) -> Iterator[list[Record]]:
    """Measure; yield each finished group."""
    started = time.monotonic()
    total = sum(job.expected for job in jobs)
    group: list[Record] = []
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.fields[done]}/{task.fields[count]}", table_column=_column(5)),
        TimeElapsedColumn(table_column=_column(7)),
        TextColumn("left", table_column=_column(4)),
        TimeRemainingColumn(table_column=_column(7)),
        TextColumn("{task.description}", style="dim", table_column=_column(1)),
    )
    # Drawn between rounds: a thread that draws would take the interpreter from what is timed.
    with Progress(
        *columns, console=console, transient=True, speed_estimate_period=120, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=total, done=0, count=len(jobs))
        planned = drawn = 0.0
        for index, job in enumerate(jobs):
            took = time.monotonic() - started
            # Guesses are corrected by what the jobs before took.
            expected = job.expected * (took / planned if planned else 1.0)
            if limits.budget is not None and took + expected > limits.budget:
                break
            if group and jobs[index - 1].group != job.group:
                yield group
                group = []
            bar.update(task, description=job.base["id"], done=index, refresh=True)

            def advance(part: float, begin: float = planned, job: Job = job) -> None:
                nonlocal drawn
                bar.update(task, completed=begin + min(part, 1.0) * job.expected)
                if time.monotonic() > drawn + _REDRAW:
                    bar.refresh()
                    drawn = time.monotonic()

            record["running"] = job.base
            if limits.job is not None:
                results_file.save(record, path)
                faulthandler.dump_traceback_later(limits.job, exit=True, file=sys.__stderr__)
            measured = job.measure(advance)
            faulthandler.cancel_dump_traceback_later()
            del record["running"]
            planned += job.expected
            bar.update(task, completed=planned, done=index + 1)
            group.append(measured)
            record["cases"].append(measured)
            record["left_out"].remove(job.base["id"])
            results_file.save(record, path)
            if "CUDA error" in measured.get("error", ""):
                raise DeviceLost(measured["error"])
    if group:
        yield group


def _column(width: int) -> Column:
    return Column(no_wrap=True, min_width=width)
