"""The device that is measured: how to wait for it, and what the results say of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from typing import Any

import torch

# As nvidia-smi names them; megahertz, watts and degrees Celsius, at the moment of asking.
_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def waiting(device: torch.device) -> Callable[[], object]:
    """What returns when ``device`` has done all work; the CPU has none left when a call returns."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def describe(device: torch.device) -> dict[str, Any] | None:
    """A GPU, the software that drives it and how it multiplies float32; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": package_version("triton"),
        "tf32": tf32_state(),
        "as_found": as_found(device),
    }


def tf32_state() -> dict[str, str]:
    """Torch's switches ``fp32_precision``: "tf32", or else float32 products are not made in it."""
    return {
        "rnn": torch.backends.cudnn.rnn.fp32_precision,
        "matmul": torch.backends.cuda.matmul.fp32_precision,
    }


def recurrent_tf32() -> bool:
    """Whether torch lets an RNN on a GPU multiply float32 in TF32."""
    return tf32_state()["rnn"] == "tf32"


def as_found(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power limit and temperature as nvidia-smi reports them; None without it."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_smi(run.stdout) if run.returncode == 0 else None


def parse_smi(line: str) -> dict[str, str] | None:
    """nvidia-smi's answer by our names; None where it is not one value for each."""
    values = [value.strip() for value in line.strip().split(",")]
    return dict(zip(_SMI_FIELDS, values)) if len(values) == len(_SMI_FIELDS) else None


def package_version(name: str) -> str | None:
    """An installed distribution's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
