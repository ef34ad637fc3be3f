"""load_record and what fills its holes."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

import pytest
import torch

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.gaps_data import (
    POLLUTANTS,
    SENSORS,
    fill_forward,
    hours_since,
    load_record,
)

HEADER = ",".join(["Date", "Time", *POLLUTANTS, "NMHC(GT)", *SENSORS])
NUMBERS = ",1,2,3,-200,5,6,7,8,9,10,11,12"
GOOD = f"{HEADER}\n2004-12-31,23:00:00{NUMBERS}\n2005-01-01,0:00:00{NUMBERS}\n"


def test_shipped_record_is_the_published_one() -> None:
    record = load_record()
    assert len(record.hours) == 9357
    assert (record.hours[0], record.hours[-1]) == (
        datetime(2004, 3, 10, 18),
        datetime(2005, 4, 4, 14),
    )
    missing = record.values.isnan().sum(0).tolist()
    assert missing == [1683, 1639, 1642, *[366] * 8]
    first = [2.6, 166, 113, 1360, 1046, 1056, 1692, 1268, 13.6, 48.9, 0.7578]
    assert torch.equal(record.values[0], torch.tensor(first))
    seen = record.values.nan_to_num(nan=1.0)
    assert float(seen[:, :8].min()) > 0
    assert float(record.values.nan_to_num(nan=-math.inf)[:, 0].max()) == pytest.approx(11.9)


def test_shipped_record_is_unchanged() -> None:
    assert load_record().digest == (
        "a044b565857243911878ea73279bf2d2333bc2f7425e48becac53f2b1fc6ff5f"
    )


def test_columns_are_found_by_name_and_missing_ones_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "record.csv"
    path.write_text(GOOD.replace(",5,6,", ",-200,6,"))
    values = load_record(path).values
    assert values[0].nan_to_num(nan=-1.0).tolist() == [1, 2, 3, -1, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected a column Date"),
        (GOOD.replace(",RH", ",H"), "line 1: expected a column RH, got Date,Time"),
        (HEADER, "expected hours, got none"),
        (GOOD + "2005-01-01,1:00:00,1\n", "line 4: expected 14 cells, got 3"),
        (GOOD + f"2005-01-01,2:00:00{NUMBERS}", "line 4: expected 2005-01-01 01:00:00, one hour"),
        (GOOD + f"1/1/2005,2:00:00{NUMBERS}", "line 4: expected a date and a time such as"),
        (GOOD.replace(",12\n", ",x\n"), "line 2: expected a number, got 'x'"),
        (GOOD.replace(",12\n", ",nan\n"), "line 2: expected a finite number, got nan: .* -200"),
    ],
    ids=["empty", "column", "no-hours", "cells", "skipped", "date", "word", "nan"],
)
def test_bad_record(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "record.csv"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_record(path)


def test_forward_fill_takes_each_features_last_number() -> None:
    nan = math.nan
    values = torch.tensor([[nan, 1.0], [2.0, nan], [nan, nan], [5.0, 6.0]])
    assert fill_forward(values).tolist() == [[0, 1], [2, 1], [2, 1], [5, 6]]


def test_hours_since_the_last_true_before() -> None:
    mask = torch.tensor([False, True, True, False, False, True, False])
    assert hours_since(mask).tolist() == [1, 2, 1, 1, 2, 3, 1]
