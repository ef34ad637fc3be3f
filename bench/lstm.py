"""``python -m bench lstm``: fastrnn against cuDNN, torch.compile and rivals on a GPU.

On the CPU the same cases run at toy size (``--toy``), so that the command cannot rot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import fastrnn
from bench import devices, floors, footprint, results_file, rivals, runner, tables
from bench.gpu_workloads import DTYPES, WORKLOADS, lstm_cases, toy_cases
from bench.measure import (
    WARM_UP,
    Advance,
    Effort,
    base_record,
    fill_times,
    first_line,
    guarded,
    verified,
)
from bench.providers import LABELS, Provider, unrolled_steps
from bench.results_file import Record
from bench.runner import NO_LIMITS, Job, Limits
from bench.workloads import DISTRIBUTIONS, Batches, Case
from fastrnn.choosing import cudnn

# Up to which nn.LSTM's kernels are counted: several for each step, each an event to the profiler.
_PROFILED_STEPS = 512


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        device: that is measured.
        dtypes: in order of their worth.
        case_budget: seconds of timing for each case.
        min_rounds: of each case.
        cases: regular expression that a case's id must match.
        toy: the same cases at sizes that a CPU runs in milliseconds.
        timing: False for peak memory alone.
        launches: count kernels, by torch's profiler.
        compiled: torch.compile of nn.LSTM too, where it takes less than minutes to compile.
        reference: fastrnn's step loop in PyTorch too.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = DTYPES
    case_budget: float = 1.0
    min_rounds: int = 5
    cases: str = ""
    toy: bool = False
    timing: bool = True
    launches: bool = True
    compiled: bool = False
    reference: bool = False

    @property
    def complete(self) -> bool:
        """Whether the result is the standard one, fit for docs/benchmarks.md."""
        standard = self.dtypes == DTYPES and self.timing and not (self.cases or self.toy)
        return standard and self.device.type == "cuda"

    @property
    def kind(self) -> str:
        """Of the result."""
        return "lstm" if self.timing else "memory"

    def select(self) -> list[Case]:
        """The cases asked for, the most telling first."""
        cases = lstm_cases(self.dtypes)
        if self.toy:
            cases = toy_cases(cases)
        return [case for case in cases if re.search(self.cases, case.id)]

    def providers(self, case: Case) -> list[str]:
        """Who is asked to run a case; those that cannot say why."""
        names = ["fastrnn"]
        if case.resets:
            names += ["lstm-loop", "cell-loop"]
        else:
            names += ["padded"] if case.lengths == "full" else ["packed", "padded"]
        names += [name for name in rivals.PACKAGES if rivals.installed(name)]
        names += ["compiled"] if self.compiled and not case.resets else []
        return names + (["reference"] if self.reference else [])


def run(
    options: Options,
    path: Path,
    console: Console,
    limits: Limits = NO_LIMITS,
    resume: bool = False,
) -> int:
    """Measure, print the tables, write the results.

    Returns:
        The exit status, see :func:`bench.runner.run`; 2 where there is nothing to measure.

    Raises:
        ValueError: ``resume`` and the file there cannot be gone on with.
    """
    cases = options.select()
    if not cases:
        console.print(f"no case matches {options.cases!r}; --list shows all")
        return 2
    flags = {
        "device": options.device.type,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in options.dtypes],
        "case_budget": options.case_budget,
        "min_rounds": options.min_rounds,
        "cases": options.cases,
        "toy": options.toy,
        "compiled": options.compiled,
        "reference": options.reference,
    }
    record = results_file.new_record(options.kind, flags, options.device) | {
        "distributions": DISTRIBUTIONS,
        "workloads": {name: load.about for name, load in WORKLOADS.items()},
        "backends": fastrnn.backends(),
        "not_installed": [LABELS[name] for name in rivals.PACKAGES if not rivals.installed(name)],
    }
    if resume:
        record = results_file.resumed(record, path)
    console.print(tables.heading(record))
    status = runner.run(
        [_job(case, options) for case in cases],
        record,
        path,
        console,
        table=lambda group: tables.section_table(group, console.width),
        limits=limits,
    )
    if (gpu := record["environment"]["gpu"]) is not None:
        gpu["as_found_after"] = devices.as_found(options.device)
    record["complete"] = options.complete and status == 0 and not record["left_out"]
    results_file.save(record, path)
    console.print(tables.summary(record["cases"], options.timing))
    console.print(f"results: {path}")
    return status


def _job(case: Case, options: Options) -> Job:
    base = base_record(case, device=options.device.type, threads=torch.get_num_threads())
    return Job(
        base,
        (case.section, case.resets),  # with resets others are measured: another table
        _expected_seconds(case, options),
        lambda advance: guarded(dict(base), lambda record: _fill(record, case, options, advance)),
    )


def _expected_seconds(case: Case, options: Options) -> float:
    """A guess: timing, compiling kernels, and the float64 reference."""
    if options.toy:
        return 0.2
    steps = case.shape.steps * case.num_layers
    return (options.case_budget if options.timing else 0.0) + 4.0 + 5e-4 * steps


def _fill(record: Record, case: Case, options: Options, advance: Advance) -> None:
    names, device = options.providers(case), options.device
    if options.timing:
        effort = Effort(device, options.case_budget, options.min_rounds)
        providers = fill_times(record, case, names, effort, advance)
    else:
        batch = Batches(case, device=device)[WARM_UP]
        providers, without = verified(record, case, names, batch, device)
        record["providers"] = without | {name: {} for name in providers}
        record["ratios"] = {}
        del batch
    if device.type == "cuda":
        _add_gpu(record, case, providers, options)


def _add_gpu(record: Record, case: Case, providers: dict[str, Provider], options: Options) -> None:
    """Peak memory, launches, cuDNN's algorithms and the floor."""
    device, batches = options.device, Batches(case, device=options.device)
    batch = batches[WARM_UP]
    for name, provider in providers.items():

        def step(provider: Provider = provider) -> None:
            provider.run(batch)

        provider.clear(batch)
        record["providers"][name]["peak_bytes"] = footprint.peak_bytes(step, device)
        provider.clear(batch)
        few = name == "fastrnn" or unrolled_steps(case) <= _PROFILED_STEPS
        if options.timing and options.launches and few:
            record["providers"][name]["launches"] = footprint.launches(step, device)
        provider.clear(batch)
    if not options.timing:
        peaks = {name: record["providers"][name]["peak_bytes"] for name in providers}
        ours = max(peaks.pop("fastrnn"), 1)
        record["ratios"] = {name: {"median": peak / ours} for name, peak in peaks.items()}
    record["cudnn"] = cudnn_algorithms(case, list(providers), cudnn.Gpu.of(device))
    model = floors.modelled(torch.cuda.get_device_name(device))
    if options.timing and model is not None:
        floors.add(record, floors.floor(case, batches, model))


def cudnn_algorithms(case: Case, names: list[str], gpu: cudnn.Gpu) -> Record:
    """By provider that is nn.LSTM whole: what torch's rule selects, forward and backward."""
    passes = {"forward": True} | ({"backward": False} if case.training else {})
    return {
        name: {
            key: cudnn.algorithm(case.layers(packed=name == "packed"), gpu, forward=forward)
            for key, forward in passes.items()
        }
        for name in names
        if name in ("packed", "padded")
    }


def compile_kernels(cases: list[Case], device: torch.device) -> int:
    """Run fastrnn once on each case, so that its kernels are in Triton's cache on disk.

    A case that cannot run is passed over: it fails where it is measured, with its reason.
    """
    for case in cases:
        try:
            batch = Batches(case, device=device)[WARM_UP]
            Provider("fastrnn", case, device=device).results(batch)
        except Exception as error:
            print(f"{case.id}: {first_line(error)}", flush=True)
    return 0
