"""What ``python -m bench lstm`` times: workloads from life, and sweeps over one thing at a time.

The cases come in the order of what they are worth: a run that is cut short has the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from bench.workloads import PADDING, Case, Shape


@dataclass(frozen=True)
class Workload:
    """A batch as some field has it.

    Attributes:
        about: one line for the results.
        lengths: a name of :data:`bench.workloads.DISTRIBUTIONS`.
    """

    about: str
    shape: Shape
    lengths: str = "full"
    num_layers: int = 1
    bidirectional: bool = False
    resets: bool = False

    def case(self, name: str, dtype: torch.dtype, training: bool) -> Case:
        """As a row of the table."""
        layers = {"num_layers": self.num_layers, "bidirectional": self.bidirectional}
        options = {"dtype": dtype, "resets": self.resets, "workload": name}
        return Case("life", self.shape, self.lengths, training, **layers, **options)


WORKLOADS = {
    "speech-512": Workload(
        "speech recognition: 80 filter banks, utterances up to 16 s, 3 bidirectional layers",
        Shape(32, 1600, 80, 512),
        "uniform",
        num_layers=3,
        bidirectional=True,
    ),
    "speech-1024": Workload(
        "the same with 1024 units",
        Shape(32, 1600, 80, 1024),
        "uniform",
        num_layers=3,
        bidirectional=True,
    ),
    "forecasting": Workload("a week of hours, 32 covariates", Shape(256, 168, 32, 128)),
    "hydrology": Workload("a year of days of a catchment, 32 forcings", Shape(256, 365, 32, 256)),
    "language-model": Workload(
        "truncated backpropagation, chunks of 256 tokens, 2 layers",
        Shape(64, 256, 1024, 1024),
        num_layers=2,
    ),
    "ocr": Workload(
        "lines of text as columns of 512 features, 2 bidirectional layers",
        Shape(32, 200, 512, 256),
        "uniform",
        num_layers=2,
        bidirectional=True,
    ),
    "rl-rollout": Workload(
        "64 environments of 128 steps, episodes ending inside",
        Shape(64, 128, 256, 256),
        resets=True,
    ),
}

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# cuDNN has no persistent algorithm for these, or for float16 only; for those below it always has.
OPEN_SIZES = (256, 512, 768, 1024)
SMALL_SIZES = (64, 128)
LARGE_SIZES = (1536, 2048)
BATCHES = (1, 8, 32, 128, 256)
STEPS = (32, 1024)
# A batch on cuDNN's fastest ground in float16: whole multiples of 128 features, 8 sequences.
_SWEEP = Shape(64, 256, 512, 512)


def _sized(hidden_size: int) -> Shape:
    return _SWEEP._replace(input_size=hidden_size, hidden_size=hidden_size)


def raggedness_cases(shape: Shape, dtype: torch.dtype) -> list[Case]:
    """From no padding to nine tenths of it."""
    return [Case("raggedness", shape, lengths, dtype=dtype) for lengths in ("full", *PADDING)]


def size_cases(dtypes: Iterable[torch.dtype]) -> list[Case]:
    """Dense batches over H, each in the section of what cuDNN has for it."""
    cases = []
    for dtype in dtypes:
        for hidden_size in (*SMALL_SIZES, *OPEN_SIZES, *LARGE_SIZES):
            hard = hidden_size in SMALL_SIZES or dtype == torch.float16
            section = "hard-ground" if hard else "open-field"
            if hidden_size in LARGE_SIZES:
                section = "large"
            cases.append(Case(section, _sized(hidden_size), "full", dtype=dtype))
    return cases


def lstm_cases(dtypes: Iterable[torch.dtype] = DTYPES) -> list[Case]:
    """The standard cases, the most telling first.

    Args:
        dtypes: to measure. Default: bfloat16, float32, float16.
    """
    dtypes = list(dtypes)
    main = dtypes[0]

    def life(dtype: torch.dtype, training: bool) -> list[Case]:
        return [load.case(name, dtype, training) for name, load in WORKLOADS.items()]

    shapes = [
        *(_SWEEP._replace(batch=batch) for batch in BATCHES),
        *(_SWEEP._replace(steps=steps) for steps in STEPS),
    ]
    return [
        *life(main, True),
        *raggedness_cases(_SWEEP, main),
        *size_cases([main]),
        *(case for dtype in dtypes[1:] for case in life(dtype, True)),
        *size_cases(dtypes[1:]),
        *(Case("batch-and-time", shape, "full", dtype=main) for shape in shapes),
        *(case for dtype in dtypes for case in life(dtype, False)),
    ]


def toy_cases(cases: Iterable[Case]) -> list[Case]:
    """The same cases so small that a CPU runs each in milliseconds; every one stays distinct."""
    found = {}
    for index, case in enumerate(cases):
        shape = Shape(min(case.shape.batch, 3), 6 + index % 3, 4, 4 + index)
        small = replace(case, shape=shape)
        found[small.id] = small
    return list(found.values())
