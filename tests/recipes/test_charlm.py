"""The recipe `charlm`, from its command line to its files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastrnn.recipes import charlm
from fastrnn.recipes.charlm_data import PLAYS, cut_streams, load_text
from fastrnn.recipes.command_line import main
from fastrnn.recipes.text_files import read_text
from tests.recipe_runs import checkpoint, flat


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 6,000 characters of the plays."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(read_text(PLAYS)[:6000])
    return path


@pytest.fixture
def small(data: Path) -> list[str]:
    """A command line for a run of less than a second, but for --out."""
    options = "--hidden 8 --batch-size 6 --chunk 50 --epochs 3 --sample 20"
    return ["charlm", "--data", str(data), *options.split()]


def test_loss_falls_on_the_real_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(read_text(PLAYS)[:30_000])
    options = "--hidden 48 --chunk 32 --epochs 2 --lr 0.01 --sample 50"
    assert main(["charlm", "--data", str(text), "--out", str(tmp_path), *options.split()]) == 0
    losses = checkpoint(tmp_path)["sides"][0]["losses"]
    assert len(losses) == 2 * 53
    assert losses[0] == pytest.approx(math.log(58), abs=0.3)  # it knows nothing
    assert sum(losses[-20:]) / 20 < 2.9  # 3.3: it knows how frequent each character is
    out = " ".join(capsys.readouterr().out.split())
    assert "27,000 characters to learn from, 3,000 to be told by, 58 different ones" in out
    assert "bits per character on the test text" in out


@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["alone", "compare"])
def test_resumed_run_equals_the_uninterrupted_one(
    small: list[str], tmp_path: Path, compare: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, *compare, "--out", str(whole)]) == 0
    assert main([*small, *compare, "--out", str(parts), "--epochs", "1"]) == 0
    torch.manual_seed(99)  # whatever the process drew in the meantime
    assert main(["charlm", "--resume", "--out", str(parts), "--epochs", "3"]) == 0
    assert flat(checkpoint(whole)) == flat(checkpoint(parts))


def test_compare_trains_both_sides_alike(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--out", str(tmp_path), "--compare"]) == 0
    ours, theirs = checkpoint(tmp_path)["sides"]
    assert (ours["name"], theirs["name"]) == ("fastrnn", "nn.LSTM")
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert "bits per character" in capsys.readouterr().out


def test_same_seed_same_text(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for out in ("a", "b"):
        assert main([*small, "--out", str(tmp_path / out)]) == 0
        written.append(capsys.readouterr().out.split("─" * 20)[1])
    assert written[0] == written[1]
    assert len(written[0].strip("\n")) <= 20


def test_bits_per_character_carry_the_state_through_the_text() -> None:
    torch.manual_seed(0)
    model = charlm.CharacterModel(torch.nn.LSTM, 5, 4)
    text = torch.randint(5, (700,))
    x, y = cut_streams(text, 2)
    with torch.no_grad():
        scores, _ = model(x)  # in one go: each stream is longer than a chunk
    nats = torch.nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
    bits = charlm.bits_per_character(model, text, torch.device("cpu"), streams=2)
    assert bits == pytest.approx(float(nats) / math.log(2), rel=1e-5)


def test_streams_read_on_where_the_one_before_ends() -> None:
    x, y = cut_streams(torch.arange(23), 3, skip=1)
    assert x.tolist() == [[*range(1, 8)], [*range(8, 15)], [*range(15, 22)]]
    assert torch.equal(y, x + 1)


def test_shipped_text_is_the_published_one() -> None:
    text = load_text()
    assert text.digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (len(text.train), len(text.test)) == (1_003_854, 111_540)
    assert len(text.characters) == 65
    assert text.spell(text.train[:14]) == "First Citizen:"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("a" * 999, "", "text.txt: expected a text of at least 1,000 characters, got 999"),
        ("ab" * 600, "", "at least 2,048 characters to learn from, two chunks of 64 in each of 16"),
        (None, "", "which does not exist"),
        (b"\xff" * 2000, "", "expected text in UTF-8"),
    ],
    ids=["short", "few-chunks", "missing", "no-text"],
)
def test_bad_text(
    tmp_path: Path,
    content: str | bytes | None,
    options: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["charlm", "--data", str(path), "--out", str(out), *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()
