"""The plots of results: speed-up by case on the CPU; on a GPU over raggedness and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import tables
from bench.results_file import Record
from bench.sections import batch_size

_COLORS = {"packed": "#0b62c4", "padded": "#dd6b00", "fastrnn": "#1a7f37"}
_DTYPE_COLORS = {"bfloat16": "#0b62c4", "float32": "#1a7f37", "float16": "#dd6b00"}
_GREY = "#555555"
_PANELS = {"training": ("ragged-training", "dense"), "inference": ("ragged-inference", "dense")}
_TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def plot_cpu(record: Record, path: Path) -> None:
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
        if name != "fastrnn"
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


def plot_lstm(record: Record, path: Path) -> None:
    """Four panels: speed-up over padding, over H; time of a step against the floor; memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in record["cases"] if case["status"] == "ok"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 7.2), layout="constrained")
    _over_padding(axes[0, 0], [case for case in cases if case["section"] == "raggedness"])
    sizes = [case for case in cases if case["section"] in _SIZE_SECTIONS]
    _over_size(axes[0, 1], sizes)
    _step_time(axes[1, 0], sizes)
    _memory(axes[1, 1], [case for case in cases if case["section"] == "life"])
    for axis in axes.flat:
        axis.grid(color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", color=_GREY, transform=axis.transAxes)
    env = record["environment"]
    figure.suptitle("fastrnn and nn.LSTM", fontsize=11, fontweight="bold", ha="left", x=0.01)
    machine = f"{tables.machine(env)}, torch {env['torch']}, {env['date'][:10]}"
    figure.supxlabel(machine, fontsize=7, color=_GREY)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


_SIZE_SECTIONS = ("open-field", "hard-ground", "large")


def _titled(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def _line(axis: Any, points: Sequence[tuple[float, Record]], color: str, label: str) -> None:
    """Medians joined, the spread as bars."""
    if points:
        x, spreads = zip(*points)
        axis.plot(x, [s["median"] for s in spreads], "o-", ms=4, color=color, label=label)
        axis.vlines(x, [s["p20"] for s in spreads], [s["p80"] for s in spreads], color=color)


def _over_padding(axis: Any, cases: Sequence[Record]) -> None:
    _titled(axis, "Speed-up over padding", "% of the padded batch", "times as fast")
    for name in ("packed", "padded"):
        points = [
            (0.0 if case["lengths"] == "full" else float(case["lengths"].split("-")[1]), ratio)
            for case in cases
            if (ratio := case["ratios"].get(name))
        ]
        _line(axis, sorted(points, key=_first), _COLORS[name], f"over nn.LSTM {name}")
    axis.axhline(1, color=_GREY, lw=1, zorder=0)
    if cases:
        _log(axis)


def _over_size(axis: Any, cases: Sequence[Record]) -> None:
    _titled(axis, "Speed-up over hidden units, dense", "H", "times as fast as nn.LSTM")
    for dtype, color in _DTYPE_COLORS.items():
        points = [
            (float(case["hidden_size"]), case["ratios"]["padded"])
            for case in cases
            if case["dtype"] == dtype and "padded" in case["ratios"]
        ]
        _line(axis, sorted(points, key=_first), color, dtype)
    axis.axhline(1, color=_GREY, lw=1, zorder=0)
    _log_sizes(axis, cases)


def _step_time(axis: Any, cases: Sequence[Record]) -> None:
    """Of the dtype that has most cases; the floor only where the GPU's figures are known."""
    _titled(axis, "Time of a step, forward and backward", "H", "µs")
    if not cases:
        return
    dtypes = [case["dtype"] for case in cases]
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count)
    chosen = sorted(
        (case for case in cases if case["dtype"] == dtype),
        key=lambda case: int(case["hidden_size"]),
    )
    for name, label in (("fastrnn", "fastrnn"), ("padded", "nn.LSTM")):
        points = []
        for case in chosen:
            if "seconds" in (found := case["providers"].get(name, {})):
                scaled = {q: v * 1e6 / case["steps"] for q, v in found["seconds"].items()}
                points.append((float(case["hidden_size"]), scaled))
        _line(axis, points, _COLORS[name], f"{label}, {dtype}")
    floors = [
        (case["hidden_size"], case["floor"]["microseconds"] / case["steps"])
        for case in chosen
        if case.get("floor")
    ]
    if floors:
        axis.plot(*zip(*floors), ls="--", color=_GREY, label="floor")
    _log_sizes(axis, cases)


def _log_sizes(axis: Any, cases: Sequence[Record]) -> None:
    if cases:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _log(axis)


def _log(axis: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: _plain(value, "235"))
    axis.tick_params(which="minor", length=0, labelsize=8)


def _plain(value: float, digits: str) -> str:
    """A number that begins with one of the digits; others crowd the axis."""
    text = f"{value:g}"
    return text if text.strip("0.")[0] in digits else ""


def _memory(axis: Any, cases: Sequence[Record]) -> None:
    _titled(axis, "Peak memory of a training step", "fastrnn's is 1", "")
    shown = [
        case
        for case in cases
        if case["mode"] == "training"
        and "peak_bytes" in case["providers"]["fastrnn"]
        and "padded" in case["providers"]
    ]
    rows = [f"{case['workload']} {case['dtype']}" for case in shown]
    for name in ("packed", "padded"):
        points = [
            (found["peak_bytes"] / max(case["providers"]["fastrnn"]["peak_bytes"], 1), row)
            for row, case in enumerate(shown)
            if "peak_bytes" in (found := case["providers"].get(name, {}))
        ]
        if points:
            axis.plot(*zip(*points), "o", color=_COLORS[name], label=f"nn.LSTM {name}")
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color=_GREY, lw=1, zorder=0)


def _first(point: tuple[float, Record]) -> float:
    return point[0]
