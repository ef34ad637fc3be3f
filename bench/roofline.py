"""What a GPU's published figures allow: traffic, operations, barriers, and a floor in microseconds.

    roofline(LayerShape.dense(B=16, T=1024, I=768, H=768), "H100 SXM")

It predicts nothing but a lower bound, and which resource sets it, so that a measurement can be
printed as a fraction of what is possible. The recurrence is modelled as the kernels run it: tiles
from tiling.py, one program per multiprocessor, steps one after another.

One step of one program takes at least

    barrier + max(matrix, shared memory, exchange)

because the product cannot start before the barrier, and its operands come in meanwhile:

- barrier: arrival, poll and first load, each a trip to the L2 cache;
- matrix: the tile's multiplications, padding included, at the multiprocessor's part of the peak;
- shared memory: the program's slice of W_hh, where resident, read once;
- exchange: h (backward: d_gates) of the batch tile from L2, and W_hh where streamed.

The launch takes at least as many of these as the busiest program has steps, and no less than its
whole traffic at the bandwidth of memory (of L2, where everything fits it) and of L2.

Limits: gate arithmetic, launch latency and clocks below the boost clock are left out, so that what
is measured is slower. Nothing in this module was measured by this project.

Notation as in kernels/README.md; I input features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastrnn_kernels.tiling import (
    CHIPS,
    Chip,
    Pass,
    Tile,
    backward_tile,
    ceil_div,
    columns,
    forward_tile,
    parts_of,
    reduction,
    shared_memory,
)

# Trips to L2 that a barrier cannot do without: the arrival, the poll that sees the last one, and
# the first load of what was published.
BARRIER_TRIPS = 3
# Bytes per multiprocessor and cycle: from L2, and from shared memory (32 banks of 4 bytes).
EXCHANGE_BYTES = 64
SHARED_BYTES = 128


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        name: as its maker calls it.
        chip: what tiling.py knows of it.
        clock: boost clock in Hz.
        matrix: dense peak in operations (two per multiply-add) per second, for "16bit", "tf32" and
            "fp32".
        memory_bandwidth: bytes per second.
        l2_bytes: size of the last cache that all multiprocessors share.
        l2_bandwidth: bytes per second of that cache.
        l2_latency: cycles of a load that hits it.
        source: where the figures are from.
    """

    name: str
    chip: Chip
    clock: float
    matrix: dict[str, float]
    memory_bandwidth: float
    l2_bytes: float
    l2_bandwidth: float
    l2_latency: float
    source: str

    def matrix_rate(self, dtype: torch.dtype, input_precision: str) -> float:
        """Operations per second for products of this dtype; tf32x3 makes three of each."""
        if dtype != torch.float32:
            return self.matrix["16bit"]
        if input_precision == "ieee" or self.chip.architecture.startswith("gfx"):
            return self.matrix["fp32"]
        return self.matrix["tf32"] / (3 if input_precision == "tf32x3" else 1)

    def memory_seconds(self, bytes_moved: float) -> float:
        """Time to move them, from L2 where all of them fit it."""
        fits = bytes_moved <= self.l2_bytes
        return bytes_moved / (self.l2_bandwidth if fits else self.memory_bandwidth)


# L2: 200 cycles and 5120 bytes per cycle for A100 and H100 are from table 3 of
# doi:10.1016/j.ultsonch.2023.106546 (7219 and 8986 GB/s at 1.41 and 1.755 GHz); microbenchmarks
# find more cycles, and a floor takes the fewer. For B200 and MI300X there is no published latency,
# for B200 no L2 bandwidth either: taken are 200 cycles and 64 bytes per multiprocessor and cycle.
_HOPPER = {"16bit": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="A100 SXM 80GB",
            chip=CHIPS["sm_80"],
            clock=1.41e9,
            matrix={"16bit": 312e12, "tf32": 156e12, "fp32": 19.5e12},
            memory_bandwidth=2.039e12,
            l2_bytes=40e6,
            l2_bandwidth=5120 * 1.41e9,
            l2_latency=200,
            source="NVIDIA A100 data sheet and architecture white paper",
        ),
        Gpu(
            name="H100 SXM",
            chip=CHIPS["sm_90"],
            clock=1.98e9,
            matrix=_HOPPER,
            memory_bandwidth=3.35e12,
            l2_bytes=50e6,
            l2_bandwidth=5120 * 1.98e9,
            l2_latency=200,
            source="NVIDIA H100 data sheet and architecture white paper",
        ),
        Gpu(
            name="H200",
            chip=CHIPS["sm_90"],
            clock=1.98e9,
            matrix=_HOPPER,
            memory_bandwidth=4.8e12,
            l2_bytes=50e6,
            l2_bandwidth=5120 * 1.98e9,
            l2_latency=200,
            source="NVIDIA H200 data sheet; caches and clock as H100's",
        ),
        Gpu(
            name="B200",
            chip=CHIPS["sm_100"],
            clock=1.98e9,
            matrix={"16bit": 2250e12, "tf32": 1100e12, "fp32": 80e12},
            memory_bandwidth=8e12,
            l2_bytes=126e6,
            l2_bandwidth=148 * EXCHANGE_BYTES * 1.98e9,
            l2_latency=200,
            source="NVIDIA HGX B200 data sheet; L2 size as the driver reports it",
        ),
        Gpu(
            name="MI300X",
            chip=CHIPS["gfx942"],
            clock=2.1e9,
            matrix={"16bit": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12},
            memory_bandwidth=5.3e12,
            l2_bytes=256e6,
            l2_bandwidth=17.2e12,
            l2_latency=200,
            source="AMD Instinct MI300X data sheet; its Infinity Cache, for L2 is one die's",
        ),
    )
}


@dataclass(frozen=True)
class LayerShape:
    """One layer over one batch.

    Attributes:
        lengths: of the sequences, in any order.
        input_size: I.
        hidden_size: H.
        directions: D, 1 or 2.
        dtype: of rows and weights.
        input_precision: how float32 products are made: "tf32", "tf32x3" or "ieee".
        training: a backward pass follows, for which the forward pass saves gates and c.
    """

    lengths: tuple[int, ...]
    input_size: int
    hidden_size: int
    directions: int = 1
    dtype: torch.dtype = torch.bfloat16
    input_precision: str = "tf32"
    training: bool = True

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0 or max(self.lengths) == 0:
            raise ValueError(
                f"lengths must be those of at least one sequence with steps, got {self.lengths}"
            )
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")

    @staticmethod
    def dense(B: int, T: int, I: int, H: int, **options: Any) -> LayerShape:  # noqa: E741
        """B sequences of T steps each."""
        return LayerShape((T,) * B, I, H, **options)

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def steps(self) -> int:
        """T."""
        return max(self.lengths)


@dataclass(frozen=True)
class PassFloor:
    """The recurrence's launch in one direction of differentiation, and what surrounds it.

    Attributes:
        which: "forward" or "backward".
        tile: how it is cut.
        programs: programs of the grid.
        occupancy: multiprocessors that have one, as a fraction.
        shared_bytes: shared memory of a program, as tiling.py reckons it.
        memory_bytes: rows, states and weights, each once.
        l2_bytes: exchange and streamed weights, between programs and L2, and `memory_bytes`.
        operations: of the recurrent product over valid rows, two per multiply-add.
        executed: the same with the tile's padding.
        barriers: in the whole launch, each among `tile.unit_programs` programs.
        critical_steps: steps of the busiest program, one after another.
        launches: kernels, the products' and the scratch memory's fill included.
        step_us: floor of one step of a program, in microseconds.
        limits: floor of the launch by each resource alone, in microseconds.
        recurrence_us: floor of the launch.
        products_us: floor of the matrix products over all rows, before or after the launch.
    """

    which: Pass
    tile: Tile
    programs: int
    occupancy: float
    shared_bytes: int
    memory_bytes: int
    l2_bytes: int
    operations: int
    executed: int
    barriers: int
    critical_steps: int
    launches: int
    step_us: float
    limits: dict[str, float]
    recurrence_us: float
    products_us: float

    @property
    def total_us(self) -> float:
        """Floor of the launch and the products."""
        return self.recurrence_us + self.products_us

    @property
    def limit(self) -> str:
        """The resource that alone takes longest."""
        return max(self.limits, key=self.limits.__getitem__)


@dataclass(frozen=True)
class Roofline:
    """Floors of one layer on one GPU; `backward` is None where nothing is trained."""

    shape: LayerShape
    gpu: Gpu
    forward: PassFloor
    backward: PassFloor | None

    @property
    def passes(self) -> tuple[PassFloor, ...]:
        """Those there are."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def total_us(self) -> float:
        """Floor of all passes in microseconds."""
        return sum(each.total_us for each in self.passes)

    def fraction(self, measured_us: float) -> float:
        """How much of what is possible a measurement reached: 1 is the floor."""
        if not measured_us > 0:
            raise ValueError(f"measured_us must be positive, got {measured_us}")
        return self.total_us / measured_us

    def lines(self) -> list[str]:
        """The floors in words, one line for each pass."""
        return [
            f"{self.gpu.name} {each.which}: at least {each.total_us:.1f} us "
            f"(recurrence {each.recurrence_us:.1f}, {each.recurrence_us / self.shape.steps:.2f} "
            f"a step; limit: {each.limit}); {each.tile.residency}, {each.programs} programs on "
            f"{self.gpu.chip.multiprocessors} multiprocessors, {each.memory_bytes / 1e6:.1f} MB, "
            f"{each.operations / 1e9:.2f} Gop ({each.executed / each.operations:.2f}x executed), "
            f"{each.barriers} barriers, {each.launches} launches"
            for each in self.passes
        ]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file, beside a measurement."""
        found: dict[str, Any] = {"gpu": self.gpu.name, "total_us": self.total_us}
        for each in self.passes:
            values = asdict(each) | {"total_us": each.total_us, "limit": each.limit}
            found[each.which] = values
        return found


def roofline(
    shape: LayerShape,
    gpu: str | Gpu,
    *,
    forward: Tile | None = None,
    backward: Tile | None = None,
) -> Roofline:
    """The floors of a layer on a GPU.

    Args:
        shape: the layer and its batch.
        gpu: a name in :data:`GPUS`, or another's figures.
        forward: tile of the forward pass. Default: the rule's.
        backward: tile of the backward pass. Default: the rule's.

    Raises:
        ValueError: an unknown GPU, a tile that does not cover the shape, or none that fits.
    """
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
        gpu = GPUS[gpu]
    return Roofline(
        shape,
        gpu,
        _pass_floor("forward", shape, gpu, forward),
        _pass_floor("backward", shape, gpu, backward) if shape.training else None,
    )


def _pass_floor(which: Pass, shape: LayerShape, gpu: Gpu, tile: Tile | None) -> PassFloor:
    S, H, D = len(shape.lengths), shape.hidden_size, shape.directions
    item = shape.dtype.itemsize
    if tile is None:
        choose = forward_tile if which == "forward" else backward_tile
        tile = choose(S, H, D, shape.dtype, gpu.chip, shape.input_precision)
    tile.check(S, H)
    n, k = columns(which, tile.BLOCK_H), reduction(tile, which, H)
    resident, barrier = tile.residency != "streamed", tile.residency != "whole"

    tile_steps, critical_steps = _steps(shape.lengths, tile)
    launched_steps = sum(tile_steps) * D
    programs = math.prod(tile.grid(D))

    per_program = 2 * tile.BLOCK_B * n * k
    executed = per_program * tile.unit_programs * launched_steps
    operations = 2 * shape.rows * D * 4 * H * H
    memory_bytes = _row_bytes(which, shape)
    exchange_bytes = tile.BLOCK_B * k * item if barrier else 0
    streamed_bytes = 0 if resident else n * k * item
    # A step's exchange is written once, whole blocks of all units (forward h, backward 4 d_a).
    read_bytes = (exchange_bytes + streamed_bytes) * tile.unit_programs
    l2_bytes = memory_bytes + (read_bytes + exchange_bytes) * launched_steps

    rate = gpu.matrix_rate(shape.dtype, shape.input_precision)
    cycles = {
        "barrier": BARRIER_TRIPS * gpu.l2_latency if barrier else 0.0,
        "matrix": per_program / (rate / gpu.chip.multiprocessors) * gpu.clock,
        "shared memory": n * k * item / SHARED_BYTES if resident else 0.0,
        "exchange": (exchange_bytes + streamed_bytes) / EXCHANGE_BYTES,
    }
    product = max(cycles["matrix"], cycles["shared memory"], cycles["exchange"])
    step_us = (cycles["barrier"] + product) / gpu.clock * 1e6
    # More programs than multiprocessors ("whole" only) take turns.
    turns = ceil_div(programs, gpu.chip.multiprocessors)
    limits = {
        name: value * critical_steps * turns / gpu.clock * 1e6 for name, value in cycles.items()
    }
    limits["memory"] = gpu.memory_seconds(memory_bytes) * 1e6
    limits["L2"] = l2_bytes / gpu.l2_bandwidth * 1e6
    return PassFloor(
        which=which,
        tile=tile,
        programs=programs,
        occupancy=min(1.0, programs / gpu.chip.multiprocessors),
        shared_bytes=shared_memory(
            tile, which, H, item, parts_of(shape.dtype, shape.input_precision)
        ),
        memory_bytes=memory_bytes,
        l2_bytes=l2_bytes,
        operations=operations,
        executed=executed,
        barriers=launched_steps if barrier else 0,
        critical_steps=critical_steps,
        launches=(2 if barrier else 1) + (1 if which == "forward" else 4),
        step_us=step_us,
        limits=limits,
        recurrence_us=max(step_us * critical_steps * turns, limits["memory"], limits["L2"]),
        products_us=_products_us(which, shape, gpu),
    )


def _steps(lengths: Sequence[int], tile: Tile) -> tuple[list[int], int]:
    """Steps of each batch tile, and of the program that has most of them.

    A tile goes on while its longest sequence does; program p has tiles p, p + programs, ...
    """
    longest_first = sorted(lengths, reverse=True)
    steps = longest_first[:: tile.BLOCK_B]
    return steps, sum(steps[:: tile.batch_programs])


def _row_bytes(which: Pass, shape: LayerShape) -> int:
    """What the launch must read and write at least once, in bytes."""
    H, D, S = shape.hidden_size, shape.directions, len(shape.lengths)
    if which == "forward":
        per_row = 4 + 1 + (4 + 1 if shape.training else 0)  # gates_x, h, gates and c
        states = 4  # h_0, c_0, h_n, c_n
    else:
        per_row = 4 + 1 + 1 + 4  # gates, c, d_h, d_gates
        states = 5  # d_h_n, d_c_n, c_0, d_h_0, d_c_0
    values = shape.rows * per_row * D * H + states * D * S * H + D * 4 * H * H
    return values * shape.dtype.itemsize + shape.steps * 16  # batch_sizes and offsets


def _products_us(which: Pass, shape: LayerShape, gpu: Gpu) -> float:
    """The products over all rows: gates_x before; d_x, d_W_ih, d_W_hh and biases after."""
    N, I, H = shape.rows, shape.input_size, shape.hidden_size  # noqa: E741
    gates = 4 * H * shape.directions
    item = shape.dtype.itemsize
    rate = gpu.matrix_rate(shape.dtype, shape.input_precision)

    def product(m: int, k: int, n: int) -> float:
        operations, values = 2 * m * k * n, m * k + k * n + m * n
        return max(operations / rate, gpu.memory_seconds(values * item))

    if which == "forward":
        return product(N, I, gates) * 1e6
    d_weight_hh = shape.directions * product(4 * H, N, H)
    biases = gpu.memory_seconds(N * gates * item)
    return (product(N, gates, I) + product(gates, N, I) + d_weight_hh + biases) * 1e6


@dataclass(frozen=True)
class ClipFloor:
    """Floors of clipping gradients of `gradient_bytes` in all, in microseconds.

    Attributes:
        unclipped_us: every gradient is read once.
        clipped_us: read for the norm, read again and written; of the second reading, what the
            cache still holds of the first costs nothing.
        torch_us: what torch moves, clipped or not: read, read, write.
    """

    gradient_bytes: int
    unclipped_us: float
    clipped_us: float
    torch_us: float


def clip_floor(gradient_bytes: int, gpu: str | Gpu) -> ClipFloor:
    """The gradient clip's floors on a GPU; gradients that fit L2 are taken to be there.

    Raises:
        ValueError: a negative size, or an unknown GPU.
    """
    if gradient_bytes < 0:
        raise ValueError(f"gradient_bytes must not be negative, got {gradient_bytes}")
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
        gpu = GPUS[gpu]
    once = gpu.memory_seconds(gradient_bytes) * 1e6
    cached = min(gradient_bytes, gpu.l2_bytes) / gradient_bytes if gradient_bytes else 0.0
    fits = cached == 1.0
    clipped = (3 if fits else 3 - cached) * once
    return ClipFloor(gradient_bytes, once, clipped, 3 * once)
