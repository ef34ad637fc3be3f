"""``python -m bench clip``: ``fastrnn.clip_grad_norm_`` against torch's and others'.

A case is a number of gradients, a number of elements in all of them, a dtype, clipped or not; in
the section ``clip-and-step`` a step of fused AdamW follows. Each is verified before it is timed:
the norm is no farther from the float64 one than torch's, and the gradients are scaled by just the
coefficient that follows from it. The sides take turns on the same gradients, in another order every
round. A clipped case lowers its threshold at every call, so that each call has something to do.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from torch import Tensor

from bench import devices, floors, footprint, results_file, runner, tables
from bench.clip_cases import (
    CPU_ELEMENTS,
    CPU_TENSORS,
    GPU_ELEMENTS,
    GPU_TENSORS,
    STEP_TENSORS,
    TOY_ELEMENTS,
    ClipCase,
    make_parameters,
    true_norm,
)
from bench.clip_providers import LABELS, PACKAGES, SHORT, installed
from bench.clip_verify import verified_clips, verified_steps
from bench.measure import Advance, guarded
from bench.results_file import Record
from bench.runner import NO_LIMITS, Job, Limits
from bench.timing import interleave, speedup, spread
from fastrnn.clip.gradient_norms import can_run_kernel

ROUNDS = (15, 300)  # at least, at most


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        device: of the gradients.
        quick: small sizes and few rounds.
        toy: a handful of tiny cases.
        cases: regular expression that a case's id must match.
        case_budget: seconds of timing for each case.
    """

    device: torch.device
    quick: bool = False
    toy: bool = False
    cases: str = ""
    case_budget: float = 1.0

    @property
    def complete(self) -> bool:
        """Whether the result is the standard one."""
        return not (self.quick or self.toy or self.cases)

    @property
    def threads(self) -> list[int]:
        """Thread settings, one after the other."""
        most = torch.get_num_threads()
        return [most] if self.device.type == "cuda" or self.toy else sorted({1, most})

    def select(self) -> list[ClipCase]:
        """The cases asked for."""
        on_gpu = self.device.type == "cuda"
        tensors, elements = (GPU_TENSORS, GPU_ELEMENTS) if on_gpu else (CPU_TENSORS, CPU_ELEMENTS)
        dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
        if self.quick:
            elements = tuple(count for count in elements if count <= 1_000_000)
        if self.toy:
            tensors, elements = (1, 10), (TOY_ELEMENTS,)
        cases = [
            ClipCase(count, total, clipped, dtype)
            for dtype in dtypes
            for count, total in itertools.product(tensors, elements)
            if count <= total
            for clipped in (False, True)
        ]
        cases += [
            ClipCase(count, total, clipped, step=True)
            for count, total in itertools.product(STEP_TENSORS, elements[-2:])
            for clipped in (False, True)
            if count <= total
        ]
        return [case for case in cases if re.search(self.cases, case.id)]


def run(
    options: Options,
    path: Path,
    console: Console,
    limits: Limits = NO_LIMITS,
    resume: bool = False,
) -> int:
    """Measure, print the table, write the results.

    Returns:
        The exit status, see :func:`bench.runner.run`; 2 where there is nothing to measure.

    Raises:
        ValueError: ``resume`` and the file there cannot be gone on with.
    """
    cases = options.select()
    if not cases:
        console.print(f"no case matches {options.cases!r}")
        return 2
    flags = {
        "device": options.device.type,
        "quick": options.quick,
        "toy": options.toy,
        "cases": options.cases,
        "case_budget": options.case_budget,
    }
    record = results_file.new_record("clip", flags, options.device) | {
        "not_installed": [LABELS[name] for name in PACKAGES if not installed(name)]
    }
    if resume:
        record = results_file.resumed(record, path)
    console.print(tables.heading(record))
    before = torch.get_num_threads()
    try:
        jobs = [_job(case, threads, options) for threads in options.threads for case in cases]
        status = runner.run(jobs, record, path, console, table=table, limits=limits)
    finally:
        torch.set_num_threads(before)
    record["complete"] = options.complete and status == 0 and not record["left_out"]
    results_file.save(record, path)
    for case in record["cases"]:
        if case["status"] == "failed":
            console.print(f"[red]failed[/] {case['id']}: {case['error']}")
        if "fell_back" in case:
            console.print(f"[yellow]without the kernel[/] {case['id']}: {case['fell_back']}")
    console.print(f"results: {path}")
    return status


def _job(case: ClipCase, threads: int, options: Options) -> Job:
    base = {
        "id": case.id,
        "section": case.section,
        "tensors": case.tensors,
        "elements": case.elements,
        "dtype": case.dtype_name,
        "clipped": case.clipped,
        "device": options.device.type,
        "threads": threads,
        "status": "ok",
    }

    def fill(record: Record, advance: Advance) -> None:
        torch.set_num_threads(threads)
        _fill(record, case, options, advance)

    expected = (0.1 if options.quick or options.toy else options.case_budget) + 1e-8 * case.elements
    return Job(
        base,
        (case.section, threads),
        expected,
        lambda advance: guarded(dict(base), lambda record: fill(record, advance)),
    )


def _fill(record: Record, case: ClipCase, options: Options, advance: Advance) -> None:
    device = options.device
    parameters = make_parameters(case, device)
    max_norm = true_norm(parameters) * (0.5 if case.clipped else 4.0)
    if case.step:
        sides = verified_steps(record, parameters, max_norm)
    else:
        sides = verified_clips(record, parameters, max_norm)
    threshold = max_norm

    def before_each(_: object) -> None:
        nonlocal threshold
        if case.clipped and case.step:  # its threshold is fixed: double what was halved
            torch._foreach_mul_([parameter.grad for parameter in parameters], 2.0)
        elif case.clipped:
            threshold *= 0.999

    calls = {name: lambda given, side=side: side(given, threshold) for name, side in sides.items()}
    budget = 0.0 if options.quick or options.toy else options.case_budget
    samples: dict[str, Any] = {}
    for seconds, least, most in ((0.0, 2, 2), (budget, *ROUNDS)):  # warm up, time
        samples = interleave(
            calls,
            lambda _: parameters,
            before_each,
            budget=seconds,
            min_rounds=2 if options.toy else least,
            max_rounds=most,
            wait=devices.waiting(device),
        )
    advance(1.0)
    ours = samples["fastrnn"].seconds
    record["rounds"] = len(ours)
    record["providers"] = {
        name: {
            "seconds": spread(sample.seconds)._asdict(),
            "host_seconds": spread(sample.host)._asdict(),
        }
        for name, sample in samples.items()
    }
    record["ratios"] = {
        name: speedup(sample.seconds, ours)._asdict()
        for name, sample in samples.items()
        if name != "fastrnn"
    }
    if device.type == "cuda":
        _add_gpu(record, case, calls, parameters, before_each, device)


def _add_gpu(
    record: Record,
    case: ClipCase,
    calls: dict[str, Any],
    parameters: list[Tensor],
    before_each: Any,
    device: torch.device,
) -> None:
    """Kernel launches, whether fastrnn's ran, and the floor of what must be read and written."""
    for name, call in calls.items():
        before_each(None)
        count = footprint.launches(lambda call=call: call(parameters), device)  # type: ignore[misc]
        record["providers"][name]["launches"] = count
    reason = can_run_kernel([parameter.grad for parameter in parameters], 2.0)
    if reason is not None:
        record["fell_back"] = reason
    model = floors.modelled(torch.cuda.get_device_name(device))
    if model is None or case.step:
        return
    floors.add(record, clip_floor(case, model))


def clip_floor(case: ClipCase, gpu: str) -> Record:
    """The least that the bytes take which have to be moved."""
    from bench.roofline import clip_floor as floor

    found = floor(case.elements * case.dtype.itemsize, gpu)
    microseconds = found.clipped_us if case.clipped else found.unclipped_us
    return {"gpu": gpu, "microseconds": microseconds, "limits": ["memory"]}


def table(cases: list[Record]) -> RenderableType:
    """Medians with their spread, and the ratios."""
    measured = [case for case in cases if case["status"] == "ok"]
    names = [name for name in LABELS if any(name in case["providers"] for case in measured)]
    rivals = [name for name in names if name != "fastrnn"]
    title = "clip, then a step of fused AdamW" if cases[0]["section"] == "clip-and-step" else "clip"
    rendered = tables.plain_table(
        f"{title} · {tables.setting(cases[0])}",
        "median, and half the distance from the 20th to the 80th percentile",
    )
    for heading in ("tensors", "elements", "dtype", "clipped"):
        rendered.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        rendered.add_column(SHORT[name], justify="right", no_wrap=True)
    for name in rivals:
        rendered.add_column(f"÷ {SHORT[name]}", justify="right", no_wrap=True)
    for case in cases:
        row: list[RenderableType] = [
            str(case["tensors"]),
            f"{case['elements']:,}",
            case["dtype"],
            "yes" if case["clipped"] else "no",
        ]
        if case["status"] == "failed":
            rendered.add_row(*row, tables.failed())
            continue
        row += [tables.spread_cell(case["providers"].get(name)) for name in names]
        row += [tables.ratio_cell(case["ratios"].get(name)) for name in rivals]
        rendered.add_row(*row)
    return rendered
