"""The recipe `charlm`, from its command line to its files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn.recipes import charlm
from fastrnn.recipes.charlm_data import PLAYS, cut_streams, load_text
from fastrnn.recipes.checkpoint import Checkpoint
from fastrnn.recipes.command_line import main
from fastrnn.recipes.settings import TrainingSettings
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
    assert len(losses) == 2 * 50
    assert losses[0] == pytest.approx(math.log(58), abs=0.3)  # it knows nothing
    assert sum(losses[-20:]) / 20 < 2.9  # 3.3: it knows how frequent each character is
    out = " ".join(capsys.readouterr().out.split())
    parts = "25,500 characters to learn from, 1,500 to watch by, 3,000 to be told by"
    assert f"{parts}, 58 different ones" in out
    assert re.search(r"training \d\.\d{3}, validation \d\.\d{3} bits per character", out)
    assert "bits per character on the test text" in out


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the next run stopped, as by Ctrl-C, after its checkpoint of an epoch."""
    save = Checkpoint.save

    def arrange(last: int) -> None:
        def save_and_stop(
            self: Checkpoint, settings: TrainingSettings, epoch: int, contents: dict[str, Any]
        ) -> None:
            save(self, settings, epoch, contents)
            if epoch == last:
                monkeypatch.setattr(Checkpoint, "save", save)
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoint, "save", save_and_stop)

    return arrange


@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["alone", "compare"])
def test_resumed_run_equals_the_uninterrupted_one(
    small: list[str], tmp_path: Path, compare: list[str], stop_after: Callable[[int], None]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, *compare, "--out", str(whole)]) == 0
    stop_after(1)
    assert main([*small, *compare, "--out", str(parts)]) == 130
    assert checkpoint(parts)["epoch"] == 1
    torch.manual_seed(99)  # whatever the process drew in the meantime
    assert main(["charlm", "--resume", "--out", str(parts)]) == 0
    assert flat(checkpoint(whole)) == flat(checkpoint(parts))


def test_learning_rate_falls_to_zero_and_more_epochs_take_it_up_again(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(charlm, "set_learning_rate", lambda _, rate: rates.append(rate))
    out = ["--out", str(tmp_path)]
    assert main([*small, *out, "--lr", "0.5", "--epochs", "2"]) == 0
    steps = len(rates) // 2
    assert rates == pytest.approx([0.5 * (1 - i / (2 * steps)) for i in range(2 * steps)])
    rates.clear()
    assert main(["charlm", "--resume", *out, "--epochs", "4"]) == 0
    assert rates == pytest.approx(
        [0.5 * (1 - i / (4 * steps)) for i in range(2 * steps, 4 * steps)]
    )


def test_the_test_part_is_read_once_at_the_end(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    measure = charlm.bits_per_character

    def spy(model: torch.nn.Module, indices: torch.Tensor, device: torch.device) -> float:
        read.append(len(indices))
        return measure(model, indices, device)

    monkeypatch.setattr(charlm, "bits_per_character", spy)
    assert main([*small, "--out", str(tmp_path)]) == 0
    assert read == [300, 300, 300, 600]  # of validation after each epoch, then of the test


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


def test_dropout_keeps_the_mean_and_is_drawn_from_the_generator() -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    kept = charlm.draw_kept((40, 50, 60), 0.25, generators[0])
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.01)
    torch.manual_seed(5)
    assert torch.equal(charlm.draw_kept((40, 50, 60), 0.25, generators[1]), kept)
    assert torch.equal(charlm.draw_kept((3,), 0.0, generators[0]), torch.ones(3))


def test_dropout_is_of_the_lstms_outputs_and_not_of_its_state() -> None:
    model = charlm.CharacterModel(torch.nn.LSTM, 5, 4)
    x, kept = torch.randint(5, (2, 9)), torch.ones(2, 9, 4)
    kept[0, 3], kept[1, 5] = 0, 2
    plain, state = model(x)
    dropped, state_with = model(x, None, kept)
    torch.testing.assert_close(state_with, state)
    bias = model.score.bias
    torch.testing.assert_close(dropped[0, 3], bias)
    torch.testing.assert_close(dropped[1, 5] - bias, 2 * (plain[1, 5] - bias))
    kept[0, 3] = kept[1, 5] = True
    torch.testing.assert_close(model(x, None, kept)[0], plain)


def test_dropout_of_everything_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--out", str(tmp_path / "out"), "--dropout", "1"]) == 2
    assert "--dropout: expected a share below 1, got 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_streams_read_on_where_the_one_before_ends() -> None:
    x, y = cut_streams(torch.arange(23), 3, skip=1)
    assert x.tolist() == [[*range(1, 8)], [*range(8, 15)], [*range(15, 22)]]
    assert torch.equal(y, x + 1)


def test_shipped_text_is_the_published_one() -> None:
    text = load_text()
    assert text.digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (len(text.train), len(text.valid), len(text.test)) == (948_085, 55_769, 111_540)
    first, rest = text.train.split([892_315, len(text.train) - 892_315])
    assert text.spell(torch.cat([first, text.valid, rest, text.test])) == read_text(PLAYS)
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
