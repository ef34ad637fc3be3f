"""backend="triton" for tensors on the CPU: launches of the interpreter, cut by small tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fastrnn.choosing import backends
from fastrnn_kernels import lstm_backward as backward_module
from fastrnn_kernels import lstm_forward as forward_module
from fastrnn_kernels.tiling import Tile, ceil_div
from tests.interpreter import RoundRobin, Schedule, cooperative


def small_tile(residency: str, S: int, H: int) -> Tile:
    """Far smaller than a GPU's, so that small layers have several programs and batch tiles."""
    if residency == "whole":
        BLOCK = 1 << max(0, H - 1).bit_length()
        return Tile("whole", 2, BLOCK, BLOCK, 1, min(2, ceil_div(S, 2)))
    return Tile(residency, 2, 4, 4, ceil_div(H, 4), min(2, ceil_div(S, 2)))


@contextlib.contextmanager
def on_kernels(residency: str = "split", schedule: Schedule | None = None) -> Iterator[mock.Mock]:
    """Kernels for tensors on the CPU. Yields what counts the launches, called with S, H, ..."""

    def choose(S: int, H: int, *_: object) -> Tile:
        return small_tile(residency, S, H)

    launches = mock.Mock(wraps=choose)
    with (
        mock.patch.object(backends, "_device_reason", lambda *_: None),
        mock.patch.object(forward_module, "forward_tile", launches),
        mock.patch.object(backward_module, "backward_tile", launches),
        cooperative(schedule or RoundRobin()),
    ):
        yield launches
