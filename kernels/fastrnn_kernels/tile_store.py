"""Tiles that were measured, kept on disk: tuning.py writes them, the launchers look them up.

A kept store (kept_store.py) holds, for each GPU and class of shapes, the tile that was fastest
there. A class is a pass, H, D, dtype, precision and the number of sequences in steps of powers of
two; the lengths of sequences do not enter. Where a tile does not fit, the reason is logged as a
warning and the rule of tiling.py decides.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .kept_store import KeptStore
from .tiling import (
    Chip,
    Pass,
    Tile,
    parts_of,
    shared_memory,
    with_batch_programs,
)

# What a compiled kernel is made of; tiling.py gives it STREAM_STAGES and the meaning of a tile.
SOURCES = ("lstm_forward.py", "lstm_backward.py", "grid_barrier.py", "primitives.py", "tiling.py")
SMALLEST_CLASS = 16  # sequences: no tile has fewer rows

_log = logging.getLogger("fastrnn")


@dataclass(frozen=True)
class ShapeClass:
    """The shapes that share a tile, on one GPU."""

    device: str
    which: Pass
    H: int
    D: int
    dtype: str
    input_precision: str
    S: int

    @staticmethod
    def of(
        which: Pass,
        S: int,
        H: int,
        D: int,
        dtype: torch.dtype,
        device: torch.device,
        input_precision: str,
    ) -> ShapeClass:
        """The class of a launch's shape."""
        if dtype != torch.float32:
            input_precision = "tf32"  # 16-bit operands have no choice
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        dtype_name = str(dtype).removeprefix("torch.")
        return ShapeClass(name, which, H, D, dtype_name, input_precision, class_of_batch(S))

    @property
    def key(self) -> str:
        """Its name in the file."""
        values = (self.which, f"H{self.H}", f"D{self.D}", self.dtype, self.input_precision)
        return "/".join((self.device, *values, f"S{self.S}"))


def class_of_batch(S: int) -> int:
    """S rounded up to 16, 32, 64, 128, ... sequences: as tiles do in steps of BLOCK_B."""
    return max(SMALLEST_CLASS, 1 << (S - 1).bit_length())


def _tile_from(entry: Mapping[str, Any]) -> Tile:
    """A tile from the file's values, the kind of each checked."""
    values = entry["tile"]
    names = {field.name for field in fields(Tile)}
    if set(values) != names:
        raise ValueError(f"a tile has {sorted(names)}, got {sorted(values)}")
    for name, value in values.items():
        if name == "residency":
            good = value in ("whole", "split", "streamed")
        else:
            optional = name == "max_registers" and value is None
            good = optional or (type(value) is int and value > 0)
        if not good:
            raise ValueError(f"a tile's {name} cannot be {value!r}")
    return Tile(**values)


_store = KeptStore("tiles", "measured tiles", "run fastrnn.tune again", SOURCES, _tile_from)


def version() -> str:
    """Triton's version and a hash of the kernels' source."""
    return _store.version


def store_path() -> Path:
    """Where measured tiles are kept.

    Raises:
        RuntimeError: neither XDG_CACHE_HOME nor a home directory is known.
    """
    return _store.path()


def measured_tiles() -> dict[str, Tile]:
    """All tiles of the store, by their class's key."""
    return _store.findings()


def save_tiles(found: Mapping[ShapeClass, tuple[Tile, float]]) -> Path | None:
    """Adds measured tiles and their microseconds to the store; this process uses them from now on.

    Returns:
        The file, or None where it could not be written; the reason is logged as a warning.
    """
    path = _store.add(
        {
            shape.key: {"tile": asdict(tile), "microseconds": microseconds}
            for shape, (tile, microseconds) in found.items()
        }
    )
    _fitting_tile.cache_clear()
    return path


def forget() -> None:
    """Reads the store anew when it is next asked for."""
    _store.forget()
    _fitting_tile.cache_clear()


def stored_tile(
    which: Pass,
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    input_precision: str,
) -> Tile | None:
    """The tile that was measured to be fastest for such a launch; None where none was."""
    return _fitting_tile(which, S, H, D, dtype, device, input_precision, Chip.of(device))


@functools.lru_cache(maxsize=4096)
def _fitting_tile(
    which: Pass,
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    input_precision: str,
    chip: Chip,
) -> Tile | None:
    tiles = measured_tiles()
    if not tiles:
        return None
    shape = ShapeClass.of(which, S, H, D, dtype, device, input_precision)
    tile = tiles.get(shape.key)
    if tile is None:
        return None
    try:
        tile = with_batch_programs(tile, S, D, chip)
        tile.check(S, H)
        if tile.unit_programs * D > chip.multiprocessors and tile.residency != "whole":
            raise ValueError(f"at most {chip.multiprocessors} programs are resident")
        parts = parts_of(dtype, input_precision)
        needed = shared_memory(tile, which, H, dtype.itemsize, parts)
        if needed > chip.shared_memory:
            raise ValueError(f"it needs {needed} bytes of shared memory of {chip.shared_memory}")
    except ValueError as error:
        _log.warning("the measured tile for %s is ignored: %s", shape.key, error)
        return None
    return tile
