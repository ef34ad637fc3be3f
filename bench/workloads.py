"""What is measured: shapes, distributions of lengths, and the batches drawn from them.

No batch is measured twice: the lengths of every round are drawn anew, as an epoch's are, and are
the same for all providers. So nothing profits from having seen them before (plans, primitives).

Notation: B batch, T steps, I input, H hidden, L layers, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.choosing import cudnn


class Shape(NamedTuple):
    """B sequences of at most T steps, I features in and H out."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return f"B{self.batch}-T{self.steps}-I{self.input_size}-H{self.hidden_size}"


SHAPES = (
    Shape(8, 50, 12, 64),
    Shape(128, 29, 12, 64),
    Shape(32, 100, 64, 128),
    Shape(64, 200, 128, 256),
    Shape(16, 400, 256, 512),
)
QUICK_SHAPES = SHAPES[:3]
# 8 environments of 128 steps, as the widely used PPO scripts for Atari have them; and 64 of them.
RL_SHAPES = (Shape(8, 128, 512, 128), Shape(64, 128, 64, 256))
RESET_PROBABILITY = 0.05

# Many sequences far shorter than the longest, as in speech and text: 97 % of the draws are below T.
LOGNORMAL_MEDIAN = 1 / 3  # of T
LOGNORMAL_SIGMA = 0.6

# Part of the padded batch that is padding, in the mean, where lengths are drawn for it.
PADDING = {f"padding-{percent}": percent / 100 for percent in (10, 25, 50, 75, 90)}
DISTRIBUTIONS = {
    "uniform": "uniform in [T/10, T]",
    "lognormal": f"lognormal, median T/3, sigma {LOGNORMAL_SIGMA}, at most T",
    "full": "every sequence has T steps",
} | {
    name: f"T u^(p / (1 - p)), u uniform in [0, 1], p = {part}: {part:.0%} are padding in the mean"
    for name, part in PADDING.items()
}


def draw_lengths(shape: Shape, distribution: str, generator: torch.Generator) -> Tensor:
    """Lengths ``[B]`` int64 of one batch; the longest is T, as padding makes it."""
    steps = shape.steps
    if distribution == "full":
        return torch.full((shape.batch,), steps)
    if distribution == "uniform":
        low = max(1, steps // 10)
        lengths = torch.randint(low, steps + 1, (shape.batch,), generator=generator)
    elif distribution == "lognormal":
        normal = torch.randn(shape.batch, generator=generator)
        median = math.log(LOGNORMAL_MEDIAN * steps)
        lengths = (median + LOGNORMAL_SIGMA * normal).exp().round().long().clamp(1, steps)
    elif distribution in PADDING:
        part = PADDING[distribution]
        uniform = torch.rand(shape.batch, generator=generator)
        lengths = (steps * uniform ** (part / (1 - part))).round().long().clamp(1, steps)
    else:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}")
    lengths[lengths.argmax()] = steps
    return lengths


@dataclass(frozen=True)
class Case:
    """One row of a table: a workload in one mode.

    Attributes:
        section: the table.
        workload: its name, where it is from life.
        lengths: a name of :data:`DISTRIBUTIONS`.
        training: forward and backward, or forward without gradients.
        resets: the state is zeroed before a step with :data:`RESET_PROBABILITY`.
    """

    section: str
    shape: Shape
    lengths: str = "uniform"
    training: bool = True
    dtype: torch.dtype = torch.float32
    num_layers: int = 1
    bidirectional: bool = False
    resets: bool = False
    workload: str = ""

    def layers(self, *, packed: bool) -> cudnn.Layers:
        """What torch's choice of an algorithm asks for."""
        one = self.dtype, self.num_layers, self.bidirectional
        return cudnn.Layers(*self.shape, *one, packed=packed)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def variant(self) -> str:
        """How it differs from one float32 layer in one direction; may be empty."""
        parts = [] if self.dtype == torch.float32 else [self.dtype_name]
        parts += [f"{self.num_layers}layers"] if self.num_layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        return "-".join(parts)

    @property
    def mode(self) -> str:
        return "training" if self.training else "inference"

    @property
    def name(self) -> str:
        """Unique within the section."""
        lengths = "resets" if self.resets else self.lengths
        parts = [self.workload, str(self.shape), lengths, self.variant, self.mode]
        return "-".join(part for part in parts if part)

    @property
    def id(self) -> str:
        return f"{self.section}/{self.name}"


@dataclass
class Batch:
    """One batch and the gradients that enter its backward pass.

    Attributes:
        x: ``[B, T, I]``, zero behind each sequence's end; requires a gradient, as inside a model.
        lengths: ``[B]`` int64; on the CPU, where a collate function leaves them.
        resets: bool ``[B, T]``, or None.
        d_output: ``[B, T, D * H]``, zero where the output is padding: a loss counts valid steps.
        d_h_n: ``[L * D, B, H]``.
        dense: every sequence has T steps, and lengths are not given.
    """

    x: Tensor
    lengths: Tensor
    resets: Tensor | None
    d_output: Tensor
    d_h_n: Tensor
    dense: bool

    @property
    def valid_steps(self) -> int:
        return int(self.lengths.sum())

    def to(self, dtype: torch.dtype) -> Batch:
        x = self.x.detach().to(dtype).requires_grad_(self.x.requires_grad)
        return replace(self, x=x, d_output=self.d_output.to(dtype), d_h_n=self.d_h_n.to(dtype))


class Batches:
    """The batches of a case; the same index gives the same batch in every run and process."""

    def __init__(
        self, case: Case, repeat: int = 0, device: torch.device | str | None = None
    ) -> None:
        """Fix what all batches share.

        Args:
            case: what to draw for.
            repeat: rotate among this many batches; 0 for a new one each time.
            device: of the batches, but for their lengths. Default: the CPU.
        """
        self.case, self.repeat, self.device = case, repeat, torch.device(device or "cpu")
        shape, generator = case.shape, torch.Generator().manual_seed(0)
        directions = 2 if case.bidirectional else 1
        sizes = (
            (shape.batch, shape.steps, shape.input_size),
            (shape.batch, shape.steps, directions * shape.hidden_size),
            (case.num_layers * directions, shape.batch, shape.hidden_size),
        )
        self._values = [torch.randn(size, generator=generator).to(self.device) for size in sizes]

    def __getitem__(self, index: int) -> Batch:
        case = self.case
        seed = 1 + (index % self.repeat if self.repeat else index)
        generator = torch.Generator().manual_seed(seed)
        lengths = draw_lengths(case.shape, case.lengths, generator)
        valid = (torch.arange(case.shape.steps) < lengths.unsqueeze(1)).unsqueeze(2)
        valid = valid.to(self.device)
        resets = None
        if case.resets:
            chance = torch.rand(case.shape.batch, case.shape.steps, generator=generator)
            resets = (chance < RESET_PROBABILITY).to(self.device)
        x, d_output, d_h_n = self._values
        x, d_output = ((tensor * valid).to(case.dtype) for tensor in (x, d_output))
        x.requires_grad_(case.training)
        dense = case.lengths == "full"
        return Batch(x, lengths, resets, d_output, d_h_n.to(case.dtype), dense)


def cpu_cases(
    shapes: Iterable[Shape], rl_shapes: Iterable[Shape], variant_shape: Shape
) -> list[Case]:
    """What ``python -m bench cpu`` times, in order."""
    shapes = list(shapes)
    ragged = [(shape, lengths) for shape in shapes for lengths in ("uniform", "lognormal")]
    variants = (
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"num_layers": 2},
        {"bidirectional": True},
    )
    modes = (True, False)
    return [
        *(Case("ragged-training", shape, lengths) for shape, lengths in ragged),
        *(Case("ragged-inference", shape, lengths, training=False) for shape, lengths in ragged),
        *(Case("dense", shape, "full", mode) for shape in shapes for mode in modes),
        *(
            Case("variants", variant_shape, "uniform", mode, **variant)
            for variant in variants
            for mode in modes
        ),
        *(
            Case("resets", shape, "full", mode, resets=True)
            for shape in rl_shapes
            for mode in modes
        ),
    ]


def memory_cases(shapes: Iterable[Shape]) -> list[Case]:
    """What the section on peak memory runs: the ragged training batches."""
    ragged = cpu_cases(shapes, RL_SHAPES, RL_SHAPES[0])
    return [replace(case, section="memory") for case in ragged if case.section == "ragged-training"]
