"""Result files: what they say of the machine, and how they are written.

Their schema is in bench/results/README.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastrnn
from bench import devices

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def cpu_model() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def environment() -> Record:
    """Versions and machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastrnn": fastrnn.__version__,
        "revision": _revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "load_average_before": load_average(),
    }


def _revision() -> str | None:
    """The commit, with a plus where the tree differs from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def default_path(kind: str, complete: bool, device: torch.device | None = None) -> Path:
    """Where a run writes unless told: a complete one where ``report`` looks, others elsewhere."""
    if not complete:
        return Path("runs") / f"bench-{kind}.json"
    return RESULTS / file_name(kind, device)


def file_name(kind: str, device: torch.device | None = None) -> str:
    """Of a result: its kind, the machine and the day."""
    if device is not None and device.type == "cuda":
        machine = _slug(torch.cuda.get_device_name(device))
    else:
        machine = f"{_slug(cpu_model())}-{cpu_count()}cpus"
    return f"{kind}-{machine}-{datetime.date.today().isoformat()}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def new_record(kind: str, flags: Record, device: torch.device) -> Record:
    """A result to which cases are added."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "complete": False,
        "environment": environment() | {"gpu": devices.describe(device)},
        "flags": flags,
        "cases": [],
    }


# What a run and the one that it goes on from must have in common.
_SAME = ("fastrnn", "revision", "torch", "python", "system", "cpu", "cpus")


def resumed(record: Record, path: Path) -> Record:
    """The result in ``path`` to go on with, if it was begun as ``record`` is; else ``record``.

    Raises:
        ValueError: it is of another kind, other flags, versions or device: it cannot be gone on
            with, and would be overwritten.
    """
    if not path.exists():
        return record
    earlier = load(path)
    pairs: list[tuple[str, Any, Any]] = [
        (name, earlier[name], record[name]) for name in ("kind", "flags")
    ]
    before, now = earlier["environment"], record["environment"]
    pairs += [(name, before.get(name), now[name]) for name in _SAME]
    pairs.append(("GPU", _gpu_name(before), _gpu_name(now)))
    for name, was, is_now in pairs:
        if was != is_now:
            raise ValueError(
                f"{path} cannot be gone on with: its {name} was {was}, and is {is_now} now; "
                "give another --out, or leave out --resume to overwrite it"
            )
    return earlier


def _gpu_name(environment: Record) -> str | None:
    gpu = environment.get("gpu")
    return gpu["name"] if gpu else None


def save(record: Record, path: Path) -> None:
    """Write the whole record, or leave what stands there as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: Path) -> Record:
    """A result file.

    Raises:
        ValueError: it is none, or of another schema.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a result file of schema {SCHEMA}; measure again")
    return record
