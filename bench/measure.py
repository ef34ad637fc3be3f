"""One case: verify every provider, then time them in turns; what the results say of it.

A provider that cannot run is listed with the reason; one whose results are wrong has no figures;
and where fastrnn's are wrong the whole case has none.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import devices, verify
from bench.providers import LABELS, Provider, cannot_run, is_checked, reference_of
from bench.timing import interleave, speedup, spread
from bench.workloads import Batch, Batches, Case
from fastrnn.choosing.backends import can_run_triton

Record = dict[str, Any]
Advance = Callable[[float], None]

# The processor's clock leaves out what other processes take: for one thread on a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = -1  # the index of a batch that is not measured


class Failed(Exception):
    """A case whose figures would mean nothing."""


@dataclass(frozen=True)
class Effort:
    """How long and on what.

    Attributes:
        device: that everything runs on.
        budget: seconds of timing for each case; a case takes longer where min_rounds do.
        min_rounds: of each case.
        max_rounds: of each case.
        repeat: rotate among this many batches; 0 for new ones in every round.
        clock: of :data:`CLOCKS`.
    """

    device: torch.device
    budget: float
    min_rounds: int
    max_rounds: int = 1000
    repeat: int = 0
    clock: str = "wall"


def base_record(case: Case, **more: Any) -> Record:
    """What a case's record says before anything is measured."""
    return {
        "id": case.id,
        "section": case.section,
        **({"workload": case.workload} if case.workload else {}),
        **case.shape._asdict(),
        "lengths": case.lengths,
        "variant": case.variant,
        "dtype": case.dtype_name,
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        "mode": case.mode,
        **more,
        "status": "ok",
    }


def guarded(record: Record, fill: Callable[[Record], None]) -> Record:
    """Fill in the figures; where they would mean nothing, the reason in their place."""
    try:
        fill(record)
    except Failed as failure:
        record.update(status="failed", error=str(failure))
    except Exception as error:  # one case's is not the next one's
        record.update(status="failed", error=first_line(error))
    if record["status"] == "failed":
        for figures in ("providers", "ratios"):
            record.pop(figures, None)
    return record


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fill_times(
    record: Record, case: Case, names: Sequence[str], effort: Effort, advance: Advance
) -> dict[str, Provider]:
    """Verify and time ``names`` on a case.

    Returns:
        The providers that were timed, warm.

    Raises:
        Failed: fastrnn cannot run, or its results differ from the reference's.
    """
    batches = Batches(case, effort.repeat, effort.device)
    providers, without = verified(record, case, names, batches[WARM_UP], effort.device)
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
        by_rounds = len(valid_steps) / effort.min_rounds
        advance(min(by_rounds, spent / effort.budget) if effort.budget else by_rounds)

    samples = interleave(
        {name: _timed(provider) for name, provider in providers.items()},
        batch_of,
        prepare,
        budget=effort.budget,
        min_rounds=effort.min_rounds,
        max_rounds=effort.max_rounds,
        on_round=on_round,
        clock=CLOCKS[effort.clock],
        wait=devices.waiting(effort.device),
    )
    record["rounds"] = len(valid_steps)
    record["valid_steps"] = sum(valid_steps) / len(valid_steps)
    record["providers"] = without | {
        name: {
            "seconds": spread(sample.seconds)._asdict(),
            "valid_steps_per_second": spread(
                [count / second for count, second in zip(valid_steps, sample.seconds, strict=True)]
            )._asdict(),
        }
        for name, sample in samples.items()
    }
    ours = samples.pop("fastrnn").seconds
    record["ratios"] = {
        name: speedup(sample.seconds, ours)._asdict() for name, sample in samples.items()
    }
    return providers


def _timed(provider: Provider) -> Callable[[Batch], None]:
    def run(batch: Batch) -> None:
        provider.run(batch)  # its outputs are freed within the timing

    return run


def verified(
    record: Record, case: Case, names: Sequence[str], batch: Batch, device: torch.device
) -> tuple[dict[str, Provider], Record]:
    """The providers that are right, warm; and why each other one has no figures.

    Raises:
        Failed: fastrnn cannot run, or its results differ from the reference's.
    """
    results: dict[str, dict[str, Tensor]] = {}
    providers: dict[str, Provider] = {}
    without: Record = {}
    for name in names:
        reason = cannot_run(name, case, device)
        if reason is None:
            try:
                providers[name] = Provider(name, case, device=device)
                with warnings_of_fastrnn() as messages:
                    results[name] = providers[name].results(batch)
                providers[name].clear(batch)
                if name == "fastrnn":
                    note_fall_back(record, case, device, messages)
                continue
            except Exception as error:  # a compiler may raise anything
                reason = first_line(error)
                providers.pop(name, None)
        if name == "fastrnn":
            raise Failed(f"{LABELS[name]}: {reason}")
        without[name] = {"unsupported": reason}
    truth, allowed = _truth(case, batch, results, device)
    verdicts = {
        name: verify.judge(results[name], truth, allowed)
        for name in providers
        if is_checked(name, case)
    }
    reference = reference_of(case)
    record["verification"] = {
        "reference": f"{LABELS[reference]}, float64",
        "errors": {
            name: {
                "tensor": verdict.tensor,
                "error": verdict.error if verdict.error != float("inf") else None,
                "budget": verdict.budget,
            }
            for name, verdict in verdicts.items()
        },
    }
    for name, verdict in verdicts.items():
        if verdict.within:
            continue
        reason = (
            f"{verdict.tensor} of {LABELS[name]} differs from {LABELS[reference]} in float64 "
            f"by {verdict.error:.1e} of its largest magnitude (budget {verdict.budget:.1e})"
        )
        if name == "fastrnn":
            raise Failed(reason)
        without[name] = {"unsupported": reason}
        del providers[name]
    return providers, without


def note_fall_back(
    record: Record, case: Case, device: torch.device, messages: Sequence[str]
) -> None:
    """Say so where fastrnn ran on a GPU without its kernels: its times are the step loop's."""
    if device.type != "cuda":
        return
    directions = 2 if case.bidirectional else 1
    reason = can_run_triton(device, case.dtype, case.shape.hidden_size, directions)
    if reason is not None or messages:
        record["fell_back"] = reason or messages[0]


@contextlib.contextmanager
def warnings_of_fastrnn() -> Iterator[list[str]]:
    """What fastrnn logs as warnings meanwhile: that a kernel could not be launched."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: messages.append(entry.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fastrnn")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _truth(
    case: Case, batch: Batch, results: dict[str, dict[str, Tensor]], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """nn.LSTM's results in float64, and what each of them may be off by."""
    name, dtype = reference_of(case), torch.float64
    rounding = verify.ROUNDING[case.dtype]
    if case.dtype == torch.float32 and device.type == "cuda" and devices.recurrent_tf32():
        rounding = verify.TF32_ROUNDING
    try:
        low = results.get(name) or Provider(name, case, device=device).results(batch)
        if case.dtype == dtype:
            return low, verify.budgets(low, low, rounding)
        truth = Provider(name, case, dtype, device).results(batch.to(dtype))
        return truth, verify.budgets(low, truth, rounding)
    except (RuntimeError, ValueError) as error:
        reason = f"{LABELS[name]} gives nothing to compare with: {first_line(error)}"
        raise Failed(reason) from error
