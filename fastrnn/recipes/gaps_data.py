"""A record of the air, hour by hour, with holes: UCI Air Quality, or a file of the same form.

`data/gaps.md` describes the file, its source and its licence (CC BY 4.0).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.text_files import SHIPPED, digest, read_text

RECORD = SHIPPED / "gaps.csv.xz"

MISSING = -200.0
"""What the file has where an instrument reported nothing."""

POLLUTANTS = {"CO(GT)": "CO, mg/m³", "NOx(GT)": "NOx, ppb", "NO2(GT)": "NO₂, µg/m³"}
"""What is forecast: the reference analysers' columns, and how to speak of them."""

SENSORS = (
    *("PT08.S1(CO)", "PT08.S2(NMHC)", "PT08.S3(NOx)", "PT08.S4(NO2)", "PT08.S5(O3)"),
    *("T", "RH", "AH"),
)


@dataclass(frozen=True)
class Record:
    """Consecutive hours.

    Attributes:
        hours: when each is, T of them.
        values: ``[T, 11]``: the pollutants, then the sensors; NaN: nothing was reported.
        digest: of the text. Equal digests mean equal data.
    """

    hours: list[datetime]
    values: Tensor
    digest: str


def load_record(path: Path = RECORD) -> Record:
    """Read a record, plain or compressed (`.xz`, `.gz`). Other columns are left out.

    Raises:
        RecipeError: there is no such file, or it is not as `data/gaps.md` describes it; with the
            line.
    """
    text = read_text(path)
    lines = csv.reader(text.splitlines())
    header = next(lines, [])
    wanted = [*POLLUTANTS, *SENSORS]
    absent = [name for name in ("Date", "Time", *wanted) if name not in header]
    if absent:
        raise RecipeError(f"{path}, line 1: expected a column {absent[0]}, got {','.join(header)}")
    columns = [header.index(name) for name in wanted]
    date, time = header.index("Date"), header.index("Time")
    hours: list[datetime] = []
    values: list[list[float]] = []
    for number, cells in enumerate(lines, 2):
        where = f"{path}, line {number}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise RecipeError(f"{where}: expected {len(header)} cells, got {len(cells)}")
        hour = _hour(f"{cells[date]} {cells[time]}", where)
        if hours and hour != hours[-1] + timedelta(hours=1):
            raise RecipeError(
                f"{where}: expected {hours[-1] + timedelta(hours=1)}, one hour after the line "
                f"before, got {hour}: an hour without a report is a line of {MISSING:g}"
            )
        hours.append(hour)
        values.append([_value(cells[column], where) for column in columns])
    if not hours:
        raise RecipeError(f"{path}: expected hours, got none")
    return Record(hours, torch.tensor(values), digest(text))


def fill_forward(values: Tensor) -> Tensor:
    """Each NaN of ``[T, F]`` replaced by the last number above it; by 0 where there is none."""
    hours = torch.arange(len(values))[:, None]
    last = torch.where(values.isnan(), -1, hours).cummax(0).values
    filled = values.gather(0, last.clamp(min=0))
    return filled.masked_fill(last < 0, 0.0)


def hours_since(mask: Tensor) -> Tensor:
    """``[T]``: hours since the last True of ``mask [T]`` before each; the first counts from 0."""
    hours = torch.arange(len(mask))
    last = torch.where(mask, hours, -1).cummax(0).values
    return hours - torch.cat([last.new_tensor([-1]), last[:-1]])


def _hour(text: str, where: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise RecipeError(
            f"{where}: expected a date and a time such as 2004-03-10,18:00:00, got {text!r}"
        ) from None


def _value(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise RecipeError(f"{where}: expected a number, got {cell!r}") from None
    if not math.isfinite(value):
        raise RecipeError(
            f"{where}: expected a finite number, got {cell}: what is missing is {MISSING:g}"
        )
    return math.nan if value == MISSING else value
