"""`python -m fastrnn info`: what is here, what can run and why not; for bug reports.

Versions, devices, ways to compute and the clip's kernel by device, the tiles of a shape, caches and
their places, switches and environment. It reads what is there and launches nothing; the home
directory is written as ~.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrnn.check import gpus
from fastrnn.choosing.backends import can_run_triton
from fastrnn.choosing.environment import SWITCHES, misspelt, surroundings, switch
from fastrnn.clip.gradient_norms import can_run_kernel
from fastrnn.ways import onednn
from fastrnn.ways.widening import wide_hidden_size

if TYPE_CHECKING:
    from fastrnn_kernels.tiling import Chip

Report = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "triton", "numpy", "rich", "matplotlib")
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn info", description="Say what is here and what can run; for reports."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--hidden-size", type=int, default=256, metavar="H", help="default: 256")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="sequences; default: 64")
    parser.add_argument("--bidirectional", action="store_true", help="default: one direction")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--chip", help="tiles of this one as well, such as sm_90; it may be absent")
    given = parser.parse_args(argv)
    directions = 2 if given.bidirectional else 1
    report = info(given.hidden_size, given.batch, directions, DTYPES[given.dtype], given.chip)
    print(json.dumps(report, indent=1) if given.json else "\n".join(_lines(report)))
    return 0


def info(
    hidden_size: int = 256,
    batch: int = 64,
    directions: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    chip: str | None = None,
) -> Report:
    """All that `python -m fastrnn info` says.

    Args:
        hidden_size: of the layer whose tiles are wanted.
        batch: its sequences.
        directions: 1 or 2.
        dtype: of its tensors.
        chip: whose tiles are wanted besides those of the GPUs here.

    Returns:
        Nested dictionaries of what JSON has.
    """
    devices = [CPU, *gpus()]
    return {
        "versions": versions(),
        "devices": {str(device): describe(device) for device in devices},
        "shape": {"H": hidden_size, "B": batch, "D": directions, "dtype": _name(dtype)},
        "can run": {
            str(device): abilities(device, dtype, hidden_size, directions) for device in devices
        },
        "tiles": tiles(hidden_size, batch, directions, dtype, chip),
        "caches": caches(),
        "switches": switches(),
        "environment": {name: _short(value) for name, value in surroundings().items()},
    }


def versions() -> Report:
    """Of fastrnn and of what it stands on."""
    from fastrnn import __version__

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton
    cudnn = torch.backends.cudnn
    return {
        "fastrnn": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "CUDA of torch": torch.version.cuda,
        "ROCm of torch": torch.version.hip,
        "CUDA of the driver": _driver(),
        "cuDNN": cudnn.version() if cudnn.is_available() else None,
        "C compiler": _short(compiler) if compiler else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not gpus() or torch.version.hip is not None:
        return None
    from fastrnn_kernels.torch_private import cuda_driver_version

    version = cuda_driver_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def describe(device: torch.device) -> Report:
    """A device, as far as the choice of a way depends on it."""
    if device.type == "cpu":
        return {
            "machine": platform.machine(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    properties, rnn = torch.cuda.get_device_properties(device), torch.backends.cudnn.rnn
    amd = getattr(properties, "gcnArchName", "").split(":")[0]
    return {
        "name": properties.name,
        "architecture": amd or f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "float32 in an RNN": rnn.fp32_precision,  # type: ignore[attr-defined]
        "float32 in a product": torch.backends.cuda.matmul.fp32_precision,
    }


def abilities(
    device: torch.device, dtype: torch.dtype, hidden_size: int, directions: int
) -> dict[str, str]:
    """Each way to compute a layer, and to clip: "yes", or why not."""
    found: dict[str, str | None] = {"LSTM by torch's own": None, "LSTM by the step loop": None}
    if device == CPU:
        known = onednn.available(device, onednn.compute_dtype(dtype))
        found["LSTM by oneDNN"] = None if known else f"it has no {_name(dtype)} here"
    found["LSTM by the kernels"] = can_run_triton(device, dtype, hidden_size, directions)
    gradient = torch.empty(1, dtype=dtype, device=device)
    found["clip by torch's operations"] = None
    found["clip by the kernel"] = can_run_kernel([gradient], 2.0)
    return {name: "yes" if reason is None else f"no: {reason}" for name, reason in found.items()}


def tiles(
    hidden_size: int, batch: int, directions: int, dtype: torch.dtype, chip: str | None
) -> Report:
    """How the kernels' launches would be cut, by GPU."""
    if (missing := _no_kernels()) is not None:
        return {"none": missing}
    from fastrnn_kernels.tiling import CHIPS, Chip

    H = wide_hidden_size(hidden_size)
    layer = (H, batch, directions, dtype)
    found: Report = {str(device): _tiles_of(Chip.of(device), *layer, device) for device in gpus()}
    if chip in CHIPS:
        found[chip] = _tiles_of(CHIPS[chip], *layer, None)
    elif chip is not None:
        found[chip] = f"unknown; the tests compile for {', '.join(CHIPS)}"
    return found or {"none": "there is no GPU here; --chip names one that is elsewhere"}


def _tiles_of(
    chip: Chip,
    H: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Report:
    from fastrnn.ways.fused import input_precision
    from fastrnn_kernels.tile_store import stored_tile
    from fastrnn_kernels.tiling import Pass, backward_tile, forward_tile

    found: Report = {}
    precision = input_precision()
    passes: tuple[tuple[Pass, Any], ...] = (("forward", forward_tile), ("backward", backward_tile))
    for which, choose in passes:
        kept = None
        if device is not None:
            kept = stored_tile(which, batch, H, directions, dtype, device, precision)
        try:
            tile = kept or choose(batch, H, directions, dtype, chip, precision)
        except ValueError as error:
            found[which] = str(error)
            continue
        chosen = "by rule" if kept is None else "by measurement"
        found[which] = {
            "chosen": chosen,
            "programs": math.prod(tile.grid(directions)),
            **asdict(tile),
        }
    return found


def caches() -> Report:
    """Where things are kept, what is there, and whether more can be written."""
    if (missing := _no_kernels()) is not None:
        return {"none": missing}
    from triton import knobs

    from fastrnn_kernels import tile_store, trust

    verdicts = trust.verdicts.findings()
    return {
        "measured tiles": {
            **_place(tile_store.store_path),
            "of": sorted(tile_store.measured_tiles()),
        },
        "verdicts of checks": {
            **_place(trust.verdicts.path),
            "passed": sum(reason is None for reason in verdicts.values()),
            "failed": {name: reason for name, reason in verdicts.items() if reason is not None},
        },
        "Triton's": _place(lambda: Path(knobs.cache.dir)),
    }


def _place(of: Callable[[], Path]) -> Report:
    """A file or folder, and whether one of this name can be written or made."""
    try:
        path = nearest = of()
    except RuntimeError as error:  # no home directory
        return {"place": None, "writable": False, "reason": str(error)}
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return {"place": _short(str(path)), "writable": os.access(nearest, os.W_OK)}


def switches() -> Report:
    """Every switch of fastrnn: its value or what is wrong with it, and what it is for."""
    found: Report = {}
    for name, known in SWITCHES.items():
        try:
            value = switch(name) or "not set"
        except ValueError as error:
            value = str(error)
        found[name] = f"{value} ({'|'.join(known.values)}: {known.meaning})"
    return found | dict.fromkeys(misspelt(), "is no switch of fastrnn")


def _no_kernels() -> str | None:
    """Why fastrnn_kernels cannot be imported."""
    missing = importlib.util.find_spec("triton") is None
    return "triton is not installed: pip install triton" if missing else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(text: str) -> str:
    return text.replace(os.path.expanduser("~"), "~")


def _lines(report: Mapping[str, Any], depth: int = 0) -> list[str]:
    """The report as indented text."""
    found = []
    for name, value in report.items():
        begin = "  " * depth + f"{name}:"
        if isinstance(value, Mapping) and value:
            found += [begin, *_lines(value, depth + 1)]
        elif value is None or value in ({}, []):
            found.append(f"{begin} none")
        elif isinstance(value, list):
            found += [begin, *(f"{'  ' * (depth + 1)}{each}" for each in value)]
        else:
            found.append(f"{begin} {value}")
    return found
