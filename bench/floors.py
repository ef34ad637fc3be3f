"""The least that a case can take on a GPU, for the results to be held against.

bench/roofline.py has the model and the published figures; this finds the GPU in it and puts the
layers of a case together.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch

from bench import devices
from bench.workloads import Batch, Batches, Case

_BATCHES = 3  # whose mean floor is taken, where every round has other lengths
# What torch calls a GPU, and what roofline.py does.
_NAMES = {
    r"H100 80GB HBM3|H100 SXM": "H100 SXM",
    r"A100-SXM4-80GB": "A100 SXM 80GB",
    r"\bH200$": "H200",
    r"\bB200$": "B200",
    r"MI300X": "MI300X",
}


def modelled(name: str) -> str | None:
    """The model's name of a GPU that torch calls ``name``; None where it has no figures of it."""
    return next((ours for pattern, ours in _NAMES.items() if re.search(pattern, name)), None)


def floor(case: Case, batches: Batches, gpu: str) -> dict[str, Any] | None:
    """The floor of all layers, a mean over a few batches; None where no tile fits the model.

    Args:
        case: the layers.
        batches: of the case; the first are taken.
        gpu: a name that :func:`modelled` gives.
    """
    from bench.roofline import LayerShape, roofline

    precision = "tf32" if devices.recurrent_tf32() else "tf32x3"
    directions = 2 if case.bidirectional else 1
    totals, limits = [], []
    for index in range(1 if case.lengths == "full" and not case.resets else _BATCHES):
        lengths = tuple(sequence_lengths(batches[index]))
        total = 0.0
        for layer in range(case.num_layers):
            first = layer == 0
            shape = LayerShape(
                lengths,
                case.shape.input_size if first else directions * case.shape.hidden_size,
                case.shape.hidden_size,
                directions,
                case.dtype,
                precision,
                case.training,
            )
            try:
                found = roofline(shape, gpu)
            except ValueError:
                return None
            total += found.total_us
            limits += [f"{each.which}: {each.limit}" for each in found.passes]
        totals.append(total)
    return {
        "gpu": gpu,
        "microseconds": sum(totals) / len(totals),
        "limits": sorted(set(limits)),
    }


def sequence_lengths(batch: Batch) -> list[int]:
    """Of the sequences that can run side by side: a reset begins one."""
    lengths = batch.lengths.tolist()
    if batch.resets is None:
        return lengths
    found = []
    for length, resets in zip(lengths, batch.resets.cpu(), strict=True):
        begins = [0, *(t for t in torch.nonzero(resets[:length]).flatten().tolist() if t), length]
        found += [end - begin for begin, end in itertools.pairwise(begins)]
    return found


def add(record: dict[str, Any], found: dict[str, Any] | None) -> None:
    """Enter a floor and each provider's part of it: 1 is as fast as the figures allow."""
    record["floor"] = found
    for provider in record["providers"].values():
        if found is not None and "seconds" in provider:
            microseconds = provider["seconds"]["median"] * 1e6
            provider["of_floor"] = found["microseconds"] / microseconds
