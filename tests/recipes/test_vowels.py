"""The recipe `vowels`, from its command line to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn.recipes import vowels
from fastrnn.recipes.command_line import main
from tests.recipe_runs import checkpoint, flat


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in the recipe's form: three speakers, who differ in their mean."""
    directory = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 5)):
        lines = []
        for speaker in ("ann", "bob", "cleo"):
            for length in torch.randint(1, 9, (count,), generator=generator).tolist():
                frames = len(speaker) * len(lines) % 2 + torch.randn(length, 4, generator=generator)
                frames[:, ord(speaker[0]) - ord("a")] += 2
                lines += [f"speaker {speaker}", *(" ".join(map(str, f)) for f in frames.tolist())]
        (directory / f"vowels_{part}.txt").write_text("\n".join(lines))
    return directory


@pytest.fixture
def small(data: Path) -> list[str]:
    """A command line for a run of less than a second, but for --out."""
    return ["vowels", "--data", str(data), "--hidden", "5", "--batch-size", "8", "--epochs", "3"]


def test_loss_falls_on_the_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vowels", "--out", str(tmp_path), "--epochs", "3"]) == 0
    losses = checkpoint(tmp_path)["sides"][0]["losses"]
    assert len(losses) == 3 * 17
    assert losses[0] == pytest.approx(2.2, abs=0.15)  # log 9 = 2.197: it knows nothing
    assert sum(losses[-17:]) / 17 < 0.6
    out = capsys.readouterr().out
    assert "270 utterances of 9 speakers to learn from, 370 to be told by" in out
    assert "of the test utterances got the right name" in out


@pytest.mark.slow
@pytest.mark.timeout(300)  # other processes share the cores
def test_default_settings_name_96_of_100_speakers(tmp_path: Path) -> None:
    assert vowels.run(vowels.Settings(out=tmp_path)) >= 0.96


def test_writes_plot_and_checkpoint_and_says_where(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main([*small, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "gradient_norms.png"}
    assert (out / "gradient_norms.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert str(out / "gradient_norms.png") in said
    assert str(out / "checkpoint.pt") in said


def test_same_seed_same_run(small: list[str], tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert main([*small, "--out", str(tmp_path / out)]) == 0
    assert flat(checkpoint(tmp_path / "a")) == flat(checkpoint(tmp_path / "b"))
    assert main([*small, "--out", str(tmp_path / "c"), "--seed", "1"]) == 0
    a, c = (checkpoint(tmp_path / out)["sides"][0]["losses"] for out in "ac")
    assert a != c


@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["alone", "compare"])
def test_resumed_run_equals_the_uninterrupted_one(
    small: list[str], tmp_path: Path, compare: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, *compare, "--out", str(whole)]) == 0
    assert main([*small, *compare, "--out", str(parts), "--epochs", "1"]) == 0
    torch.manual_seed(99)  # whatever the process drew in the meantime
    assert main(["vowels", "--resume", "--out", str(parts), "--epochs", "3"]) == 0
    assert flat(checkpoint(whole)) == flat(checkpoint(parts))


def test_ctrl_c_keeps_the_last_checkpoint(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        steps = iter(range(7))  # of 5 in an epoch: into the second

        def interrupted(*arguments: Any) -> Any:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return train_step(*arguments)

        train_step = vowels.train_step
        patch.setattr(vowels, "train_step", interrupted)
        assert main([*small, "--out", str(parts)]) == 130
    err = capsys.readouterr().err
    assert f"the checkpoint after epoch 1 is {parts / 'checkpoint.pt'}" in err
    assert f"python -m fastrnn vowels --resume --out {parts}" in err
    assert [path.name for path in parts.iterdir()] == ["checkpoint.pt"]
    assert main(["vowels", "--resume", "--out", str(parts)]) == 0
    assert flat(checkpoint(whole)) == flat(checkpoint(parts))


def test_compare_trains_both_sides_alike(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--out", str(tmp_path), "--compare"]) == 0
    ours, theirs = checkpoint(tmp_path)["sides"]
    assert (ours["name"], theirs["name"]) == ("fastrnn", "nn.LSTM, packed")
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4)
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 15
    out = capsys.readouterr().out
    for words in ("step, median", "all steps", "test accuracy", "first epoch", "largest"):
        assert words in out


def test_comparison_changes_nothing_of_our_side(small: list[str], tmp_path: Path) -> None:
    for out, compare in (("alone", []), ("compared", ["--compare"])):
        assert main([*small, *compare, "--out", str(tmp_path / out)]) == 0
    alone, compared = (flat(checkpoint(tmp_path / out)) for out in ("alone", "compared"))
    assert alone["sides"] == compared["sides"][:1]


def test_resume_takes_its_settings_from_the_checkpoint(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--out", str(tmp_path), "--lr", "0.01"]) == 0
    before = checkpoint(tmp_path)
    assert main(["vowels", "--resume", "--out", str(tmp_path)]) == 0
    assert "3 epochs, all before" in capsys.readouterr().out
    assert flat(checkpoint(tmp_path)) == flat(before)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--hidden 6", 2, "--hidden 6 (the checkpoint: 5)"),
        ("--lr 0.1 --noise 0", 2, "--lr 0.1 (the checkpoint: 0.002), --noise 0.0"),
        ("--compare", 2, "--compare on (the checkpoint: off)"),
        ("--data elsewhere", 2, "--data elsewhere (the checkpoint:"),
        ("--epochs 2", 1, "has 3 epochs behind it, more than --epochs 2"),
    ],
)
def test_resume_refuses_other_settings(
    small: list[str],
    tmp_path: Path,
    options: str,
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*small, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert main(["vowels", "--resume", "--out", str(tmp_path), *options.split()]) == status
    assert words in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_data_that_changed(
    data: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "data"
    own.mkdir()
    for path in data.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    out = str(tmp_path / "out")
    assert main([*small, "--data", str(own), "--out", out]) == 0
    with (own / "vowels_train.txt").open("a") as file:
        file.write("\n1 2 3 4\n")
    assert main(["vowels", "--resume", "--out", out]) == 1
    assert "was trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--resume", "there is no checkpoint to resume at"),
        ("--data nowhere", "got nowhere, which does not exist"),
        ("--device nonsense", "cannot use --device nonsense here"),
        ("--device meta", "cannot use --device meta here"),
    ],
)
def test_errors_leave_with_status_1(
    tmp_path: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["vowels", "--out", str(out), *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()
