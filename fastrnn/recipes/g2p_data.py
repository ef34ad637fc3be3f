"""Words and their pronunciations: the CMU Pronouncing Dictionary, or a file of the same form.

`data/g2p.md` describes the file, its source and its licence.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.text_files import SHIPPED, digest, read_text

DICTIONARY = SHIPPED / "g2p.dict.xz"

BOUNDARY = 0
"""The phoneme that begins and ends every pronunciation."""

_PHONEME = re.compile(r"[A-Z]+[0-2]?")
_NO_STRESS = str.maketrans("", "", "012")
_VARIANT = re.compile(r"\(\d+\)$")


class Word(NamedTuple):
    """A word of the dictionary.

    Attributes:
        spelling: in lower case.
        letters: their indices.
        pronunciations: one or more, different ones, as indices of phonemes.
    """

    spelling: str
    letters: list[int]
    pronunciations: list[list[int]]


@dataclass(frozen=True)
class Dictionary:
    """A dictionary in three parts. All pronunciations of a word are in the same one.

    Attributes:
        train: the words to learn from: about 87 in 100.
        valid: those that say how far the training is: 3 in 100.
        test: those to be told by: 10 in 100.
        letters: by their indices.
        phonemes: by their indices; :data:`BOUNDARY` is the empty one.
        digest: of the text. Equal digests mean equal data.
    """

    train: list[Word]
    valid: list[Word]
    test: list[Word]
    letters: list[str]
    phonemes: list[str]
    digest: str

    def spoken(self, pronunciation: list[int]) -> str:
        """Indices as the dictionary writes them: `F AH N EH T IH K`."""
        return " ".join(self.phonemes[index] for index in pronunciation)


class Batch(NamedTuple):
    """Words with a pronunciation each, padded with zeros, batch first.

    Attributes:
        letters: int64 `[B, S]`.
        letter_lengths: int64 `[B]`.
        phonemes: int64 `[B, T]`, each ended by :data:`BOUNDARY`.
        phoneme_lengths: int64 `[B]`, the end included.
    """

    letters: Tensor
    letter_lengths: Tensor
    phonemes: Tensor
    phoneme_lengths: Tensor

    def share(self, rows: slice, device: torch.device) -> Batch:
        """Some of the words: letters and phonemes on a device, their lengths on the CPU."""
        letters, letter_lengths, phonemes, phoneme_lengths = (part[rows] for part in self)
        return Batch(letters.to(device), letter_lengths, phonemes.to(device), phoneme_lengths)


def load_dictionary(path: Path = DICTIONARY, stress: bool = False) -> Dictionary:
    """Read a dictionary, plain or compressed (`.xz`, `.gz`).

    Which part a word is in depends on its spelling alone (:func:`part_of`), so a longer dictionary
    has the same words in the same parts.

    Args:
        path: of the file. Default: the one that comes with fastrnn.
        stress: keep the vowels' stress (`AH0`, `AH1`, `AH2`) rather than have one of each. Without
            it, pronunciations that differ in stress alone are one. Default: False.

    Raises:
        RecipeError: the file is missing, or not as `data/g2p.md` describes it; with the line.
    """
    text = read_text(path)
    words: dict[str, list[str]] = {}
    known_phonemes: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        spelling, *spoken = line.partition("#")[0].split() or [""]
        if not spelling or line.startswith(";;;"):
            continue
        if not spoken or not known_phonemes.issuperset(spoken):
            wrong = [phoneme for phoneme in spoken if not _PHONEME.fullmatch(phoneme)]
            if wrong or not spoken:
                raise RecipeError(
                    f"{path}, line {number}: expected a word and its phonemes, such as `aback AH0 "
                    f"B AE1 K`, got {wrong[0] if wrong else 'no phonemes'!r} in {line!r}"
                )
            known_phonemes.update(spoken)
        pronunciation = " ".join(spoken)
        if not stress:
            pronunciation = pronunciation.translate(_NO_STRESS)
        known = words.setdefault(_VARIANT.sub("", spelling).lower(), [])
        if pronunciation not in known:
            known.append(pronunciation)
    letters = sorted({letter for word in words for letter in word})
    phonemes = sorted({p.translate({} if stress else _NO_STRESS) for p in known_phonemes})
    letter_index = {letter: i for i, letter in enumerate(letters)}
    phoneme_index = {phoneme: i for i, phoneme in enumerate(phonemes, BOUNDARY + 1)}
    parts: dict[str, list[Word]] = {"train": [], "valid": [], "test": []}
    for spelling, known in words.items():
        indices = [letter_index[letter] for letter in spelling]
        spoken_indices = [[phoneme_index[phoneme] for phoneme in p.split()] for p in known]
        parts[part_of(spelling)].append(Word(spelling, indices, spoken_indices))
    if not all(parts.values()):
        counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        raise RecipeError(
            f"{path}: expected words enough for a training, a validation and a test part, which "
            f"the spelling decides, got {counts}: a few hundred words are enough"
        )
    return Dictionary(**parts, letters=letters, phonemes=["", *phonemes], digest=digest(text))


def part_of(spelling: str) -> str:
    """`train`, `valid` or `test`, by a hash of the spelling: the same everywhere and always."""
    number = int.from_bytes(hashlib.sha256(spelling.encode()).digest()[:4], "big") % 100
    return "test" if number < 10 else "valid" if number < 13 else "train"


def collate_words(words: list[Word], choices: list[int] | None = None) -> Batch:
    """Words to a padded batch.

    Args:
        words: one or more.
        choices: for each word a number that says, modulo their count, which of its pronunciations
            is the target. Default: the first.
    """
    choices = choices or [0] * len(words)
    spoken = [
        torch.tensor([*word.pronunciations[choice % len(word.pronunciations)], BOUNDARY])
        for word, choice in zip(words, choices, strict=True)
    ]
    spelt = [torch.tensor(word.letters) for word in words]
    return Batch(
        pad_sequence(spelt, batch_first=True),
        torch.tensor([len(letters) for letters in spelt]),
        pad_sequence(spoken, batch_first=True),
        torch.tensor([len(phonemes) for phonemes in spoken]),
    )
