"""Trust on a GPU: every kind of kernel passes its check, and a lost arrival ends in an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastrnn
from fastrnn.check import check_kernels
from tests.kernels.mutants import mutated

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def own_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fastrnn_kernels import trust

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTRNN_CHECK", "first")
    trust.forget()
    yield
    trust.forget()


def test_every_kind_of_kernel_passes_its_check() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    failed = [str(result) for result in check_kernels(device, (64, 256)) if result.reason]
    assert not failed


def test_a_lost_arrival_ends_in_an_error_and_not_in_a_hang() -> None:
    import triton.language as tl

    from fastrnn_kernels.tiling import Chip, forward_tile

    S, H, T = 16, 256, 4
    device = torch.device("cuda", torch.cuda.current_device())
    tile = forward_tile(S, H, 1, torch.bfloat16, Chip.of(device))
    assert tile.residency != "whole"
    sizes = torch.full((T,), S, device=device)
    zeros = torch.zeros(1, S, H, device=device, dtype=torch.bfloat16)
    gates_x = torch.zeros(S * T, 1, 4 * H, device=device, dtype=torch.bfloat16)
    weight_hh = torch.zeros(1, 4 * H, H, device=device, dtype=torch.bfloat16)
    steps = (sizes, sizes.cumsum(0) - sizes)
    lost = ("grid_barrier.py", "arrivals_ptr, 1,", "arrivals_ptr, 0,", 1, "lstm_forward")
    with mutated(*lost) as module:
        package = module.__package__
        barrier = sys.modules[f"{package}.grid_barrier"]
        with mock.patch.object(barrier, "MOST_POLLS", tl.constexpr(2**16)):

            def launch() -> None:
                inputs = (gates_x, weight_hh, zeros, zeros, *steps)
                module.lstm_forward(*inputs, save="nothing", tile=tile)
                torch.cuda.synchronize()

            launch()
            with pytest.raises(sys.modules[f"{package}.failed_waits"].BarrierTimeout):
                launch()
            with pytest.raises(sys.modules[f"{package}.launch"].CannotLaunch):
                launch()


def test_an_unknown_kernel_is_an_error_while_a_graph_is_captured() -> None:
    from fastrnn_kernels.trust import NotChecked

    lstm = fastrnn.LSTM(8, 64, backend="triton").to("cuda")
    x = torch.zeros(12, 4, 8, device="cuda")
    with (
        torch.no_grad(),
        pytest.raises(NotChecked, match="call the same once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        lstm(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        expected = lstm(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = lstm(x)[0]
    graph.replay()
    assert torch.equal(found, expected)
