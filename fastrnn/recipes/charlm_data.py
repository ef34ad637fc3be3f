"""A long text as characters: Shakespeare's plays, or a file of your own.

`data/charlm.md` describes the file, its source and its licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.text_files import SHIPPED, digest, read_text

PLAYS = SHIPPED / "charlm.txt.xz"

LEAST = 1000
"""Characters a text must have, so that each of its parts is worth the name."""


@dataclass(frozen=True)
class Text:
    """A text in three parts.

    Attributes:
        train: indices of the characters to learn from, int64: the first 80 in 100, and the 5 in 100
            before the last tenth.
        valid: those to watch training by, and to choose settings by: the 5 in 100 between them.
        test: those to be told by: the last 10 in 100.
        characters: by their indices, sorted; those of the whole text.
        digest: of the text. Equal digests mean equal data.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    characters: str
    digest: str

    def spell(self, indices: Tensor) -> str:
        """The text that indices `[n]` stand for."""
        return "".join(self.characters[i] for i in indices.tolist())


def load_text(path: Path = PLAYS) -> Text:
    """Read a text, plain or compressed (`.xz`, `.gz`).

    Raises:
        RecipeError: there is no such file, it is not text, or it is too short to be split.
    """
    text = read_text(path)
    if len(text) < LEAST:
        raise RecipeError(
            f"{path}: expected a text of at least {LEAST:,} characters, got {len(text):,}"
        )
    characters = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    indices = torch.tensor([index[character] for character in text])
    ends = [len(text) * percent // 100 for percent in (80, 85, 90)]
    train, valid, rest, test = indices.tensor_split(ends)
    return Text(torch.cat([train, rest]), valid, test, characters, digest(text))


def cut_streams(indices: Tensor, streams: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """A text side by side: streams of equal length, and the character that follows each.

    Args:
        indices: ``[n]``, the text.
        streams: B, at most n - 1 - `skip`.
        skip: characters to leave out at the beginning. Default: 0.

    Returns:
        ``x [B, T]`` and ``y [B, T]`` with ``y[b, t]`` the character after ``x[b, t]``, and T as
        long as the text allows: fewer than B characters at its end are left out.
    """
    steps = (len(indices) - skip - 1) // streams
    whole = streams * steps
    x, y = (indices[begin : begin + whole].view(streams, steps) for begin in (skip, skip + 1))
    return x, y
