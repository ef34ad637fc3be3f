"""`python -m fastrnn`: what it lists, what it refuses, how it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn.recipes import RECIPES
from fastrnn.recipes.command_line import main


def stderr_of(argv: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m fastrnn` with these arguments says as it leaves with this status."""
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith("fastrnn: ")
    return err


def test_help_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    width = max(map(len, RECIPES))
    for name, summary in RECIPES.items():
        assert f"{name:{width}}  {summary}" in out


def test_no_arguments_is_a_question_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 0
    assert "recipes:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_has_its_defaults(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([recipe, "--help"])
    assert left.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for option in ("--epochs N", "--max-norm X", "--resume", "--compare"):
        assert option in out
    assert f"(default: runs/{recipe})" in out


def test_help_and_data_need_torch_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'numpy'): sys.modules[name] = None\n"
        "from fastrnn.recipes.vowels_data import load_vowels\n"
        "assert len(load_vowels().train) == 270\n"
        "from fastrnn.recipes.command_line import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "vowels", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "--epochs N" in done.stdout


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    err = stderr_of(["vowels"], 1, capsys)
    assert f"{package} cannot be imported" in err
    assert "pip install 'fastrnn[demo]'" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("vowel", "there is no recipe 'vowel', did you mean vowels?"),
        ("xyz", "there is no recipe 'xyz'\nrecipes: vowels"),
        ("--nothing", "unrecognized arguments: --nothing"),
        ("vowels --nothing", "unrecognized arguments: --nothing"),
        ("vowels --epoch 3", "unrecognized arguments: --epoch 3"),
        ("vowels --epochs -3", "--epochs: expected an integer of at least 1, got '-3'"),
        ("vowels --epochs 1.5", "--epochs: expected an integer of at least 1, got '1.5'"),
        ("vowels --hidden 0", "--hidden: expected an integer of at least 1, got '0'"),
        ("vowels --batch-size 0", "--batch-size: expected an integer of at least 1, got '0'"),
        ("vowels --seed -1", "--seed: expected an integer of at least 0, got '-1'"),
        ("vowels --seed 9223372036854775808", "--seed: expected an integer"),
        ("vowels --lr 0", "--lr: expected a finite number above 0, got '0'"),
        ("vowels --lr inf", "--lr: expected a finite number above 0, got 'inf'"),
        ("vowels --max-norm nan", "--max-norm: expected a number above 0, got 'nan'"),
        ("vowels --noise -1", "--noise: expected a finite number of at least 0, got '-1'"),
        ("vowels --epochs", "--epochs: expected one argument"),
    ],
)
def test_bad_arguments(argv: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in stderr_of(argv.split(), 2, capsys)
