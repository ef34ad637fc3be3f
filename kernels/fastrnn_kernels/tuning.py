"""A measured search among the tiles that fit: what `fastrnn.tune` runs.

The tiles are those tiling.py chooses from. They are launched in turns, in another order every
round, so that a clock that changes meets all of them; the fastest median wins and is kept by
tile_store.py, where the launchers find it.

Limits: the search knows the tiles it is given and no others. It measures one launch on an otherwise
idle GPU; two layers that share a GPU may want smaller grids.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from triton import TritonError

from .launch import CannotLaunch, InputPrecision, precision_of
from .lstm_backward import lstm_backward
from .lstm_forward import lstm_forward
from .tile_store import ShapeClass, save_tiles
from .tiling import (
    Chip,
    Pass,
    Tile,
    backward_tile,
    fitting_tiles,
    forward_tile,
    parts_of,
)
from .torch_private import keep_busy

Launch = Callable[[Tile], object]
Timer = Callable[[Callable[[], object]], float]
# About a millisecond, so that a launch and its scratch memory are queued before the GPU gets there.
BUSY_CYCLES = 2_000_000

_log = logging.getLogger("fastrnn")


@dataclass(frozen=True)
class Tuned:
    """What a search found for one launch.

    Attributes:
        which: "forward" or "backward".
        tile: the fastest.
        microseconds: its median.
        rule_tile: what tiling.py would have chosen.
        rule_microseconds: the median of that one; None where the GPU refused it.
        measured: tiles that ran.
        refused: tiles that did not compile or could not be launched.
    """

    which: Pass
    tile: Tile
    microseconds: float
    rule_tile: Tile
    rule_microseconds: float | None
    measured: int
    refused: int


def gpu_timer(device: torch.device) -> Timer:
    """Microseconds of a launch by events on the current stream; the host's share is hidden."""

    def microseconds(launch: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            keep_busy(BUSY_CYCLES)
            begin.record()
            launch()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e3

    return microseconds


def measure(
    tiles: Sequence[Tile], launch: Launch, timer: Timer, rounds: int
) -> tuple[dict[Tile, float], int]:
    """The median microseconds of each tile, and how many were refused.

    Args:
        tiles: to be tried.
        launch: runs the kernel cut by a tile.
        timer: how long a call takes, in microseconds.
        rounds: samples of each tile.

    Raises:
        RuntimeError: none can run; with the last reason.
    """
    samples: dict[Tile, list[float]] = {}
    reason: Exception | None = None
    for tile in tiles:
        try:
            launch(tile)  # compiles, and warms up
        except (CannotLaunch, TritonError) as error:
            _log.info("%s cannot run here: %s", tile, error)
            reason = error
        else:
            samples[tile] = []
    if not samples:
        raise RuntimeError(f"none of {len(tiles)} tiles can run here: {reason}") from reason
    order = list(samples)
    for turn in range(rounds):
        first = turn % len(order)
        for tile in order[first:] + order[:first]:
            samples[tile].append(timer(functools.partial(launch, tile)))
    return {tile: median(values) for tile, values in samples.items()}, len(tiles) - len(samples)


def tune_recurrence(
    batch_sizes: torch.Tensor,
    S: int,
    N: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    *,
    input_precision: InputPrecision,
    training: bool = True,
    rounds: int = 20,
    timer: Timer | None = None,
) -> list[Tuned]:
    """Searches the tiles of one layer's launches over one batch, and keeps the fastest on disk.

    Inputs are drawn at random; what the kernels do does not depend on them. torch's random state is
    left as it was.

    Args:
        batch_sizes: active sequences of each step, never growing [T], int64, on the GPU.
        S: sequences.
        N: rows, valid or not.
        H: hidden units.
        D: directions.
        dtype: float32, bfloat16 or float16.
        input_precision: how float32 products are made.
        training: search the backward launch as well.
        rounds: samples of each tile.
        timer: microseconds of a call. Default: events of the GPU.

    Returns:
        One result for each launch, forward first.

    Raises:
        ValueError: rounds is not positive, or no tile fits this chip.
        RuntimeError: no tile can run.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = batch_sizes.device
    timer = gpu_timer(device) if timer is None else timer
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (values * scale).to(dtype)

    offsets = batch_sizes.cumsum(0) - batch_sizes
    gates_x, weight_hh = draw(N, D, 4 * H), draw(D, 4 * H, H, scale=H**-0.5)
    zeros = torch.zeros(D, S, H, device=device, dtype=dtype)
    precision = precision_of(gates_x, input_precision)
    save = "gates" if training else "nothing"

    def forward(tile: Tile | None) -> object:
        inputs = (gates_x, weight_hh, zeros, zeros, batch_sizes, offsets)
        return lstm_forward(*inputs, save=save, input_precision=input_precision, tile=tile)

    shape = (S, H, D, dtype)
    found = [_search("forward", *shape, device, precision, forward, timer, rounds)]
    if training:
        saved = lstm_forward(
            *(gates_x, weight_hh, zeros, zeros, batch_sizes, offsets),
            save="gates",
            input_precision=input_precision,
            tile=found[0].tile,
        )
        d_h = draw(N, D, H)

        def backward(tile: Tile) -> object:
            inputs = (d_h, zeros, zeros, saved.gates, saved.c, zeros, weight_hh)
            steps = (batch_sizes, offsets)
            return lstm_backward(*inputs, *steps, input_precision=input_precision, tile=tile)

        found.append(_search("backward", *shape, device, precision, backward, timer, rounds))
    save_tiles(
        {
            ShapeClass.of(each.which, *shape, device, precision): (each.tile, each.microseconds)
            for each in found
        }
    )
    return found


def _search(
    which: Pass,
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: InputPrecision,
    launch: Launch,
    timer: Timer,
    rounds: int,
) -> Tuned:
    chip = Chip.of(device)
    tiles = fitting_tiles(which, S, H, D, dtype.itemsize, chip, parts_of(dtype, precision))
    choose = forward_tile if which == "forward" else backward_tile
    rule = choose(S, H, D, dtype, chip, precision)
    medians, refused = measure(tiles, launch, timer, rounds)
    best = min(medians, key=medians.__getitem__)
    return Tuned(which, best, medians[best], rule, medians.get(rule), len(medians), refused)
