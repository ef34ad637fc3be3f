"""Measured tiles on disk: found again where they hold, ignored with a reason where they do not."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fastrnn_kernels import tile_store
from fastrnn_kernels.tile_store import (
    ShapeClass,
    class_of_batch,
    save_tiles,
    store_path,
    stored_tile,
)
from fastrnn_kernels.tiling import Tile

CPU = torch.device("cpu")
SHAPE = (40, 100, 1, torch.bfloat16)
TILE = Tile("split", BLOCK_B=16, BLOCK_H=16, BLOCK_K=64, unit_programs=7, batch_programs=3)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile_store.forget()
    yield store_path()
    tile_store.forget()


def found(which: str = "forward", shape: tuple = SHAPE, precision: str = "tf32") -> Tile | None:
    return stored_tile(which, *shape, CPU, precision)


def save(tile: Tile = TILE, which: str = "forward", precision: str = "tf32") -> None:
    save_tiles({ShapeClass.of(which, *SHAPE, CPU, precision): (tile, 12.5)})


def test_nothing_is_stored_at_first() -> None:
    assert found() is None


def test_what_was_saved_is_found_by_this_process_and_the_next(own_store: Path) -> None:
    save()
    assert found() == TILE
    tile_store.forget()
    assert found() == TILE
    content = json.loads(own_store.read_text())
    assert content["version"] == tile_store.version()
    assert [*content["tiles"]] == ["cpu/forward/H100/D1/bfloat16/tf32/S64"]
    assert content["tiles"]["cpu/forward/H100/D1/bfloat16/tf32/S64"]["microseconds"] == 12.5


@pytest.mark.parametrize(
    ("S", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1000, 1024)]
)
def test_sequences_count_in_steps(S: int, expected: int) -> None:
    assert class_of_batch(S) == expected


def test_batch_programs_follow_the_number_of_sequences() -> None:
    save()
    other = found(shape=(64, *SHAPE[1:]))
    assert other == replace(TILE, batch_programs=4)
    other.check(64, 100)


@pytest.mark.parametrize(
    "shape",
    [
        (200, *SHAPE[1:]),
        (40, 101, *SHAPE[2:]),
        (40, 100, 2, torch.bfloat16),
        (40, 100, 1, torch.float16),
    ],
    ids=["S", "H", "D", "dtype"],
)
def test_another_class_has_no_tile_of_it(shape: tuple) -> None:
    save()
    assert found(shape=shape) is None


def test_passes_and_precisions_are_apart() -> None:
    save()
    assert found("backward") is None
    shape = (*SHAPE[:3], torch.float32)
    save_tiles({ShapeClass.of("forward", *shape, CPU, "tf32"): (TILE, 1.0)})
    assert found(shape=shape, precision="tf32") == TILE
    assert found(shape=shape, precision="tf32x3") is None


def test_16_bits_have_one_precision() -> None:
    save(precision="tf32x3")
    assert found(precision="tf32") == TILE


def test_saving_keeps_what_others_saved(own_store: Path) -> None:
    save()
    content = json.loads(own_store.read_text())  # as another process would, meanwhile
    key = ShapeClass.of("backward", *SHAPE, CPU, "tf32").key
    content["tiles"][key] = {"tile": asdict(TILE), "microseconds": 1.0}
    own_store.write_text(json.dumps(content))
    save(replace(TILE, num_warps=8))
    assert found().num_warps == 8
    assert found("backward") == TILE
    assert [file.name for file in own_store.parent.iterdir()] == [own_store.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"tiles": {}}',
        '{"version": "3.0.0-of-other-kernels", "tiles": {}}',
        '{"version": VERSION, "tiles": []}',
        '{"version": VERSION, "tiles": {"KEY": {"microseconds": 1}}}',
        '{"version": VERSION, "tiles": {"KEY": {"tile": {"BLOCK_B": 16}}}}',
    ],
    ids=["empty", "cut-off", "list", "unversioned", "foreign", "no-tiles", "no-tile", "fields"],
)
def test_a_file_that_is_not_a_store_is_ignored_and_named(
    text: str, own_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_store.parent.mkdir()
    own_store.write_text(text.replace("VERSION", json.dumps(tile_store.version())))
    with caplog.at_level(logging.WARNING, "fastrnn"):
        assert found() is None
    assert str(own_store) in caplog.text
    assert "ignored" in caplog.text
    save()  # and is written over
    assert found() == TILE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"residency": "elsewhere"}, "residency cannot be 'elsewhere'"),
        ({"BLOCK_B": "16"}, "BLOCK_B cannot be '16'"),
        ({"num_warps": 0}, "num_warps cannot be 0"),
        ({"groups": True}, "groups cannot be True"),
        ({"BLOCK_K": None}, "BLOCK_K cannot be None"),
    ],
)
def test_a_value_that_no_tile_has_is_named(
    change: dict[str, object],
    reason: str,
    own_store: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save()
    content = json.loads(own_store.read_text())
    for entry in content["tiles"].values():
        entry["tile"] |= change
    own_store.write_text(json.dumps(content))
    tile_store.forget()
    assert found() is None
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (replace(TILE, unit_programs=6), "unit_programs must be 7"),
        (replace(TILE, BLOCK_H=128, BLOCK_K=128, unit_programs=1, BLOCK_B=512), "shared memory"),
    ],
)
def test_a_tile_that_does_not_fit_is_ignored_and_named(
    tile: Tile, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tile)
    assert found() is None
    assert reason in caplog.text
    assert "cpu/forward/H100" in caplog.text


def test_more_programs_than_multiprocessors_are_ignored_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = (16, 4000, 1, torch.bfloat16)
    tile = replace(TILE, unit_programs=250, batch_programs=1)
    save_tiles({ShapeClass.of("forward", *shape, CPU, "tf32"): (tile, 1.0)})
    assert found(shape=shape) is None
    assert "at most 132 programs are resident" in caplog.text


def test_a_store_that_cannot_be_written_serves_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tile_store.forget()
    save()
    assert found() == TILE
    assert "not kept beyond this process" in caplog.text


def test_an_interrupted_write_leaves_the_old_file(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    before = own_store.read_text()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(replace(TILE, num_warps=8))
    assert own_store.read_text() == before
    assert [file.name for file in own_store.parent.iterdir()] == [own_store.name]


def test_the_store_is_of_these_kernels_and_this_triton(own_store: Path) -> None:
    import triton

    assert tile_store.version().startswith(f"{triton.__version__}-")
    for name in tile_store.SOURCES:
        assert (Path(tile_store.__file__).parent / name).is_file()
    assert own_store.name == f"tiles-{tile_store.version()}.json"


def test_a_tile_is_stored_with_all_that_it_is(own_store: Path) -> None:
    tile = replace(TILE, num_warps=8, groups=4, in_flight=1, max_registers=None)
    save(tile)
    assert json.loads(own_store.read_text())["tiles"].popitem()[1]["tile"] == asdict(tile)
    assert found() == tile
