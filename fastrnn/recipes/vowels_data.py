"""Utterances as frames of coefficients: the UCI Japanese Vowels, or files of the same form.

`data/vowels.md` describes the files, their source and their licence (CC BY 4.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.text_files import SHIPPED, digest, read_text

Utterance = tuple[Tensor, int]
"""Frames `[T, I]` and the index of their speaker."""


@dataclass(frozen=True)
class Vowels:
    """A training and a test set.

    Attributes:
        train: the utterances to learn from.
        test: those to be told by.
        speakers: their names, in the order in which the training file names them first.
        digest: of both files' text. Equal digests mean equal data.
    """

    train: list[Utterance]
    test: list[Utterance]
    speakers: list[str]
    digest: str

    @property
    def coefficients(self) -> int:
        """I, the numbers in a frame."""
        return self.train[0][0].shape[1]


def load_vowels(directory: Path = SHIPPED) -> Vowels:
    """Read `vowels_train` and `vowels_test`, each `.txt`, `.txt.xz` or `.txt.gz`.

    The training file says how many coefficients a frame has and who the speakers are.

    Raises:
        RecipeError: a file is missing, or not as `data/vowels.md` describes it; with the line.
    """
    train_path, test_path = (_find(directory, f"vowels_{part}") for part in ("train", "test"))
    train_text, test_text = read_text(train_path), read_text(test_path)
    train = _parse(train_path, train_text)
    coefficients = len(train[0].frames[0])
    test = _parse(test_path, test_text, coefficients)
    speakers = list(dict.fromkeys(utterance.speaker for utterance in train))
    for utterance in test:
        if utterance.speaker not in speakers:
            raise RecipeError(
                f"{test_path}, line {utterance.line}: expected a speaker of {train_path.name} "
                f"({', '.join(speakers)}), got {utterance.speaker!r}: the model can only name whom "
                "it has heard"
            )
    if len(speakers) < 2:
        raise RecipeError(
            f"{train_path}: expected utterances of at least two speakers, got only {speakers[0]!r}"
        )
    sets = [_tensors(part, speakers) for part in (train, test)]
    return Vowels(sets[0], sets[1], speakers, digest(train_text, test_text))


@dataclass
class _Parsed:
    line: int
    speaker: str
    frames: list[list[float]]


def _tensors(utterances: list[_Parsed], speakers: list[str]) -> list[Utterance]:
    return [(torch.tensor(u.frames), speakers.index(u.speaker)) for u in utterances]


def _find(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise RecipeError(
            f"expected a directory with vowels_train.txt and vowels_test.txt, got {directory}, "
            f"which {'is a file' if directory.exists() else 'does not exist'}"
        )
    names = [name + ending for ending in (".txt", ".txt.xz", ".txt.gz")]
    found = [path for path in (directory / name for name in names) if path.is_file()]
    if len(found) != 1:
        raise RecipeError(
            f"expected one of {', '.join(names)} in {directory}, got "
            f"{' and '.join(path.name for path in found) or 'none'}"
        )
    return found[0]


def _parse(path: Path, text: str, coefficients: int | None = None) -> list[_Parsed]:
    """Utterances in the file's order; without `coefficients`, the first frame says how many."""
    utterances: list[_Parsed] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        where = f"{path}, line {number}"
        if not words:
            continue
        if words[0] == "speaker":
            if len(words) != 2:
                raise RecipeError(f"{where}: expected `speaker NAME`, one word, got {line!r}")
            _check_frames(path, utterances[-1:])
            utterances.append(_Parsed(number, words[1], []))
            continue
        if not utterances:
            raise RecipeError(
                f"{where}: expected `speaker NAME` before the first frame, got {line!r}"
            )
        frame = [_number(word, where) for word in words]
        coefficients = coefficients or len(frame)
        if len(frame) != coefficients:
            raise RecipeError(
                f"{where}: expected {coefficients} coefficients, as many as in the first frame of "
                f"the training file, got {len(frame)}"
            )
        utterances[-1].frames.append(frame)
    if not utterances:
        raise RecipeError(f"{path}: expected utterances, got an empty file")
    _check_frames(path, utterances[-1:])
    return utterances


def _check_frames(path: Path, utterances: Iterable[_Parsed]) -> None:
    for utterance in utterances:
        if not utterance.frames:
            raise RecipeError(
                f"{path}, line {utterance.line}: expected frames after `speaker "
                f"{utterance.speaker}`, got none: leave an empty utterance out"
            )


def _number(word: str, where: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise RecipeError(f"{where}: expected a number, got {word!r}") from None
    if not math.isfinite(value):
        raise RecipeError(
            f"{where}: expected finite coefficients, got {word}: leave the frame out, or repair it"
        )
    return value
