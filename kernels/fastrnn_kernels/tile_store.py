"""Tiles that were measured, kept on disk: tuning.py writes them, the launchers look them up.

`$XDG_CACHE_HOME/fastrnn/tiles-VERSION.json` (`~/.cache/fastrnn/...`) holds, for each GPU and class
of shapes, the tile that was fastest there. VERSION is Triton's and a hash of the kernels' source,
for a change of either makes other machine code. A class is a pass, H, D, dtype, precision and the
number of sequences in steps of powers of two; the lengths of sequences do not enter.

A file that cannot be read, that is not what it should be, or whose tile does not fit is as good as
none: the reason is logged as a warning and the rule of tiling.py decides.

Limits: of two processes that write at the same time the later one may lose what the earlier found;
the file is whole at any time. A process sees what others write only when it starts, or saves.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton

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


@functools.cache
def version() -> str:
    """Triton's version and a hash of the kernels' source."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"{triton.__version__}-{digest.hexdigest()[:16]}"


def store_path() -> Path:
    """Where measured tiles are kept.

    Raises:
        RuntimeError: neither XDG_CACHE_HOME nor a home directory is known.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    directory = Path(base) if base else Path.home() / ".cache"
    return directory / "fastrnn" / f"tiles-{version()}.json"


def read_store(path: Path) -> dict[str, Tile]:
    """The tiles in a file; none, with a warning in the log, where it is not what it should be."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != version():
            raise ValueError(f"it is of version {content['version']}, this is {version()}")
        return {key: _tile_from(entry["tile"]) for key, entry in content["tiles"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning(
            "measured tiles in %s are ignored (%s: %s); delete the file, or run fastrnn.tune again",
            path,
            type(error).__name__,
            error,
        )
        return {}


def _tile_from(values: Mapping[str, Any]) -> Tile:
    """A tile from the file's values, the kind of each checked."""
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


def save_tiles(found: Mapping[ShapeClass, tuple[Tile, float]]) -> Path | None:
    """Adds measured tiles and their microseconds to the store; this process uses them from now on.

    Returns:
        The file, or None where it could not be written; the reason is logged as a warning.
    """
    try:
        path = store_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _entries(path)
        for shape, (tile, microseconds) in found.items():
            entries[shape.key] = {"tile": asdict(tile), "microseconds": microseconds}
        content = {"version": version(), "tiles": dict(sorted(entries.items()))}
        _replace(path, json.dumps(content, indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        _log.warning("measured tiles are not kept beyond this process: %s", error)
        _tiles().update({shape.key: tile for shape, (tile, _) in found.items()})
        stored_tile.cache_clear()
        return None
    forget()
    return path


def _entries(path: Path) -> dict[str, Any]:
    """What the file holds already; nothing where it is not what it should be."""
    if not read_store(path):
        return {}
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    return entries


def _replace(path: Path, text: str) -> None:
    """Writes a file so that readers see the old one or the new one, and never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@functools.cache
def _tiles() -> dict[str, Tile]:
    """The store as this process found it, and what it added."""
    try:
        return read_store(store_path())
    except (OSError, RuntimeError) as error:
        _log.warning("no place for measured tiles: %s", error)
        return {}


def forget() -> None:
    """Reads the store anew when it is next asked for."""
    _tiles.cache_clear()
    stored_tile.cache_clear()


@functools.lru_cache(maxsize=4096)
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
    tiles = _tiles()
    if not tiles:
        return None
    shape = ShapeClass.of(which, S, H, D, dtype, device, input_precision)
    tile = tiles.get(shape.key)
    if tile is None:
        return None
    chip = Chip.of(device)
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
