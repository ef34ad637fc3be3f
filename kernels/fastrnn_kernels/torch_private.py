"""The private names of torch that the kernels' package relies on; see fastrnn/torch_private.py."""

from __future__ import annotations

import torch


def cuda_driver_version() -> int:
    """The version of NVIDIA's driver times 1000; only torch built for CUDA can say it."""
    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return version


def keep_busy(cycles: int) -> None:
    """Start work of so many cycles on the current stream."""
    torch.cuda._sleep(cycles)
