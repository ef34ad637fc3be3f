"""How far written sequences are from right ones: the phoneme error rate and the word error rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ErrorRate(NamedTuple):
    """Errors over many sequences.

    Attributes:
        symbols: insertions, deletions and substitutions, as a share of the references' symbols.
        sequences: the share of sequences with any error.
    """

    symbols: float
    sequences: float


def error_rate(
    written: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]
) -> ErrorRate:
    """Compare each sequence with the nearest of its references.

    `symbols = sum of distances / sum of the lengths of the references compared with`. Of references
    equally near the longest is taken.

    Args:
        written: the sequences to judge; at least one.
        references: for each of them one or more right ones, none empty.
    """
    errors = symbols = wrong = 0
    for sequence, right in zip(written, references, strict=True):
        distance, length = min(
            (edit_distance(sequence, reference), -len(reference)) for reference in right
        )
        errors += distance
        symbols -= length
        wrong += distance > 0
    return ErrorRate(errors / symbols, wrong / len(written))


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """The least number of insertions, deletions and substitutions from `a` to `b` (Levenshtein)."""
    if a == b:
        return 0
    above = list(range(len(b) + 1))
    for i, symbol in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (symbol != other)))
        above = row
    return above[-1]
