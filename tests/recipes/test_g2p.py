"""The recipe `g2p`, from its command line to its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrnn.recipes import g2p
from fastrnn.recipes.command_line import main
from fastrnn.recipes.g2p_data import DICTIONARY
from fastrnn.recipes.text_files import read_text
from tests.recipe_runs import checkpoint, flat


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 600th line of the dictionary."""
    path = tmp_path_factory.mktemp("data") / "some.dict"
    path.write_text("\n".join(read_text(DICTIONARY).splitlines()[::600]))
    return path


@pytest.fixture(scope="session")
def small(data: Path) -> list[str]:
    """A command line for a run of about a second, but for --out."""
    options = "--hidden 6 --batch-size 32 --words 120 --epochs 3 --half 4 --lr-half 5 --beam 2"
    return ["g2p", "--data", str(data), *options.split()]


@pytest.fixture(scope="session")
def alone(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a finished run has its files."""
    out = tmp_path_factory.mktemp("alone") / "deep" / "out"
    assert main([*small, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def compared(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with --compare."""
    out = tmp_path_factory.mktemp("compared")
    assert main([*small, "--out", str(out), "--compare"]) == 0
    return out


def test_loss_falls_on_real_words(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden", "24", "--batch-size", "16", "--epochs", "6", "--lr", "0.01"]
    assert main(["g2p", "--data", str(data), "--out", str(tmp_path), *options]) == 0
    losses = checkpoint(tmp_path)["sides"][0]["losses"]
    steps = len(losses) // 6
    assert losses[0] == pytest.approx(3.7, abs=0.3)  # log 40 = 3.69: it knows nothing
    assert sum(losses[-steps:]) / steps < 2.3
    out = capsys.readouterr().out
    assert "words to learn from" in out
    assert "phoneme error rate" in out
    assert "dictionary" in out


@pytest.mark.slow
@pytest.mark.timeout(300)  # other processes share the cores
def test_error_rate_is_below_a_quarter_after_16_000_words(tmp_path: Path) -> None:
    tenth = tmp_path / "tenth.dict"
    tenth.write_text("\n".join(read_text(DICTIONARY).splitlines()[::10]))
    settings = g2p.Settings(out=tmp_path, data=tenth, epochs=2, words=8_000, beam=1)
    assert g2p.run(settings) < 0.25


def test_writes_plot_and_checkpoint(alone: Path) -> None:
    assert {path.name for path in alone.iterdir()} == {"checkpoint.pt", "gradient_norms.png"}
    assert (alone / "gradient_norms.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_run(small: list[str], alone: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert main([*small, "--out", str(tmp_path / seed), "--seed", seed]) == 0
    assert flat(checkpoint(tmp_path / "0")) == flat(checkpoint(alone))
    losses = (checkpoint(out)["sides"][0]["losses"] for out in (tmp_path / "1", alone))
    assert next(losses) != next(losses)


def test_resumed_run_equals_the_uninterrupted_one(
    small: list[str], compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert main([*small, "--compare", *out, "--epochs", "1"]) == 0
    torch.manual_seed(99)  # whatever the process drew in the meantime
    capsys.readouterr()
    assert main(["g2p", "--resume", *out, "--epochs", "3"]) == 0
    assert flat(checkpoint(compared)) == flat(checkpoint(tmp_path))
    assert checkpoint(compared)["sampling"]["steps"] == 3 * 4
    said = capsys.readouterr().out
    for words in (
        "step, median",
        "phonemes wrong",
        "words wrong",
        "first epoch",
        "epochs 2–3",
        str(tmp_path / "gradient_norms.png"),
        str(tmp_path / "checkpoint.pt"),
    ):
        assert words in said


def test_compare_trains_both_sides_alike(compared: Path) -> None:
    ours, theirs = checkpoint(compared)["sides"]
    assert (ours["name"], theirs["name"]) == ("fastrnn", "nn.LSTM, packed")
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4)


def test_comparison_changes_nothing_of_our_side(alone: Path, compared: Path) -> None:
    assert flat(checkpoint(alone)["sides"]) == flat(checkpoint(compared)["sides"][:1])


def test_learning_rate_decays_by_steps(alone: Path) -> None:
    """Not by epochs: how many there will be is not known to a run that is resumed."""
    state = checkpoint(alone)
    rate = state["settings"]["lr"] / (1 + 11 / 5)  # the last of 12 steps; half after 5
    assert state["sides"][0]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)


def test_resume_refuses_data_that_changed(
    data: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.dict"
    own.write_text(data.read_text())
    out = str(tmp_path / "out")
    assert main([*small, "--data", str(own), "--out", out]) == 0
    own.write_text(data.read_text() + "\nfastrnn F AE1 S T")
    assert main(["g2p", "--resume", "--out", out]) == 1
    assert "was trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--schedule cosine", 2, "--schedule: expected linear, exponential, inverse_sigmoid, got"),
        ("--forced 1.5", 2, "--forced: expected a probability, at most 1, got 1.5"),
        ("--beam 0", 2, "--beam: expected an integer of at least 1, got '0'"),
        ("--data nowhere", 1, "got nowhere, which does not exist"),
        ("--resume", 1, "there is no checkpoint to resume at"),
    ],
)
def test_errors(
    tmp_path: Path, options: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["g2p", "--out", str(out), *options.split()]) == status
    assert words in capsys.readouterr().err
    assert not out.exists()
