"""Results on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.providers import LABELS
from bench.results_file import Record
from bench.sections import SECTIONS, compared, kind, label, short, verdicts

_WIDE = 104  # columns from which a section's table has valid steps and the ratios' spread
_BUSY = 0.3  # load for each processor from which times scatter


def heading(record: Record) -> RenderableType:
    """The machine, and a warning where it is busy."""
    env = record["environment"]
    lines = [
        Text("fastrnn against nn.LSTM on the CPU", "bold"),
        Text(
            f"{env['cpu']}, {env['cpus']} processors, {env['cpu_capability']} · "
            f"torch {env['torch']} · Python {env['python']}"
        ),
    ]
    load = env["load_average_before"]
    if load is not None and load > _BUSY * env["cpus"]:
        lines.append(Text(f"busy machine (load average {load:.1f}): times will scatter", "yellow"))
    return Group(*lines)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    return f"{_three(seconds)} s" if seconds >= 1 else f"{_three(seconds * 1e3)} ms"


def rate(per_second: float) -> str:
    """Of valid steps, in three digits."""
    if per_second >= 999.5e3:
        return f"{_three(per_second / 1e6)} M/s"
    return f"{_three(per_second / 1e3)} k/s"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.1f}×"


def _three(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def threads_name(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _table(title: str, note: str = "") -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=note or None,
        caption_justify="left",
        caption_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )


def section_table(cases: list[Record], width: int) -> RenderableType:
    """One section with one number of threads, for a terminal of ``width`` columns."""
    key, threads = cases[0]["section"], cases[0]["threads"]
    section = SECTIONS[key]
    baselines = [name for name in section.providers if name != "fastrnn"]
    wide = width >= _WIDE
    timed = wide and key != "memory"
    table = _table(f"{section.title} · {threads_name(threads)}", section.note)
    for name in "BTIH":
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=wide)
    for name in section.providers:
        table.add_column(short(key, name), justify="right", no_wrap=True)
    if timed:
        table.add_column("valid steps", justify="right", no_wrap=True)
    for name in baselines:
        table.add_column(f"÷ {short(key, name)}", justify="right", no_wrap=True)
    for case in cases:
        row: list[RenderableType] = [
            *(str(case[size]) for size in ("batch", "steps", "input_size", "hidden_size")),
            kind(case),
        ]
        if case["status"] == "failed":
            table.add_row(*row, Text("failed", "red"))
            continue
        row += [_figure(case["providers"][name]) for name in section.providers]
        if timed:
            row.append(rate(case["providers"]["fastrnn"]["valid_steps_per_second"]["median"]))
        row += [_ratio(case["ratios"].get(name), wide) for name in baselines]
        table.add_row(*row)
    return Group(table, "")


def _figure(provider: Record) -> RenderableType:
    if "unsupported" in provider:
        return Text("not supp.", "dim")
    if "peak_bytes" in provider:
        return mebibytes(provider["peak_bytes"])
    return duration(provider["seconds"]["median"])


def _ratio(ratio: Record | None, wide: bool) -> RenderableType:
    if ratio is None:
        return Text("–", "dim")
    text = Text(times(ratio["median"]), "red" if ratio["median"] < 1 else "green")
    if wide and "p20" in ratio:
        half = (ratio["p80"] - ratio["p20"]) / 2 / ratio["median"]
        text.append(f" ±{min(half, 9.99):>3.0%}", "dim")
    return text


def summary(cases: list[Record]) -> RenderableType:
    """Every target beside what was reached, then every case that misses one or failed."""
    found = verdicts(cases)
    lines: list[RenderableType] = []
    for threads in sorted({verdict.threads for verdict in found}):
        table = _table(f"Targets · {threads_name(threads)}")
        table.add_column("", no_wrap=True)
        for name in ("asked: mean", "each", "reached: mean", "worst"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        for verdict in found:
            if verdict.threads != threads:
                continue
            target = verdict.target
            table.add_row(
                compared(verdict.section, target),
                *("" if ratio is None else times(ratio) for ratio in (target.mean, target.worst)),
                times(verdict.mean),
                times(verdict.worst),
                {True: Text("met", "green"), False: Text("missed", "red"), None: ""}[verdict.met],
            )
        lines += [table, ""]
    lines += [
        Text.assemble(
            ("missed ", "red"),
            f"{compared(verdict.section, verdict.target)}, {threads_name(verdict.threads)}: "
            f"worst {times(verdict.worst)} at {verdict.worst_case}",
        )
        for verdict in found
        if verdict.met is False
    ]
    lines += [
        Text.assemble(
            ("failed ", "red"),
            f"{case['id']}, {threads_name(case['threads'])}: {case['error']}",
        )
        for case in cases
        if case["status"] == "failed"
    ]
    lines += [Text(f"not supported: {note}", "dim") for note in unsupported_notes(cases)]
    return Group(*lines)


def unsupported_notes(cases: list[Record]) -> list[str]:
    """What torch said where a provider could not run, each once."""
    notes = {
        f"{LABELS[name]}, {label(case)}: {provider['unsupported']}": None
        for case in cases
        for name, provider in case.get("providers", {}).items()
        if "unsupported" in provider
    }
    return list(notes)
