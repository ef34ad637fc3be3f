"""On which GPUs the kernels may run: those that the offline gate compiles for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastrnn.choosing import backends
from fastrnn_kernels import tiling

ADMITTED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942")


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU of this architecture, with few multiprocessors."""
    name = request.param
    found = SimpleNamespace(multi_processor_count=24, warp_size=32, shared_memory_per_block=65_536)
    if name.startswith("gfx"):
        monkeypatch.setattr(torch.version, "hip", "7.0")
        found.gcnArchName, found.warp_size = f"{name}:sramecc+", 64
    else:
        found.major, found.minor = divmod(int(name.removeprefix("sm_")), 10)
        found.shared_memory_per_block_optin = 101_376
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    for cached in (backends._device_reason, backends._tile_reason, tiling._chip_of_gpu):
        cached.cache_clear()
    yield name
    for cached in (backends._device_reason, backends._tile_reason, tiling._chip_of_gpu):
        cached.cache_clear()


@pytest.mark.parametrize("gpu", ADMITTED, indirect=True)
def test_a_chip_that_is_examined_is_admitted(gpu: str) -> None:
    assert backends.can_run_triton("cuda:0", torch.bfloat16, 128) is None
    chip = tiling.Chip.of(torch.device("cuda", 0))
    assert (chip.architecture, chip.multiprocessors) == (gpu, 24)
    assert chip.warp_size == (64 if gpu.startswith("gfx") else 32)


@pytest.mark.parametrize("gpu", ["sm_75", "sm_87", "sm_110", "gfx1100", "gfx950"], indirect=True)
def test_another_is_refused_with_those_that_are(gpu: str) -> None:
    reason = backends.can_run_triton("cuda:0", torch.bfloat16, 128)
    assert reason is not None
    assert f"this is {gpu}" in reason and "sm_90" in reason


@pytest.mark.parametrize("gpu", ["sm_86"], indirect=True)
def test_a_layer_too_wide_for_few_multiprocessors_is_refused(gpu: str) -> None:
    reason = backends.can_run_triton("cuda:0", torch.bfloat16, 4096)
    assert reason is not None and "at most 24 programs are resident" in reason
