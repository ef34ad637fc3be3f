"""``python -m bench cpu``: fastrnn against nn.LSTM on this machine's CPU.

Each case is first checked, then timed: one run of every provider on a batch that is not measured
warms it up and gives the results to compare. A case that fails the check has no times.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from bench import memory, results_file, tables
from bench.providers import LABELS, TOLERANCES, Provider, reference_dtype, worst_error
from bench.results_file import Record
from bench.sections import SECTIONS
from bench.timing import interleave, speedup, spread
from bench.workloads import (
    DISTRIBUTIONS,
    QUICK_SHAPES,
    RL_SHAPES,
    SHAPES,
    Batch,
    Batches,
    Case,
    Shape,
    cpu_cases,
    memory_cases,
)

MAX_ROUNDS = 1000
# The processor's clock leaves out what other processes take: for one thread on a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_REDRAW = 0.5  # seconds between two drawings of the progress bar
_WARM_UP = -1  # the index of a batch that is not measured


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        threads: thread settings, one after the other.
        budget: seconds of timing for each case; a case takes longer where min_rounds do.
        min_rounds: of each case; and processes for a small measurement of memory.
        repeat: rotate among this many batches; 0 for new ones in every round.
        quick: the small shapes only.
        shapes: the user's own; none for the standard ones.
        cases: regular expression that a case's id must match.
        clock: of :data:`CLOCKS`.
    """

    threads: tuple[int, ...]
    budget: float = 5.0
    min_rounds: int = 3
    repeat: int = 0
    quick: bool = False
    shapes: tuple[Shape, ...] = ()
    cases: str = ""
    clock: str = "wall"

    @property
    def complete(self) -> bool:
        """Whether the result is the standard one, fit for README."""
        changed = self.quick or self.shapes or self.cases or self.repeat or self.clock != "wall"
        return not changed

    def select(self) -> list[Case]:
        """The cases asked for, those on memory last."""
        shapes, rl_shapes, variant_shape = SHAPES, RL_SHAPES, Shape(32, 100, 64, 128)
        if self.quick:
            shapes, rl_shapes = QUICK_SHAPES, (Shape(32, 64, 32, 128),)
        if self.shapes:
            shapes, rl_shapes, variant_shape = self.shapes, self.shapes[:1], self.shapes[0]
        memory_shapes = shapes[-1:] if self.quick else shapes
        cases = [*cpu_cases(shapes, rl_shapes, variant_shape), *memory_cases(memory_shapes)]
        return [case for case in cases if re.search(self.cases, case.id)]


def threads_from(text: str) -> tuple[int, ...]:
    """``1,2|all`` as numbers, without repetition.

    Raises:
        ValueError: something else.
    """
    counts = []
    for part in text.split(","):
        part = part.strip()
        if part != "all" and not (part.isdecimal() and int(part) > 0):
            raise ValueError(f"threads must be positive integers or 'all', got {part!r}")
        counts.append(torch.get_num_threads() if part == "all" else int(part))
    return tuple(dict.fromkeys(counts))


def run(options: Options, path: Path, console: Console) -> int:
    """Measure, print the tables, write the results.

    Returns:
        The exit status: 0, 1 where a check failed, 130 where the user stopped it.
    """
    cases = options.select()
    if not cases:
        console.print(f"no case matches {options.cases!r}; --list shows all")
        return 2
    record: Record = {
        "schema": results_file.SCHEMA,
        "kind": "cpu",
        "complete": False,
        "environment": results_file.environment(),
        "flags": {
            "threads": list(options.threads),
            "budget": options.budget,
            "min_rounds": options.min_rounds,
            "repeat": options.repeat,
            "quick": options.quick,
            "shapes": [list(shape) for shape in options.shapes],
            "cases": options.cases,
            "clock": options.clock,
        },
        "distributions": DISTRIBUTIONS,
        "memory_method": memory.method(),
        "cases": [],
    }
    console.print(tables.heading(record))
    before = torch.get_num_threads()
    interrupted, shown = False, 0
    try:
        for section in _measure_all(cases, options, record, path, console):
            console.print(tables.section_table(section, console.width))
            shown += len(section)
    except KeyboardInterrupt:
        interrupted = True
        if rest := record["cases"][shown:]:
            console.print(tables.section_table(rest, console.width))
        kept = f"what was measured until then is kept ({len(record['cases'])} cases)"
        console.print(f"\n[yellow]stopped: {kept}[/]")
    finally:
        torch.set_num_threads(before)
    failed = [case for case in record["cases"] if case["status"] == "failed"]
    record["environment"]["load_average_after"] = results_file.load_average()
    record["complete"] = options.complete and not interrupted and not failed
    results_file.save(record, path)
    console.print(tables.summary(record["cases"]))
    console.print(f"results: {path}")
    return 130 if interrupted else 1 if failed else 0


def _measure_all(
    cases: list[Case], options: Options, record: Record, path: Path, console: Console
) -> Iterator[list[Record]]:
    """Measure case by case into ``record`` and its file; yield each finished section."""
    jobs = [
        (case, threads)
        for threads in options.threads
        for case in cases
        # Memory hardly depends on threads: measured once, with the most.
        if case.section != "memory" or threads == max(options.threads)
    ]
    jobs.sort(key=lambda job: job[0].section == "memory")
    total = sum(_expected_seconds(case, options) for case, _ in jobs)
    section: list[Record] = []
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
        for index, (case, threads) in enumerate(jobs):
            if section and (section[-1]["section"], section[-1]["threads"]) != (
                case.section,
                threads,
            ):
                yield section
                section = []
            text = f"{case.id}, {tables.threads_name(threads)}"
            bar.update(task, description=text, done=index, refresh=True)
            expected = _expected_seconds(case, options)

            def advance(part: float, begin: float = planned, expected: float = expected) -> None:
                nonlocal drawn
                bar.update(task, completed=begin + min(part, 1.0) * expected)
                if time.monotonic() > drawn + _REDRAW:
                    bar.refresh()
                    drawn = time.monotonic()

            torch.set_num_threads(threads)
            measured = measure(case, threads, options, advance)
            planned += expected
            bar.update(task, completed=planned, done=index + 1)
            section.append(measured)
            record["cases"].append(measured)
            results_file.save(record, path)
    if section:
        yield section


def _column(width: int) -> Column:
    return Column(no_wrap=True, min_width=width)


def _expected_seconds(case: Case, options: Options) -> float:
    """A guess, for the progress bar alone."""
    shape = case.shape
    weights = 4 * shape.hidden_size * (shape.input_size + shape.hidden_size)
    packed = shape.steps * (3e-4 + 1e-9 * shape.batch * weights)
    packed *= (1.0 if case.training else 0.3) * (0.4 if case.lengths == "full" else 1.0)
    if case.section == "memory":
        return 1.0 + memory.STEPS * 1.5 * packed
    round_seconds = 1.4 * packed
    return max(options.budget, options.min_rounds * round_seconds) + round_seconds


def measure(
    case: Case,
    threads: int,
    options: Options,
    advance: Callable[[float], None] = lambda part: None,
) -> Record:
    """One case as it stands in the results: ok with figures, or failed with the reason."""
    shape = case.shape
    record: Record = {
        "id": case.id,
        "section": case.section,
        **shape._asdict(),
        "lengths": case.lengths,
        "variant": case.variant,
        "dtype": case.dtype_name,
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        "mode": case.mode,
        "threads": threads,
        "status": "ok",
    }
    fill = _fill_memory if case.section == "memory" else _fill_times
    try:
        fill(record, case, threads, options, advance)
    except _Failed as failure:
        record.update(status="failed", error=str(failure))
    return record


class _Failed(Exception):
    """A case whose figures would mean nothing."""


def _fill_times(
    record: Record,
    case: Case,
    threads: int,
    options: Options,
    advance: Callable[[float], None],
) -> None:
    batches = Batches(case, options.repeat)
    providers, unsupported = _verified(record, case, batches[_WARM_UP])
    valid_steps: list[int] = []

    def batch_of(index: int) -> Batch:
        batch = batches[index]
        valid_steps.append(batch.valid_steps)
        return batch

    def prepare(batch: Batch) -> None:
        for provider in providers.values():
            provider.clear(batch)

    spent = 0.0

    def on_round(seconds: float) -> None:
        nonlocal spent
        spent += seconds
        by_rounds = len(valid_steps) / options.min_rounds
        advance(min(by_rounds, spent / options.budget) if options.budget else by_rounds)

    samples = interleave(
        {name: _timed(provider) for name, provider in providers.items()},
        batch_of,
        prepare,
        budget=options.budget,
        min_rounds=options.min_rounds,
        max_rounds=MAX_ROUNDS,
        on_round=on_round,
        clock=CLOCKS[options.clock],
    )
    record["rounds"] = len(valid_steps)
    record["valid_steps"] = sum(valid_steps) / len(valid_steps)
    record["providers"] = unsupported | {
        name: {
            "seconds": spread(seconds)._asdict(),
            "valid_steps_per_second": spread(
                [count / second for count, second in zip(valid_steps, seconds, strict=True)]
            )._asdict(),
        }
        for name, seconds in samples.items()
    }
    ours = samples.pop("fastrnn")
    record["ratios"] = {name: speedup(seconds, ours)._asdict() for name, seconds in samples.items()}


def _timed(provider: Provider) -> Callable[[Batch], None]:
    def run(batch: Batch) -> None:
        provider.run(batch)  # its outputs are freed within the timing

    return run


def _verified(record: Record, case: Case, batch: Batch) -> tuple[dict[str, Provider], Record]:
    """The providers, warm; and what torch says of those that cannot run this case.

    Raises:
        _Failed: results differ from the reference's.
    """
    section, dtype = SECTIONS[case.section], reference_dtype(case.dtype)
    tolerance = TOLERANCES[case.dtype]
    results, providers, unsupported = {}, {}, {}
    for name in section.providers:
        provider = Provider(name, case)
        try:
            results[name] = provider.results(batch)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            message = str(error).strip().splitlines()[0]
            if name in section.checked:
                raise _Failed(f"{LABELS[name]}: {message}") from error
            unsupported[name] = {"unsupported": message}
            continue
        provider.clear(batch)
        providers[name] = provider
    if dtype == case.dtype and section.reference in results:
        reference = results[section.reference]
    else:
        reference = Provider(section.reference, case, dtype).results(batch.to(dtype))
    worst = {name: worst_error(results[name], reference) for name in section.checked}
    record["verification"] = {
        "reference": f"{LABELS[section.reference]}, {str(dtype).removeprefix('torch.')}",
        "tolerance": tolerance,
        "errors": {
            name: {"tensor": tensor, "error": error if error != float("inf") else None}
            for name, (tensor, error) in worst.items()
        },
    }
    for name, (tensor, error) in worst.items():
        if not error <= tolerance:
            raise _Failed(
                f"{tensor} of {LABELS[name]} differs from {LABELS[section.reference]} "
                f"by {error:.1e} of its largest magnitude (tolerance {tolerance:.1e})"
            )
    return providers, unsupported


def _fill_memory(
    record: Record,
    case: Case,
    threads: int,
    options: Options,
    advance: Callable[[float], None],
) -> None:
    names = SECTIONS["memory"].providers
    peaks = {}
    for index, name in enumerate(names):
        try:
            peaks[name] = memory.peak_bytes(name, case, threads, options.min_rounds)
        except RuntimeError as error:
            raise _Failed(str(error)) from error
        advance((index + 1) / len(names))
    record["providers"] = {name: {"peak_bytes": peak} for name, peak in peaks.items()}
    ours = max(peaks.pop("fastrnn"), 1)
    record["ratios"] = {name: {"median": max(peak, 1) / ours} for name, peak in peaks.items()}
