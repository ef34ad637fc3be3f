"""What a step takes of a GPU besides time: peak memory and kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Memory that torch's allocator holds at the peak of ``run``, beyond what it held before.

    Workspaces that libraries keep for themselves are left out; cuDNN's are torch's.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that ``run`` starts; None where the profiler sees none: the driver may bar it.

    Copies and fills by the copy engine are no kernels.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    return count_kernels(profile.events()) or None


def count_kernels(events: Iterable[Any]) -> int:
    """The profiler's events that are kernels on a GPU."""
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )
