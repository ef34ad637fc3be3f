"""Which backend runs the recurrence, and why not another.

- ``reference``: plain PyTorch, on every device and in every dtype; the step loop of reference.py.
- ``auto``: the fastest that can run: on the CPU the step loop or oneDNN rectangles, by a cost
  model.
- ``triton``: the kernels. One function, :func:`can_run_triton`, gives the reason where they cannot
  run, to the automatic choice, to the error for an explicit request and to the log.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "triton"]

_log = logging.getLogger("fastrnn")


def can_run_triton(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on ``device``; None where they can."""
    return f"this version of fastrnn has no Triton kernel for the recurrence ({device} asked)"


def backends() -> dict[str, str]:
    """What can run here, and why not.

    Returns:
        For each backend ``"available"``, or ``"unavailable: "`` with the reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = can_run_triton(device)
    return {
        "reference": "available",
        "triton": "available" if reason is None else f"unavailable: {reason}",
    }


def check_backend(name: str) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: with the names that do.
    """
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {name!r}")


def resolve_backend(name: str, device: torch.device) -> Literal["auto", "reference"]:
    """The backend that runs on ``device``.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run; it never falls back silently.
    """
    if name == "auto" and device.type == "cpu":
        return "auto"
    check_backend(name)
    if name == "reference":
        return "reference"
    reason = can_run_triton(device)
    if name == "triton":
        raise RuntimeError(
            f'backend="triton" cannot run: {reason}. Use backend="auto", which takes the fastest '
            "that can."
        )
    if reason is not None:
        _log_once(f"backend='auto' uses the PyTorch step loop on {device.type}: {reason}")
    return "auto"


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
