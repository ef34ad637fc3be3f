"""``python -m bench compare A.json B.json``: what became slower, larger or wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bench import tables
from bench.results_file import Record
from bench.timing import geometric_mean

THRESHOLD_HELP = "how much slower or larger is a regression (default: 0.1, a tenth)"
_RESOLUTION = 2**20  # bytes; less is the method's scatter


class Change(NamedTuple):
    """One figure of fastrnn's in both results.

    Attributes:
        case: its id, and where it ran.
        what: "time", "memory" or "status".
        before: in words.
        after: in words.
        ratio: after over before; None for a status.
        baseline: the same of nn.LSTM's (torch's), which nobody changed: the machine's part.
        regression: worse by more than the threshold, and than the spread of both.
    """

    case: str
    what: str
    before: str
    after: str
    ratio: float | None
    baseline: float | None
    regression: bool


def run(before: Record, after: Record, threshold: float, console: Console) -> int:
    """Print every change and say which are regressions.

    Returns:
        The exit status: 0, or 1 where there is a regression.

    Raises:
        ValueError: the results are of different kinds, have no case in common, or the threshold is
            not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold must be positive, got {threshold}")
    if before["kind"] != after["kind"]:
        raise ValueError(f"the results must be of one kind, got {before['kind']}, {after['kind']}")
    earlier, later = _by_key(before["cases"]), _by_key(after["cases"])
    common = [key for key in later if key in earlier]
    if not common:
        raise ValueError("the results have no case in common")
    machines = [tables.machine(record["environment"]) for record in (before, after)]
    if machines[0] != machines[1]:
        console.print(f"[yellow]measured on different machines:[/] {machines[0]}; {machines[1]}")
    found = [change for key in common for change in changes(earlier[key], later[key], threshold)]
    _print(found, console)
    for words, missing in (
        ("only in the first", [key for key in earlier if key not in later]),
        ("only in the second", [key for key in later if key not in earlier]),
    ):
        if missing:
            console.print(f"[dim]{len(missing)} cases {words}[/]")
    ratios = [change.ratio for change in found if change.what == "time" and change.ratio]
    if ratios:
        mean = geometric_mean(ratios)
        console.print(f"time, geometric mean of {len(ratios)} cases: {tables.times(mean)}")
    regressions = sum(change.regression for change in found)
    console.print(f"{regressions} regression{'' if regressions == 1 else 's'}")
    return int(regressions > 0)


def _by_key(cases: Iterable[Record]) -> dict[tuple[str, int], Record]:
    return {(case["id"], case["threads"]): case for case in cases}


def changes(before: Record, after: Record, threshold: float) -> list[Change]:
    """Of one case: its status where that changed, else time and memory where both have them."""
    name = f"{after['id']}, {tables.setting(after)}"
    if "failed" in (before["status"], after["status"]):
        if before["status"] == after["status"]:
            return []
        worse = after["status"] == "failed"
        return [Change(name, "status", before["status"], after["status"], None, None, worse)]
    ours, theirs = before["providers"]["fastrnn"], after["providers"]["fastrnn"]
    found = []
    if "seconds" in ours and "seconds" in theirs:
        old, new = ours["seconds"], theirs["seconds"]
        ratio = new["median"] / old["median"]
        apart = new["p20"] > old["p80"]
        found.append(
            Change(
                name,
                "time",
                tables.duration(old["median"]),
                tables.duration(new["median"]),
                ratio,
                _baseline(before, after),
                ratio > 1 + threshold and apart,
            )
        )
    if "peak_bytes" in ours and "peak_bytes" in theirs:
        old_peak, new_peak = ours["peak_bytes"], theirs["peak_bytes"]
        ratio = max(new_peak, 1) / max(old_peak, 1)
        grown = new_peak - old_peak > _RESOLUTION
        found.append(
            Change(
                name,
                "memory",
                tables.mebibytes(old_peak),
                tables.mebibytes(new_peak),
                ratio,
                None,
                ratio > 1 + threshold and grown,
            )
        )
    return found


def _baseline(before: Record, after: Record) -> float | None:
    """What became of everybody else's time in the same case."""
    ratios = [
        after["providers"][name]["seconds"]["median"] / provider["seconds"]["median"]
        for name, provider in before["providers"].items()
        if name != "fastrnn"
        and "seconds" in provider
        and "seconds" in after["providers"].get(name, {})
    ]
    return geometric_mean(ratios) if ratios else None


def _print(found: list[Change], console: Console) -> None:
    table = tables.plain_table("Changes", "others: what became of the baselines' times meanwhile")
    table.add_column("case")
    for heading in ("", "before", "after", "after ÷ before", "others"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in found:
        table.add_row(
            change.case,
            change.what,
            change.before,
            change.after,
            Text(
                "–" if change.ratio is None else tables.times(change.ratio),
                "red" if change.regression else "",
            ),
            "" if change.baseline is None else tables.times(change.baseline),
        )
    console.print(table)
