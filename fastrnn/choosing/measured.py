"""Which way is faster on the GPU at hand, by measurement: kept on disk, beside the tiles.

A class of calls is a GPU, the layers' sizes, dtype and precision, dense or ragged, with or without
a backward, and B and T up to the next power of two. The candidates are torch's own LSTM and the
kernels. What is timed is the call as a user makes it, host time included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch

from fastrnn.choosing.request import Request, rounded_up
from fastrnn.input.forms import Padded

if TYPE_CHECKING:
    from fastrnn_kernels.kept_store import KeptStore

CANDIDATES = ("torch", "triton")

_stores: list[Any] = []


def kept_times(asked: Request) -> dict[str, float]:
    """Microseconds of each way, where this class of calls was measured; else empty."""
    return dict(_store().findings().get(class_of(asked), {}))


def fastest(asked: Request) -> str | None:
    """The way that was measured to be the fastest; None where none was."""
    times = kept_times(asked)
    return min(times, key=times.__getitem__) if times else None


def class_of(asked: Request) -> str:
    """The key of a call's class."""
    from fastrnn.ways.fused import input_precision

    form, stack = asked.form, asked.stack
    name = torch.cuda.get_device_name(form.device) if form.device.type == "cuda" else "cpu"
    precision = input_precision() if asked.dtype == torch.float32 else "-"
    dense = isinstance(form, Padded) and not asked.ragged
    return "/".join(
        (
            name,
            f"I{asked.input_size}-H{asked.hidden_size}-L{stack.num_layers}-D{stack.directions}",
            f"{str(asked.dtype).removeprefix('torch.')}-{precision}",
            "dense" if dense else "ragged",
            "training" if asked.needs_grad else "inference",
            f"B{rounded_up(form.batch)}-T{rounded_up(form.steps)}",
        )
    )


def measure(
    asked: Request,
    run: Callable[[Request, str], object],
    *,
    rounds: int = 10,
    wait: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time the ways in turns, and keep what was found for this class of calls.

    Args:
        asked: the call.
        run: computes it by the way that is named, with a backward pass where one is needed.
        rounds: samples of each; the median counts. Default: 10.
        wait: returns when the device has done all. Default: torch's, for a GPU.
        clock: in seconds.

    Returns:
        Microseconds of each way.
    """
    wait = _waiting(asked.form.device) if wait is None else wait
    samples: dict[str, list[float]] = {way: [] for way in CANDIDATES}
    for way in CANDIDATES:  # compiles, and warms up
        run(asked, way)
    for turn in range(rounds):
        for way in CANDIDATES if turn % 2 else CANDIDATES[::-1]:
            wait()
            begin = clock()
            run(asked, way)
            wait()
            samples[way].append((clock() - begin) * 1e6)
    found = {way: median(times) for way, times in samples.items()}
    _store().add({class_of(asked): found})
    return found


def forget() -> None:
    """Reads the store anew when it is next asked for."""
    _stores.clear()


def _waiting(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        return functools.partial(torch.cuda.synchronize, device)
    return lambda: None


def _store() -> KeptStore[Mapping[str, float]]:
    """Made at first use: it needs triton, whose version is part of its name."""
    if not _stores:
        from fastrnn_kernels.kept_store import KeptStore
        from fastrnn_kernels.tile_store import SOURCES

        _stores.append(
            KeptStore(
                "ways",
                "measured ways",
                "run fastrnn.tune again",
                SOURCES,
                _from_entry,
            )
        )
    return cast("KeptStore[Mapping[str, float]]", _stores[0])


def _from_entry(entry: Any) -> dict[str, float]:
    if set(entry) != set(CANDIDATES) or not all(float(time) > 0 for time in entry.values()):
        raise ValueError(f"a measurement has microseconds of {', '.join(CANDIDATES)}")
    return {way: float(time) for way, time in entry.items()}
