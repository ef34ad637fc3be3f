"""The plot of a run's gradient norms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INK, _STEP, _MEDIAN, _CLIPPED = "#2b2f36", "#a9b6c6", "#35517a", "#d1495b"


def plot_gradient_norms(
    path: Path, norms: Sequence[float], max_norm: float, steps_per_epoch: int, title: str
) -> None:
    """Draw the norm of each step before clipping, the threshold, and the steps that were clipped.

    Args:
        path: of the PNG to write.
        norms: one of each step, before clipping; at least one.
        max_norm: the threshold; infinite: none is drawn.
        steps_per_epoch: the horizontal axis counts epochs, and a line joins their medians.
        title: what was trained.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    whole = [(step / steps_per_epoch, norm) for step, norm in enumerate(norms, 1)]
    clipped = [(when, norm) for when, norm in whole if norm > max_norm]
    within = [(when, norm) for when, norm in whole if not norm > max_norm]
    medians = [
        (start / steps_per_epoch + 0.5, statistics.median(norms[start : start + steps_per_epoch]))
        for start in range(0, len(norms), steps_per_epoch)
    ]

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markeredgewidth": 0}
    for points, label, style in (
        (within, "step", dots | {"color": _STEP, "markersize": 3}),
        (clipped, "clipped step", dots | {"color": _CLIPPED, "markersize": 3.6}),
        (medians, "median of an epoch", {"color": _MEDIAN, "linewidth": 1.6}),
    ):
        if points:
            axes.plot(*zip(*points), label=label, **style)
    if math.isfinite(max_norm):
        axes.axhline(max_norm, color=_CLIPPED, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"max_norm\n{max_norm:g}",
            (1, max_norm),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=_CLIPPED,
        )
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_title(
        f"{len(clipped):,} of {len(norms):,} steps clipped ({len(clipped) / len(norms):.1%})",
        loc="right",
        color=_CLIPPED if clipped else _INK,
        fontsize=10,
    )
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, whole[-1][0] * 1.005)
    axes.set_xlabel(f"epoch ({steps_per_epoch} steps each)", color=_INK)
    axes.set_ylabel("gradient norm before clipping", color=_INK)
    axes.tick_params(colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", frameon=False, labelcolor=_INK, markerscale=1.6)
    figure.savefig(path)
