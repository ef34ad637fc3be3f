"""Text files of data, plain or compressed, and what tells whether they are the same."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fastrnn.recipes.errors import RecipeError

SHIPPED = Path(__file__).parent / "data"

_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}


def read_text(path: Path) -> str:
    """The text of a file, compressed where its name ends in `.xz` or `.gz`.

    Raises:
        RecipeError: there is no such file, or it is not text in UTF-8, compressed as it says.
    """
    if not path.is_file():
        raise RecipeError(
            f"expected a file, got {path}, which "
            f"{'is a directory' if path.exists() else 'does not exist'}"
        )
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            text: str = file.read()
            return text
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read {path} ({error}): expected text in UTF-8, compressed as the name says"
        ) from error


def digest(*texts: str) -> str:
    """Of the texts of a data set. Equal digests mean equal data."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
