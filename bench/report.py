"""``python -m bench report``: result files into README's tables, and a plot beside each file.

The newest complete file of each machine is shown, with every case that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import results_file, tables
from bench.results_file import Record
from bench.sections import SECTIONS, batch_size, compared, kind, short, verdicts

BEGIN, END = "<!-- bench:cpu:begin -->", "<!-- bench:cpu:end -->"
_OPEN = "ragged-training"  # the section that README shows unfolded


def write(results: Path, readme: Path) -> list[str]:
    """Draw the plots and put the tables between the markers of ``readme``.

    Returns:
        What was written, a line each.

    Raises:
        ValueError: no complete result, a file of another schema, or no markers.
    """
    found = newest(results)
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}, once and in this order")
    parts, written = [], []
    for path, record in found:
        plot(record, path.with_suffix(".png"))
        parts.append(markdown(record, _link(path.with_suffix(".png"), readme)))
        written.append(f"{path.with_suffix('.png')}: plot of {path.name}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    readme.write_text("\n\n".join([before + BEGIN, *parts, after]))
    return [*written, f"{readme}: tables of {len(found)} result file(s)"]


def newest(results: Path) -> list[tuple[Path, Record]]:
    """The newest complete result on each kind of machine."""
    found: dict[tuple[str, int], tuple[Path, Record]] = {}
    for path in sorted(results.glob("cpu-*.json")):
        record = results_file.load(path)
        env = record["environment"]
        machine = (env["cpu"], env["cpus"])
        if record["kind"] != "cpu" or not record["complete"]:
            continue
        if machine not in found or env["date"] > found[machine][1]["environment"]["date"]:
            found[machine] = (path, record)
    if not found:
        raise ValueError(f"{results} holds no complete result; run python -m bench cpu")
    return list(found.values())


def _link(path: Path, readme: Path) -> str:
    path, base = path.resolve(), readme.resolve().parent
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def markdown(record: Record, image: str) -> str:
    """What README says of one result."""
    env, cases = record["environment"], record["cases"]
    threads = sorted({case["threads"] for case in cases})
    parts = [
        f"{env['cpu']} ({env['cpus']} processors, {env['cpu_capability']}), torch {env['torch']}, "
        f"{env['date'][:10]}. Ratios are of medians, above 1 in fastrnn's favour: the geometric "
        "mean, and in brackets the worst case.",
        _summary(record, threads),
        f"![Speed-up over nn.LSTM by case]({image})",
    ]
    for key, section in SECTIONS.items():
        rows = [case for case in cases if case["section"] == key]
        if not rows:
            continue
        body = f"{section.note[0].upper()}{section.note[1:]}.\n\n{_section(key, rows)}"
        if key == _OPEN:
            parts.append(f"**{section.title}.** {body}")
        else:
            parts.append(f"<details><summary>{section.title}</summary>\n\n{body}\n\n</details>")
    notes = tables.unsupported_notes(cases)
    parts += [f"Not supported: {note}." for note in notes]
    return "\n\n".join(parts)


def _summary(record: Record, threads: Sequence[int]) -> str:
    found = {
        (verdict.section, verdict.target, verdict.threads): verdict
        for verdict in verdicts(record["cases"])
    }
    rows = []
    for section, target in dict.fromkeys((key[0], key[1]) for key in found):
        wanted = "" if target.mean is None else tables.times(target.mean)
        wanted += "" if target.worst is None else f" ({tables.times(target.worst)})"
        row = [compared(section, target), wanted.strip()]
        for count in threads:
            verdict = found.get((section, target, count))
            if verdict is None:
                row.append("")
                continue
            word = {True: " met", False: " **missed**", None: ""}[verdict.met]
            row.append(f"{tables.times(verdict.mean)} ({tables.times(verdict.worst)}){word}")
        rows.append(row)
    head = ["", "asked", *map(tables.threads_name, threads)]
    return _table(head, rows, left=1)


def _section(key: str, cases: Sequence[Record]) -> str:
    """A row for each case, with columns for each number of threads."""
    threads = sorted({case["threads"] for case in cases})
    providers = SECTIONS[key].providers
    baselines = [name for name in providers if name != "fastrnn"]
    head = ["batch", ""]
    for count in threads:
        if key == "memory":
            head += [short(key, name) for name in providers]
        else:
            head.append(f"{tables.threads_name(count)}, valid steps")
        head += [f"÷ {short(key, name)}" for name in baselines]
    rows: dict[str, list[str]] = {}
    by_id = {(case["id"], case["threads"]): case for case in cases}
    for case in cases:
        row = [batch_size(case), kind(case)]
        for count in threads:
            row += _cells(by_id.get((case["id"], count)), providers, baselines)
        rows[case["id"]] = row
    return _table(head, list(rows.values()), left=2)


def _cells(case: Record | None, providers: Sequence[str], baselines: Sequence[str]) -> list[str]:
    if case is None:
        return [""] * (1 + len(baselines))
    found = case["providers"]
    if case["section"] == "memory":
        cells = [tables.mebibytes(found[name]["peak_bytes"]) for name in providers]
    else:
        cells = [tables.rate(found["fastrnn"]["valid_steps_per_second"]["median"])]
    ratios = case["ratios"]
    return cells + [
        tables.times(ratios[name]["median"]) if name in ratios else "–" for name in baselines
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


_COLORS = {"packed": "#0b62c4", "padded": "#dd6b00"}
_GREY = "#555555"
_PANELS = {"training": ("ragged-training", "dense"), "inference": ("ragged-inference", "dense")}
_TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def plot(record: Record, path: Path) -> None:
    """Speed-up over nn.LSTM packed and padded, by case: a point for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels = {
        mode: [case for key in keys for case in record["cases"] if _shown(case, key, mode)]
        for mode, keys in _PANELS.items()
    }
    rows = list(dict.fromkeys(_row(case) for cases in panels.values() for case in cases))
    rows.sort(key=lambda row: row.endswith("full"))
    threads = sorted({case["threads"] for cases in panels.values() for case in cases})
    medians = [
        ratio["median"]
        for cases in panels.values()
        for case in cases
        for ratio in case["ratios"].values()
    ]
    lowest, highest = min([0.85, *medians]) / 1.1, max([1.15, *medians]) * 1.1
    figure, axes = pyplot.subplots(
        1, 2, figsize=(9.6, 1.4 + 0.26 * len(rows)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (mode, cases) in zip(axes, panels.items(), strict=True):
        for case in cases:
            place = threads.index(case["threads"]) - (len(threads) - 1) / 2
            y = rows.index(_row(case)) + 0.3 * place
            for name, ratio in case["ratios"].items():
                color = _COLORS[name]
                fill = color if case["threads"] == threads[-1] else "white"
                axis.plot((ratio["p20"], ratio["p80"]), (y, y), color=color, lw=1.2, alpha=0.5)
                axis.plot(ratio["median"], y, "o", ms=5, color=color, mfc=fill)
        axis.set_title(mode, fontsize=10, loc="left", fontweight="bold")
        axis.set_xscale("log")
        axis.set_xlim(lowest, highest)
        axis.axvline(1, color=_GREY, lw=1, zorder=0)
        axis.axvspan(lowest, 1, color="#f2f2f2", zorder=-1)
        axis.xaxis.set_major_locator(FixedLocator([t for t in _TICKS if lowest < t < highest]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        dense = sum(not row.endswith("full") for row in rows)
        if 0 < dense < len(rows):
            axis.axhline(dense - 0.5, color="#bbbbbb", lw=0.6)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8, family="monospace")
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D([], [], ls="", marker="s", color=color, label=f"over nn.LSTM {name}")
        for name, color in _COLORS.items()
    ] + [
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            color=_GREY,
            mfc=_GREY if count == threads[-1] else "white",
            label=tables.threads_name(count),
        )
        for count in threads
    ]
    figure.legend(
        handles=handles,
        loc="outside upper right",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handletextpad=0.2,
    )
    title = "Speed-up of fastrnn over nn.LSTM"
    figure.suptitle(title, fontsize=11, fontweight="bold", ha="left", x=0.01)
    env = record["environment"]
    figure.supxlabel(
        f"{env['cpu']}, torch {env['torch']}, {env['date'][:10]}; grey: nn.LSTM is faster",
        fontsize=8,
        color=_GREY,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _shown(case: Record, key: str, mode: str) -> bool:
    return bool(case["section"] == key and case["mode"] == mode and case["status"] == "ok")


def _row(case: Record) -> str:
    return f"{batch_size(case)} {case['lengths']}"
