"""What the launchers share on the host: checks, scratch memory, the current device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch

from .failed_waits import failed_waits
from .tiling import Tile

InputPrecision = Literal["tf32", "tf32x3", "ieee"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# int32 counters from one batch tile to the next: a 128-byte line, so that no two tiles share one.
ARRIVALS_STRIDE = 32


def check_tensor(
    name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless `tensor` is contiguous, of this shape, `like`'s dtype and device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() on it")


def check_rows(
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    h_0: torch.Tensor | None,
    c_0: torch.Tensor,
    batch_sizes: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[int, int, int, int]:
    """Checks what both launchers take, without a synchronisation; returns D, S, H, T."""
    if gates.dim() != 3 or gates.shape[2] % 4 or gates.shape[1] not in (1, 2):
        raise ValueError(f"gates must have shape [N, D, 4H] with D 1 or 2, got {list(gates.shape)}")
    if gates.dtype not in DTYPES:
        raise ValueError(f"gates must be float32, bfloat16 or float16, got {gates.dtype}")
    if not gates.is_contiguous():
        raise ValueError("gates must be contiguous; call .contiguous() on it")
    if c_0.dim() != 3:
        raise ValueError(f"c_0 must have shape [D, S, H], got {list(c_0.shape)}")
    if batch_sizes.dim() != 1:
        raise ValueError(f"batch_sizes must have shape [T], got {list(batch_sizes.shape)}")
    D, H = gates.shape[1], gates.shape[2] // 4
    S, T = c_0.shape[1], batch_sizes.shape[0]
    check_tensor("weight_hh", weight_hh, gates, (D, 4 * H, H))
    check_tensor("c_0", c_0, gates, (D, S, H))
    if h_0 is not None:
        check_tensor("h_0", h_0, gates, (D, S, H))
    index = batch_sizes.new_empty(0, dtype=torch.int64, device=gates.device)
    check_tensor("batch_sizes", batch_sizes, index, (T,))
    check_tensor("offsets", offsets, index, (T,))
    return D, S, H, T


def with_aligned_columns(weight_hh: torch.Tensor) -> torch.Tensor:
    """Pads rows with zeros to a multiple of 16 bytes, so that they can be loaded 16 at a time."""
    missing = -weight_hh.shape[2] % (16 // weight_hh.element_size())
    return torch.nn.functional.pad(weight_hh, (0, missing)) if missing else weight_hh


def scratch(
    like: torch.Tensor, tile: Tile, D: int, num_batch_tiles: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exchange [2, D, num_batch_tiles * BLOCK_B, width] and the barriers' counters, all zero.

    They are allocated for each launch, by one call and one fill: launches on several streams and
    replays of a captured graph never share a counter, and none depends on how an earlier launch
    ended.
    """
    if tile.residency == "whole":
        nothing = like.new_empty(0)
        return nothing, nothing.new_empty(0, dtype=torch.int32)
    counters = D * num_batch_tiles * ARRIVALS_STRIDE
    words = 2 * D * num_batch_tiles * tile.BLOCK_B * width * like.element_size() // 4
    memory = torch.zeros(counters + words, dtype=torch.int32, device=like.device)
    return memory[counters:].view(like.dtype), memory[:counters]


def precision_of(tensor: torch.Tensor, input_precision: InputPrecision) -> InputPrecision:
    """What `tl.dot` is asked for: 16-bit operands have no choice, and AMD's has no tf32x3."""
    if tensor.dtype != torch.float32:
        return "tf32"
    if input_precision == "tf32x3" and torch.version.hip is not None:
        return "ieee"
    return input_precision


def assert_no_spill(compiled: Any) -> None:
    """Raises where a kernel keeps registers in memory and FASTRNN_ASSERT_NO_SPILL is 1.

    Args:
        compiled: what the launch has returned; None where it was interpreted.

    Raises:
        RuntimeError: with the number of spills.
    """
    if os.environ.get("FASTRNN_ASSERT_NO_SPILL") != "1" or compiled is None:
        return
    if compiled.n_spills:
        raise RuntimeError(
            f"{compiled.name} spills {compiled.n_spills} registers on this GPU, which costs time; "
            "please report it, with the output of `python -m fastrnn info`"
        )


class CannotLaunch(RuntimeError):
    """Nothing was computed: a compiler, the driver or the GPU refused. The message says why."""


# What CUDA and HIP say of errors that leave the whole process without a usable GPU: no other path
# could go on, and the error is often somebody else's.
STICKY = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "device-side assert",
    "misaligned address",
    "not supported on global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable",
)


@contextlib.contextmanager
def launching(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Makes the tensor's GPU the current one: Triton launches on its current stream.

    Yields:
        The word that a kernel sets when it gives up a wait [1]; see failed_waits.py.

    Raises:
        CannotLaunch: whatever fails before the kernel runs. There is no C compiler or no place for
            a cache, Triton or ptxas rejects the code, the grid cannot be resident at once, a
            program needs more than there is, a wait has failed before. Errors that leave no usable
            GPU behind, and memory that is full, are raised as they come.
        BarrierTimeout: an earlier kernel on this device has given up waiting.
    """
    waits = failed_waits(tensor.device)
    if (reason := waits.reason()) is not None:
        raise CannotLaunch(f"{reason}, earlier in this process")
    if os.environ.get("TRITON_INTERPRET") == "1":  # no driver is asked
        yield waits.word
        return
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    try:
        with device:
            yield waits.word
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if any(words in str(error) for words in STICKY):
            raise
        kind = type(error).__name__
        raise CannotLaunch(f"{tensor.device} refused the launch: {kind}: {error}") from error
