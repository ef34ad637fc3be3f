"""The rule finds a tile that fits, for any size, or says why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from fastrnn_kernels import tiling
from fastrnn_kernels.tiling import (
    CHIPS,
    Chip,
    Tile,
    backward_tile,
    ceil_div,
    fitting_tiles,
    forward_tile,
    shared_memory,
    tensor_memory,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where 2048 units of each direction are too many for the multiprocessors.
WIDEST = {("sm_121", 2): 1536}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@given(
    S=st.integers(1, 5000),
    H=st.integers(1, 2048),
    D=st.sampled_from([1, 2]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_size_has_a_tile_that_fits(chip, S: int, H: int, D: int, dtype: torch.dtype) -> None:
    H = min(H, WIDEST.get((chip.architecture, D), 2048))
    for which, choose in (("forward", forward_tile), ("backward", backward_tile)):
        tile = choose(S, H, D, dtype, chip)
        tile.check(S, H)
        assert tile.unit_programs * tile.batch_programs * D <= chip.multiprocessors or (
            tile.residency == "whole"
        )
        assert shared_memory(tile, which, H, dtype.itemsize) <= chip.shared_memory
        if chip.tensor_memory is not None:
            assert tensor_memory(tile, which, H) <= chip.tensor_memory
        assert tile.padded(H) >= tile.unit_programs * tile.BLOCK_H
        assert tile.BLOCK_K // tile.groups >= 16


@pytest.mark.parametrize(
    ("H", "residency"),
    [(64, "whole"), (128, "whole"), (512, "split"), (1024, "split"), (2048, "streamed")],
)
def test_residency_in_16_bits_on_hopper(H: int, residency: str) -> None:
    for choose in (forward_tile, backward_tile):
        assert choose(16, H, 1, torch.bfloat16, CHIPS["sm_90"]).residency == residency


@pytest.mark.parametrize(("H", "rows"), [(1024, 64), (1056, 32)])
def test_products_of_64_rows_have_room_in_blackwells_tensor_memory(H: int, rows: int) -> None:
    """Triton refuses to launch what has not; Hopper has no such memory."""
    blackwell, hopper = (
        max(
            tile.BLOCK_B
            for tile in fitting_tiles("backward", 64, H, 1, 2, CHIPS[chip])
            if tile.residency == "split"
        )
        for chip in ("sm_100", "sm_90")
    )
    assert (blackwell, hopper) == (rows, 64)


def test_whole_tiles_need_no_cooperative_launch() -> None:
    whole = forward_tile(16, 64, 1, torch.bfloat16, CHIPS["sm_90"])
    split = forward_tile(16, 512, 1, torch.bfloat16, CHIPS["sm_90"])
    assert not whole.options()["launch_cooperative_grid"]
    assert split.options()["launch_cooperative_grid"]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@pytest.mark.parametrize("D", [1, 2], ids=["D1", "D2"])
def test_up_to_which_hidden_size_float32_has_tiles(chip, D: int) -> None:
    """A layer wider than that is refused with the reason, and torch computes it."""
    widest = WIDEST.get((chip.architecture, D), 2048)
    for choose in (forward_tile, backward_tile):
        assert choose(64, widest, D, torch.float32, chip)
    if widest < 2048:
        with pytest.raises(ValueError, match=f"at most {chip.multiprocessors} programs"):
            forward_tile(64, widest + 8, D, torch.float32, chip)


def test_a_grid_that_cannot_be_resident_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="at most 108 programs are resident"):
        forward_tile(16, 200_000, 2, torch.float32, CHIPS["sm_80"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_programs": 3}, "unit_programs must be"),
        ({"residency": "whole"}, "residency 'whole' needs"),
        ({"groups": 3}, "multiple of groups"),
        ({"batch_programs": 9}, "batch_programs must be"),
        ({"in_flight": 0}, "in_flight must be"),
    ],
)
def test_a_tile_that_does_not_cover_is_refused(change: dict[str, object], message: str) -> None:
    tile = Tile("split", 16, 16, 64, ceil_div(100, 16), 2)
    tile.check(32, 100)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tile, **change).check(32, 100)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """An H100."""
    monkeypatch.setattr(tiling, "_chip_of_gpu", lambda index: CHIPS["sm_90"])
    yield torch.device("cuda", 0)
    fastrnn.limit_multiprocessors(None)


def test_launches_keep_within_the_multiprocessors_that_are_free(gpu: torch.device) -> None:
    assert Chip.of(gpu) == CHIPS["sm_90"]
    fastrnn.limit_multiprocessors(20)
    assert Chip.of(gpu).multiprocessors == 20
    tile = forward_tile(64, 256, 1, torch.bfloat16, Chip.of(gpu))
    assert math.prod(tile.grid(1)) <= 20
    fastrnn.limit_multiprocessors(1000)
    assert Chip.of(gpu) == CHIPS["sm_90"]


def test_a_measured_tile_does_not_outlive_a_limit(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrnn_kernels import tile_store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    tile_store.forget()
    shape = (64, 1024, 1, torch.bfloat16)
    shape_class = tile_store.ShapeClass.of("forward", *shape, gpu, "tf32")
    tile = forward_tile(*shape, Chip.of(gpu))
    tile_store.save_tiles({shape_class: (tile, 1.0)})
    assert tile_store.stored_tile("forward", *shape, gpu, "tf32") == tile
    fastrnn.limit_multiprocessors(20)
    assert tile_store.stored_tile("forward", *shape, gpu, "tf32") is None
    tile_store.forget()


@pytest.mark.parametrize("n", [0, -3])
def test_a_limit_is_positive(n: int) -> None:
    with pytest.raises(ValueError, match=f"positive number of multiprocessors or None, got {n}"):
        fastrnn.limit_multiprocessors(n)
