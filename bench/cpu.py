"""``python -m bench cpu``: fastrnn against nn.LSTM on this machine's CPU.

Each case is first checked, then timed: one run of every provider on a batch that is not measured
warms it up and gives the results to compare. A case that fails the check has no times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench import memory, results_file, runner, tables
from bench.measure import Advance, Effort, Failed, base_record, fill_times, guarded
from bench.results_file import Record
from bench.runner import Job
from bench.sections import SECTIONS
from bench.workloads import (
    DISTRIBUTIONS,
    QUICK_SHAPES,
    RL_SHAPES,
    SHAPES,
    Case,
    Shape,
    cpu_cases,
    memory_cases,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        threads: thread settings, one after the other.
        budget: seconds of timing for each case; a case takes longer where min_rounds do.
        min_rounds: of each case, times its section's.
        repeat: rotate among this many batches; 0 for new ones in every round.
        quick: the small shapes only.
        shapes: the user's own; none for the standard ones.
        cases: regular expression that a case's id must match.
        clock: of :data:`bench.measure.CLOCKS`.
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
        """Whether the result is the standard one, fit for docs/benchmarks.md."""
        changed = self.quick or self.shapes or self.cases or self.repeat or self.clock != "wall"
        return not changed

    @property
    def servers(self) -> int:
        """Whose median a small measurement of memory is."""
        return 1 if self.quick else 4 * self.min_rounds - 3

    def effort(self, case: Case) -> Effort:
        """What one case takes."""
        rounds = self.min_rounds * SECTIONS[case.section].rounds
        return Effort(CPU, self.budget, rounds, repeat=self.repeat, clock=self.clock)

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
    flags = {
        "threads": list(options.threads),
        "budget": options.budget,
        "min_rounds": options.min_rounds,
        "repeat": options.repeat,
        "quick": options.quick,
        "shapes": [list(shape) for shape in options.shapes],
        "cases": options.cases,
        "clock": options.clock,
    }
    record = results_file.new_record("cpu", flags, CPU)
    record |= {"distributions": DISTRIBUTIONS, "memory_method": memory.method()}
    console.print(tables.heading(record))
    before = torch.get_num_threads()
    try:
        with memory.Servers(options.servers) as servers:
            status = runner.run(
                _jobs(cases, options, servers),
                record,
                path,
                console,
                table=lambda group: tables.section_table(group, console.width),
            )
    finally:
        torch.set_num_threads(before)
    record["complete"] = options.complete and status == 0
    results_file.save(record, path)
    console.print(tables.summary(record["cases"]))
    console.print(f"results: {path}")
    return status


def _jobs(cases: list[Case], options: Options, servers: memory.Servers) -> list[Job]:
    pairs = [
        (case, threads)
        for threads in options.threads
        for case in cases
        # Memory hardly depends on threads: measured once, with the most.
        if case.section != "memory" or threads == max(options.threads)
    ]
    pairs.sort(key=lambda pair: pair[0].section == "memory")
    return [_job(case, threads, options, servers) for case, threads in pairs]


def _job(case: Case, threads: int, options: Options, servers: memory.Servers) -> Job:
    base = base_record(case, threads=threads)

    def fill(record: Record, advance: Advance) -> None:
        torch.set_num_threads(threads)
        if case.section == "memory":
            _fill_memory(record, case, threads, servers, advance)
        else:
            providers = SECTIONS[case.section].providers
            fill_times(record, case, providers, options.effort(case), advance)

    return Job(
        base,
        (case.section, threads),
        _expected_seconds(case, options),
        lambda advance: guarded(dict(base), lambda record: fill(record, advance)),
    )


def _expected_seconds(case: Case, options: Options) -> float:
    """A guess, for the progress bar alone."""
    shape = case.shape
    weights = 4 * shape.hidden_size * (shape.input_size + shape.hidden_size)
    packed = shape.steps * (3e-4 + 1e-9 * shape.batch * weights)
    packed *= (1.0 if case.training else 0.3) * (0.4 if case.lengths == "full" else 1.0)
    if case.section == "memory":
        return 1.0 + memory.STEPS * 1.5 * packed
    round_seconds = 1.4 * packed
    # Before the rounds, one of every provider and one of nn.LSTM in float64.
    return max(options.budget, options.effort(case).min_rounds * round_seconds) + 3 * round_seconds


def _fill_memory(
    record: Record, case: Case, threads: int, servers: memory.Servers, advance: Advance
) -> None:
    names = SECTIONS["memory"].providers
    peaks = {}
    for index, name in enumerate(names):
        try:
            peaks[name] = servers.peak_bytes(name, case, threads)
        except RuntimeError as error:
            raise Failed(str(error)) from error
        advance((index + 1) / len(names))
    record["providers"] = {name: {"peak_bytes": peak} for name, peak in peaks.items()}
    ours = max(peaks.pop("fastrnn"), 1)
    record["ratios"] = {name: {"median": max(peak, 1) / ours} for name, peak in peaks.items()}
