"""The offline gate: the kernels pass it, and its rules can fail.

It compiles, which the interpreter's environment would prevent: each run is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import fastrnn_kernels
from fastrnn.ways.widening import UNITS, wide_hidden_size
from fastrnn_kernels.offline import (
    BATCH_SIZES,
    DTYPES,
    HIDDEN_SIZES,
    QUICK_CHIPS,
    QUICK_HIDDEN_SIZES,
    TARGETS,
    Case,
    cases,
    difference,
    kind_of,
    kinds,
    part_of,
    quick,
)

PACKAGE = Path(fastrnn_kernels.__file__).parent
SNAPSHOT = PACKAGE.parent / "offline.txt"
WAIT = "                wait(tile_arrivals_ptr, (iteration + 1) * tl.num_programs(0), failed_ptr)\n"
BLOCKS = (
    "                blocks_ptr = exchange_tile_ptr + (iteration % 2) * copy_size + block_offsets\n"
)
BROKEN = {
    "relaxed wait": (
        "grid_barrier.py",
        'sem="acquire"',
        'sem="relaxed"',
        "the wait is not an acquire",
    ),
    "relaxed arrival": (
        "grid_barrier.py",
        'sem="release"',
        'sem="relaxed"',
        "the arrival is not a release",
    ),
    "scope of a block": ("grid_barrier.py", 'scope="gpu"', 'scope="cta"', "at GPU scope"),
    "exchange loaded before the wait": (
        "lstm_forward.py",
        f"{WAIT}{BLOCKS}",
        f"{BLOCKS}"
        "                early = tl.load(blocks_ptr).to(tl.float32)\n"
        "                gates += tl.sum(early, axis=1)[:, None]\n"
        f"{WAIT}",
        "the exchange is read between arrival and wait",
    ),
    "h published after the arrival": (
        "lstm_forward.py",
        "                tl.store(copy_ptr + publish_offsets, h)\n"
        "                count_arrival(tile_arrivals_ptr)\n",
        "                count_arrival(tile_arrivals_ptr)\n"
        "                tl.store(copy_ptr + publish_offsets, h)\n",
        "the exchange is written after the arrival",
    ),
    "W read in the loop": (
        "lstm_forward.py",
        "weight[k], gates,",
        "load_forward_weight(weight_ptr, first_unit, k * BLOCK_K, H, WEIGHT_STRIDE, "
        "BLOCK_H, BLOCK_K, GROUPS), gates,",
        "W_hh is read inside the loop",
    ),
    "W hoisted descriptors": (
        "lstm_backward.py",
        "disable_licm=True",
        "disable_licm=False",
        "spills",
    ),
}
CASE = """
import sys
from fastrnn_kernels import offline
from fastrnn_kernels.tiling import Tile
kernel = sys.argv[1]
tile = Tile("split", 64, 16, 64, 32, 1, 4, 1, 2)
report = offline.examine(offline.Case("sm_90", kernel, "bf16", 512, 1, tile, "tf32"))
print(report.line)
"""


def run(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_representative_part_passes_and_is_as_it_was() -> None:
    """After a change that is meant: `python -m fastrnn_kernels.offline --quick --snapshot FILE`."""
    command = ("-m", "fastrnn_kernels.offline", "--quick", "--jobs", "2", "--check", str(SNAPSHOT))
    done = run(PACKAGE.parent, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_that_differs_from_the_snapshot_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = f"triton {triton.__version__}"
    snapshot, lines = tmp_path / "snapshot.txt", SNAPSHOT.read_text().splitlines()[1:]
    snapshot.write_text("\n".join([version, *lines, ""]))
    hopper = [line for line in lines if line.startswith("sm_90")]
    assert difference(snapshot, hopper, part_of(["sm_90"], ["bf16", "fp32"])) == []
    changed = [hopper[0].replace("spill 0", "spill 8"), *hopper[1:]]
    _, _, _, *found = difference(snapshot, changed, part_of(["sm_90"], ["bf16", "fp32"]))
    assert found == [f"-{hopper[0]}", f"+{changed[0]}"]
    assert len(difference(snapshot, hopper[1:], part_of(["sm_90"], ["bf16", "fp32"]))) == 4
    assert capsys.readouterr().out == ""

    snapshot.write_text("\n".join(["triton 1.0", *lines, ""]))
    assert difference(snapshot, changed, part_of(["sm_90"], ["bf16", "fp32"])) == []
    assert "is of triton 1.0" in capsys.readouterr().out


def test_the_grid_s_kinds_are_a_part_of_it_with_every_residency() -> None:
    grid = cases(TARGETS, HIDDEN_SIZES, BATCH_SIZES, DTYPES)
    chosen = kinds(TARGETS, DTYPES)
    assert set(chosen) <= set(grid)
    assert len(chosen) < len(grid) // 3

    def found(some: list[Case]) -> set[tuple[str, ...]]:
        return {(case.chip, case.which, case.tile.residency, case.input_precision) for case in some}

    assert found(chosen) == found(grid)
    assert {(case.chip, case.which) for case in quick(QUICK_CHIPS)} == {
        (chip, which) for chip in QUICK_CHIPS for which in ("forward", "backward")
    }


@pytest.mark.slow
def test_the_grid_has_every_kind_that_the_rule_chooses_for_a_layer() -> None:
    """A kind that is missing is named with the hidden sizes that have it: add one of them."""
    assert all(size == wide_hidden_size(size) for size in HIDDEN_SIZES)
    assert all(wide_hidden_size(H) == H for sizes in QUICK_HIDDEN_SIZES.values() for H in sizes)
    sizes_of: dict[tuple[object, ...], list[int]] = {}
    for case in cases(TARGETS, range(UNITS, 2048 + 1, UNITS), BATCH_SIZES, ("bf16", "fp32")):
        sizes_of.setdefault(kind_of(case), []).append(case.H)
    grid = {kind_of(case) for case in cases(TARGETS, HIDDEN_SIZES, BATCH_SIZES, ("bf16", "fp32"))}
    missing = {kind: sizes for kind, sizes in sizes_of.items() if kind not in grid}
    assert not missing
    assert grid == set(sizes_of)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_case_that_is_broken_below_passes(which: str) -> None:
    done = run(PACKAGE.parent, "-c", CASE, which)
    assert done.stdout.strip().endswith(" ok"), done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", BROKEN, ids=lambda name: name.replace(" ", "-"))
def test_rule_fails_where_it_should(name: str, tmp_path: Path) -> None:
    file, old, new, fault = BROKEN[name]
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    path = tmp_path / PACKAGE.name / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    done = run(tmp_path, "-c", CASE, "backward" if "backward" in file else "forward")
    assert fault in done.stdout, done.stdout + done.stderr
