"""The backends that a user may ask for by name, and whether they can run.

- ``torch``: torch's own LSTM, on every device and in every dtype.
- ``reference``: plain PyTorch, likewise; the step loop of cells/lstm.py.
- ``triton``: the kernels of ``fastrnn_kernels``, on GPUs. One function, :func:`can_run_triton`,
  gives the reason where they cannot run, to the automatic choice, to the error for an explicit
  request and to the log.
- ``auto``: whatever is fastest; choose.py has the rules.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Literal, get_args

import torch

from fastrnn.ways.widening import wide_hidden_size

Backend = Literal["auto", "torch", "reference", "triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run_triton(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 1,
    directions: int = 1,
    proj_size: int = 0,
) -> str | None:
    """Why the Triton kernels cannot run such a layer on ``device``; None where they can."""
    if proj_size:
        return (
            "proj_size is a second product and a second barrier in every step, which the kernels "
            "do not have"
        )
    if dtype not in _DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, got {dtype}"
    device = torch.device(device)
    reason = _device_reason(device.type, device.index)
    reason = reason or _tile_reason(device, dtype, hidden_size, directions)
    return reason or _refusal(device, dtype, hidden_size, directions)


# A constant to torch.compile, which cannot trace it. torch.compiler.assume_constant_result sets
# just this, and imports all of torch._dynamo.
can_run_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _device_reason(kind: str, index: int | None) -> str | None:
    """Why no kernel can run on this device."""
    if kind != "cuda":
        return f"the kernels run on GPUs, the tensors are on {kind}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    from fastrnn_kernels.tiling import CHIPS, architecture_of

    name = architecture_of(index)
    if name in CHIPS:
        return None
    return f"the kernels have been compiled and examined for {', '.join(CHIPS)}, this is {name}"


@functools.cache
def _tile_reason(
    device: torch.device, dtype: torch.dtype, hidden_size: int, directions: int
) -> str | None:
    """Why no tile fits this layer on a device that has kernels."""
    from fastrnn_kernels.tiling import Chip, backward_tile, forward_tile

    try:
        for choose in (forward_tile, backward_tile):
            choose(1, wide_hidden_size(hidden_size), directions, dtype, Chip.of(device))
    except ValueError as error:
        return str(error)
    return None


def _refusal(
    device: torch.device, dtype: torch.dtype, hidden_size: int, directions: int
) -> str | None:
    """Why a kernel of this layer failed its check, or was refused, earlier in this process."""
    trust = sys.modules.get("fastrnn_kernels.trust")  # not imported: nothing was launched
    if trust is None:
        return None
    reason: str | None = trust.refusal(device, dtype, wide_hidden_size(hidden_size), directions)
    return reason


def limit_multiprocessors(n: int | None) -> None:
    """Let each launch of a kernel take at most so many multiprocessors of a GPU.

    A kernel whose programs wait for each other must have them all at once. Alone on a GPU it may
    take all multiprocessors; who shares one, by streams, MPS or green contexts, says here how many
    are free, or else launches are refused, or wait for the others to end. What MPS withholds by
    ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` the driver reports, and needs no limit here.

    Args:
        n: how many, for all GPUs of this process; None for all that there are.

    Raises:
        ValueError: ``n`` is not positive.
    """
    from fastrnn_kernels import tiling

    tiling.limit_multiprocessors(n)
    _tile_reason.cache_clear()


def backends() -> dict[str, str]:
    """What can run here, and why not.

    Returns:
        By name of the backend, ``"available"``, or ``"unavailable"`` with the reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = can_run_triton(device)
    return {
        "torch": "available",
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


def on_kernels(backend: str) -> bool:
    """Whether a resolved backend is the kernels."""
    return backend.startswith("triton")
