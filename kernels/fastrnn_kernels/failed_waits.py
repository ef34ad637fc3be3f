"""What kernels tell the host about waits that they gave up (see grid_barrier.py).

Each GPU has one word in pinned host memory, which its kernels can write and the host can read
without waiting for the device or asking it. The host looks at it before every launch.

Limits: a failure is seen at the first launch after it, not before. The word stays set, so that what
is queued already ends soon too; no kernel with a barrier is launched there again by this process.
"""

from __future__ import annotations

import ctypes

import torch


class BarrierTimeout(RuntimeError):
    """A kernel has given up waiting for its other programs; what it computed is worthless."""


class FailedWaits:
    """The word of one device.

    Attributes:
        word: int32 ``[1]`` that kernels set to 1, pinned where the device is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        word = torch.zeros(1, dtype=torch.int32)
        self.word = word.pin_memory() if device.type == "cuda" else word
        self._value = ctypes.c_int32.from_address(self.word.data_ptr())
        self._device = device
        self._reported = False

    def reason(self) -> str | None:
        """Why no kernel may wait on this device any more; None as long as one may.

        Raises:
            BarrierTimeout: a wait has failed, and this is the first time that somebody asks.
        """
        if not self._value.value:
            return None
        what = f"a kernel of fastrnn on {self._device} gave up waiting for its other programs"
        if not self._reported:
            self._reported = True
            raise BarrierTimeout(
                f"{what}. Everything computed since the last call that this follows is worthless: "
                "go back to a checkpoint. This process launches no such kernel there again; "
                'FASTRNN_BACKEND=torch, or backend="torch", does without from the start. Please '
                "report it, with the output of `python -m fastrnn info`"
            )
        return what


_of_device: dict[torch.device, FailedWaits] = {}


def failed_waits(device: torch.device) -> FailedWaits:
    """What is known of the waits on a device."""
    found = _of_device.get(device)
    if found is None:
        found = _of_device[device] = FailedWaits(device)
    return found
