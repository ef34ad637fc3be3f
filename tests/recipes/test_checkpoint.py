"""Checkpoint: whole or not at all, and only what this recipe wrote."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from fastrnn.recipes.checkpoint import Checkpoint
from fastrnn.recipes.distributed import World
from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.vowels import Settings


def test_random_state_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint("vowels", tmp_path)
    checkpoint.save(Settings(), 1, {})
    drawn = torch.rand(3)
    _, state = checkpoint.load(Settings())
    checkpoint.restore_random(state)
    assert torch.equal(torch.rand(3), drawn)


def test_one_rank_writes_and_all_know_the_epoch(tmp_path: Path) -> None:
    other = Checkpoint("vowels", tmp_path, World(rank=1, size=2))
    other.save(Settings(), 3, {})
    assert not list(tmp_path.iterdir())
    assert other.epoch == 3
    Checkpoint("vowels", tmp_path, World(rank=0, size=2)).save(Settings(), 3, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint("vowels", tmp_path)
    checkpoint.save(Settings(), 1, {})
    before = checkpoint.path.read_bytes()

    def full(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RecipeError, match="No space left on device"):
        checkpoint.save(Settings(), 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.path.read_bytes() == before
    assert checkpoint.epoch == 1


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write .*out"):
        Checkpoint("vowels", tmp_path / "out").make_directory()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a checkpoint"),
        (b"nonsense", "is not a checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "is not a checkpoint"),
    ],
    ids=["empty", "nonsense", "pickle"],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        Checkpoint("vowels", tmp_path).load(Settings())


@pytest.mark.parametrize("state", [{}, [1], torch.zeros(2)], ids=["dict", "list", "tensor"])
def test_torch_file_that_is_no_checkpoint_is_refused(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(RecipeError, match="is not a checkpoint of `python -m fastrnn vowels`"):
        Checkpoint("vowels", tmp_path).load(Settings())


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint("vowels", tmp_path)
    checkpoint.save(Settings(), 1, {"weights": torch.randn(1000)})
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-500])
    with pytest.raises(RecipeError, match="is not a checkpoint"):
        checkpoint.load(Settings())


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    Checkpoint("others", tmp_path).save(Settings(), 1, {})
    with pytest.raises(RecipeError, match="of recipe others, not format 1 of vowels"):
        Checkpoint("vowels", tmp_path).load(Settings())


def test_settings_of_another_version_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint("vowels", tmp_path)
    checkpoint.save(Settings(), 1, {})
    state = torch.load(checkpoint.path, weights_only=True)
    del state["settings"]["noise"]
    torch.save(state, checkpoint.path)
    with pytest.raises(RecipeError, match="written by another version"):
        checkpoint.load(Settings())


def test_interrupt_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(RecipeError, match="before the first checkpoint") as left,
        Checkpoint("vowels", tmp_path).kept_on_interrupt(),
    ):
        raise KeyboardInterrupt
    assert left.value.status == 130
