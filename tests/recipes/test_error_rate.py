"""error_rate: distances to the nearest reference."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrnn.recipes.error_rate import edit_distance, error_rate

sequences = st.lists(st.integers(0, 2), max_size=6)


@given(sequences, sequences)
def test_distance_is_levenshteins(a: list[int], b: list[int]) -> None:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        other = a[i - 1] != b[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + other)

    assert edit_distance(a, b) == distance(len(a), len(b))


def test_counts_against_the_nearest_reference() -> None:
    written = [[1, 2, 3], [4, 4], [5]]
    references = [[[9, 9, 9], [1, 2, 3, 4]], [[4, 4], [4]], [[6], [7, 7, 7]]]
    rate = error_rate(written, references)
    assert rate.symbols == pytest.approx((1 + 0 + 1) / (4 + 2 + 1))
    assert rate.sequences == pytest.approx(2 / 3)


def test_of_references_equally_near_the_longest() -> None:
    assert error_rate([[1, 2]], [[[1], [1, 2, 3]]]).symbols == pytest.approx(1 / 3)


def test_insertions_can_make_it_more_than_one() -> None:
    assert error_rate([[1, 2, 3]], [[[4]]]).symbols == 3
