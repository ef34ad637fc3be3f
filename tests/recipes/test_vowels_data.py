"""The Japanese Vowels as shipped, and what is said of files that are not as they should be."""

from __future__ import annotations

import gzip
import lzma
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.vowels_data import load_vowels

DIGEST = "aaa509d350b6f4450fa8d7653d416f3a7774cf637b4c98ec36c71bf63b2770a0"
GOOD = "speaker ann\n1 2\n3 4\n\nspeaker bob\n-5 6e-1\n"


def write(directory: Path, train: str = GOOD, test: str = GOOD) -> Path:
    (directory / "vowels_train.txt").write_text(train)
    (directory / "vowels_test.txt").write_text(test)
    return directory


def test_shipped_data_are_the_published_ones() -> None:
    data = load_vowels()
    assert data.speakers == list("123456789")
    assert data.coefficients == 12
    counts = [Counter(speaker for _, speaker in part) for part in (data.train, data.test)]
    assert [counts[0][k] for k in range(9)] == [30] * 9
    assert [counts[1][k] for k in range(9)] == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    lengths = {len(frames) for frames, _ in data.train + data.test}
    assert (min(lengths), max(lengths)) == (7, 29)
    first = [1.860936, -0.207383, 0.261557, -0.214562, -0.171253, -0.118167]
    assert torch.equal(data.train[0][0][0, :6], torch.tensor(first))


def test_shipped_data_are_unchanged() -> None:
    assert load_vowels().digest == DIGEST


def test_own_files_bring_their_own_speakers_and_coefficients(tmp_path: Path) -> None:
    data = load_vowels(write(tmp_path))
    assert data.speakers == ["ann", "bob"]
    assert data.coefficients == 2
    assert [(frames.tolist(), speaker) for frames, speaker in data.train] == [
        ([[1.0, 2.0], [3.0, 4.0]], 0),
        ([[-5.0, pytest.approx(0.6)]], 1),
    ]


def test_compressed_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "vowels_train.txt.gz").write_bytes(gzip.compress(GOOD.encode()))
    (tmp_path / "vowels_test.txt.xz").write_bytes(lzma.compress(GOOD.encode()))
    assert load_vowels(tmp_path).speakers == ["ann", "bob"]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("", "vowels_train.txt: expected utterances, got an empty file"),
        (GOOD + "1 2 3\n", "line 7: expected 2 coefficients, .* got 3"),
        (GOOD + "1 nan\n", "line 7: expected finite coefficients, got nan: leave the frame out"),
        (GOOD + "-inf 1\n", "line 7: expected finite coefficients, got -inf"),
        (GOOD + "1 x\n", "line 7: expected a number, got 'x'"),
        ("1 2\n" + GOOD, "line 1: expected `speaker NAME` before the first frame, got '1 2'"),
        (GOOD + "speaker\n", "line 7: expected `speaker NAME`, one word"),
        (GOOD + "speaker ann\n", "line 7: expected frames after `speaker ann`, got none"),
        ("speaker ann\n" + GOOD, "line 1: expected frames after `speaker ann`, got none"),
        ("speaker ann\n1 2\n", "line 5: expected a speaker of vowels_train.txt .*'bob'"),
    ],
    ids=[
        "empty",
        "coefficients",
        "nan",
        "inf",
        "word",
        "no-speaker",
        "no-name",
        "no-frames-at-end",
        "no-frames",
        "unknown-speaker",
    ],
)
def test_bad_training_file(tmp_path: Path, train: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_vowels(write(tmp_path, train=train))


def test_test_file_has_as_many_coefficients_as_the_training_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"vowels_test.txt, line 2: expected 2 .* got 3"):
        load_vowels(write(tmp_path, test="speaker ann\n1 2 3\n"))


def test_one_speaker_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two speakers, got only 'ann'"):
        load_vowels(write(tmp_path, "speaker ann\n1 2\n", "speaker ann\n1 2\n"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"one of vowels_train.txt, .* got none"):
        load_vowels(tmp_path)
    with pytest.raises(RecipeError, match="which does not exist"):
        load_vowels(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="which is a file"):
        load_vowels(write(tmp_path) / "vowels_train.txt")


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "vowels_train.txt.xz").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"got vowels_train.txt and vowels_train.txt.xz"):
        load_vowels(tmp_path)


@pytest.mark.parametrize("name", ["vowels_train.txt", "vowels_train.txt.xz", "vowels_train.txt.gz"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    (write(tmp_path) / "vowels_train.txt").unlink()
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(RecipeError, match=r"cannot read .*expected text in UTF-8"):
        load_vowels(tmp_path)
