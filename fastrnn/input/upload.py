"""Tensors of the host, put on the device by one copy that nobody waits for.

From pageable memory a copy above 64 KB waits for all that the GPU has still to do. The staging
memory is torch's, which gives it to the next only after the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Every tensor begins at a multiple of so many bytes, as kernels are compiled for.
ALIGNMENT = 16


def upload(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors on the device; those that are there already, and None, as they are.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy what the staging memory
            holds at each replay.
    """
    own = [None if t is None or t.device == device else t for t in tensors]
    sizes = [0 if t is None else -(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in own]
    if (
        torch.compiler.is_compiling()
        or not any(sizes)
        or not all(t is None or t.is_cpu for t in own)
    ):
        return [t if t is None else t.to(device, non_blocking=True) for t in tensors]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot capture lengths, masks or resets of the host: put them on the GPU"
        )
    staging = _staging(sum(sizes), device)
    for tensor, part in zip(own, staging.split(sizes), strict=True):
        if tensor is not None:
            _as(part, tensor).copy_(tensor)
    there = staging.to(device, non_blocking=True).split(sizes)
    return [
        given if tensor is None else _as(part, tensor)
        for given, tensor, part in zip(tensors, own, there, strict=True)
    ]


def _staging(size: int, device: torch.device) -> Tensor:
    """Bytes of the host that can be copied to the device without waiting."""
    pinned = device.type == "cuda"
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _as(part: Tensor, like: Tensor) -> Tensor:
    """The first bytes of ``part`` in the dtype and shape of a tensor."""
    return part[: like.nbytes].view(like.dtype).view(like.shape)
