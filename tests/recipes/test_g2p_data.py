"""The CMU dictionary as shipped, and what is said of files that are not as they should be."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.g2p_data import (
    BOUNDARY,
    Dictionary,
    collate_words,
    load_dictionary,
    part_of,
)

DIGEST = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"


@pytest.fixture(scope="module")
def shipped() -> Dictionary:
    return load_dictionary()


def small(directory: Path, extra: str = "") -> Path:
    """100 words `a`, `aa`, ... whose phonemes are as many as their letters; then `extra`."""
    path = directory / "words.dict"
    words = [f"{'a' * n} {' '.join(['AA1', 'B'] * n)}" for n in range(1, 101)]
    path.write_text("\n".join([*words, extra]))
    return path


def find(data: Dictionary, spelling: str) -> list[str]:
    (word,) = (w for w in data.train + data.valid + data.test if w.spelling == spelling)
    return [data.spoken(pronunciation) for pronunciation in word.pronunciations]


def test_shipped_dictionary_is_the_published_one(shipped: Dictionary) -> None:
    assert shipped.digest == DIGEST
    assert "".join(shipped.letters) == "'-.abcdefghijklmnopqrstuvwxyz"
    assert len(shipped.phonemes) == 1 + 39
    assert shipped.phonemes[BOUNDARY] == ""
    assert find(shipped, "phonetics") == ["F AH N EH T IH K S"]
    assert find(shipped, "tomato") == ["T AH M EY T OW", "T AH M AA T OW"]
    assert find(shipped, "aalburg") == ["AE L B ER G"]  # `# place, dutch` is a comment


def test_parts_are_those_that_were_measured(shipped: Dictionary) -> None:
    counts = [len(part) for part in (shipped.train, shipped.valid, shipped.test)]
    assert counts == [109_550, 3_783, 12_719]
    for name in ("train", "valid", "test"):
        assert all(part_of(word.spelling) == name for word in getattr(shipped, name)[::100])


def test_stress(tmp_path: Path) -> None:
    path = small(tmp_path, "record R EH1 K ER0 D\nrecord(2) R EH2 K ER1 D\nRecord R IH0 K AO1 R D")
    without, with_stress = load_dictionary(path), load_dictionary(path, stress=True)
    assert find(without, "record") == ["R EH K ER D", "R IH K AO R D"]
    assert find(with_stress, "record") == ["R EH1 K ER0 D", "R EH2 K ER1 D", "R IH0 K AO1 R D"]
    assert len(with_stress.phonemes) > len(without.phonemes)


def test_comments_and_compression(tmp_path: Path) -> None:
    path = small(tmp_path, ";;; a comment\n\n# another\nword W ER1 D # with a comment")
    packed = tmp_path / "words.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for data in (load_dictionary(path), load_dictionary(packed)):
        assert find(data, "word") == ["W ER D"]
        assert len(data.train + data.valid + data.test) == 101


def test_words_stay_in_their_part_when_others_come(tmp_path: Path) -> None:
    before = {word.spelling for word in load_dictionary(small(tmp_path)).test}
    more = "\n".join(f"{'b' * n} B" for n in range(1, 101))
    after = {word.spelling for word in load_dictionary(small(tmp_path, more)).test}
    assert before < after
    assert {word for word in after if word[0] == "a"} == before


def test_batch(shipped: Dictionary) -> None:
    words = [w for w in shipped.train if len(w.pronunciations) == 2][:3]
    first, second, third = (collate_words(words, choices) for choices in (None, [1] * 3, [4] * 3))
    for part in range(4):
        assert first[part].equal(third[part])
    for i, word in enumerate(words):
        assert first.letters[i, : first.letter_lengths[i]].tolist() == word.letters
        for batch, spoken in zip((first, second), word.pronunciations):
            length = batch.phoneme_lengths[i]
            assert batch.phonemes[i, :length].tolist() == [*spoken, BOUNDARY]
            assert not batch.phonemes[i, length:].any()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("word", "line 101: expected a word and its phonemes, .* got 'no phonemes' in 'word'"),
        ("word w ER1", "line 101: .* got 'w' in 'word w ER1'"),
        ("word W ER3", "line 101: .* got 'ER3'"),
        ("two words W ER1", "line 101: .* got 'words'"),
    ],
)
def test_bad_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_dictionary(small(tmp_path, line))


@pytest.mark.parametrize("text", ["", "a EY1\nb B IY1"], ids=["empty", "two"])
def test_too_few_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "words.dict"
    path.write_text(text)
    with pytest.raises(RecipeError, match="words enough for a training, a validation and a test"):
        load_dictionary(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_dictionary(tmp_path / "nowhere.dict")
