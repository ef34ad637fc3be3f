"""Data-parallel recipes: real processes, and the losses of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrnn.recipes.charlm_data import PLAYS
from fastrnn.recipes.command_line import main
from fastrnn.recipes.distributed import World
from fastrnn.recipes.g2p_data import DICTIONARY
from fastrnn.recipes.gaps_data import RECORD
from fastrnn.recipes.text_files import SHIPPED, read_text
from tests.recipe_runs import checkpoint

PROGRAM = """
import sys, torch
from fastrnn.recipes.command_line import main
from fastrnn.recipes.distributed import join_world
with join_world() as world:
    assert (world.size, world.leads) == (2, world.rank == 0)
    for line in open(sys.argv[1]):
        assert main(line.split()) == 0
"""


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, str]:
    """Options of small runs, each with a batch that does not divide evenly."""
    utterances = read_text(SHIPPED / "vowels_train.txt.xz").split("speaker ")[1:]
    for part in ("train", "test"):
        # Four batches of three, and one of one: a process without a row of its own.
        text = "speaker ".join(["", *utterances[::21][:13]])
        (tmp_path / f"vowels_{part}.txt").write_text(text)
    (tmp_path / "text.txt").write_text(read_text(PLAYS)[:3000])
    words = read_text(DICTIONARY).splitlines()[::1500]
    (tmp_path / "some.dict").write_text("\n".join(words))
    (tmp_path / "record.csv").write_text("\n".join(read_text(RECORD).splitlines()[:401]))
    return {
        "vowels": f"--data {tmp_path} --hidden 4 --batch-size 3 --epochs 2 --compare",
        "charlm": f"--data {tmp_path}/text.txt --hidden 4 --batch-size 5 --chunk 60 --epochs 2",
        "gaps": f"--data {tmp_path}/record.csv --hidden 4 --batch-size 3 --window 40 --epochs 2",
        "g2p": f"--data {tmp_path}/some.dict --hidden 4 --batch-size 11 --words 40 --epochs 2"
        " --half 3 --beam 1",
    }


@pytest.mark.timeout(300)
def test_two_processes_have_the_losses_of_one(recipes: dict[str, str], tmp_path: Path) -> None:
    program, lines = tmp_path / "program.py", tmp_path / "lines.txt"
    program.write_text(PROGRAM)
    runs = [f"{name} {given} --out {tmp_path}/two/{name}" for name, given in recipes.items()]
    resumed = f"vowels --resume --epochs 2 --out {tmp_path}/two/vowels"
    lines.write_text("\n".join([runs[0] + " --epochs 1", resumed, *runs[1:]]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", str(program), str(lines)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f".{os.pathsep}kernels"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for name, options in recipes.items():
        printed = f"\n{done.stdout}".count(f"\n{name}  ")
        assert printed == (2 if name == "vowels" else 1)  # by one process
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert main([name, *options.split(), "--out", str(one)]) == 0
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        for alone, together in zip(checkpoint(one)["sides"], checkpoint(two)["sides"], strict=True):
            for key in ("losses", "norms"):
                assert together[key] == pytest.approx(alone[key], rel=2e-4, abs=1e-6), name
        first, second = (checkpoint(out)["sides"][0]["losses"] for out in (one, two))
        assert abs(first[0] - second[0]) < 1e-6  # of the same weights and the same batch


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_shares_make_up_the_mean_over_the_batch(rows: int, size: int) -> None:
    values, valid = torch.rand(rows), torch.randint(0, 4, (rows,))
    valid[0] = 2
    means = [0.0, 0.0]
    seen: list[int] = []
    for rank in range(size):
        world = World(rank, size)
        mine, weight = world.share(rows)
        assert len(values[mine]) >= 1
        seen += range(rows)[mine] if weight else []
        means[0] += weight * float(values[mine].mean()) / size
        mine, weight = world.share(rows, valid)
        counts = valid[mine]
        local = (values[mine] * counts).sum() / counts.sum().clamp(min=1)
        means[1] += weight * float(local) / size
    assert seen == list(range(rows))
    assert means[0] == pytest.approx(float(values.mean()))
    assert means[1] == pytest.approx(float((values * valid).sum() / valid.sum()))


def test_one_process_without_torchrun_leads_and_has_the_whole_batch() -> None:
    world = World()
    module = torch.nn.Linear(1, 1)
    assert world.leads
    assert world.replicate(module) is module
    assert world.share(5) == (slice(0, 5), 1.0)
    values = torch.ones(2)
    assert world.mean(values) is values
