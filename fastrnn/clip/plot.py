"""The plot of what a GradientClipper did."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrnn.clip.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _STEP, _CLIPPED, _NONFINITE = "#2b2f36", "#a9b6c6", "#d1495b", "#8a5fb8"


def plot_history(path: str | os.PathLike[str], history: History, title: str) -> None:
    """Draw norms and thresholds over the steps, one panel for each group.

    Args:
        path: of the image to write; its ending says in which format.
        history: at least one step.
        title: above the plot.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there are no steps.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots are drawn by matplotlib, which is not installed; pip install "fastrnn[demo]"'
        ) from error
    if not len(history.step):
        raise ValueError("there is nothing to draw: no step is recorded")
    groups = 1 if history.norm.dim() == 1 else history.norm.shape[1]
    size = (9, 1.4 + 2.8 * groups)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(groups, sharex=True, squeeze=False)[:, 0]
    columns = [column.reshape(-1, groups).unbind(1) for column in history[1:]]
    for group, (axes, norm, max_norm, _, clipped, nonfinite) in enumerate(zip(panels, *columns)):
        name = title if groups == 1 else f"{title}: group {group}"
        _draw(axes, name, history.step, norm, max_norm, clipped & ~nonfinite, nonfinite)
    panels[-1].set_xlabel("step", color=_INK)
    figure.savefig(path)


def _draw(
    axes: Axes,
    title: str,
    step: Tensor,
    norm: Tensor,
    max_norm: Tensor,
    clipped: Tensor,
    nonfinite: Tensor,
) -> None:
    """Draw one group; all tensors [S]."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markeredgewidth": 0}
    for chosen, label, color, size in (
        (~clipped & ~nonfinite, "step", _STEP, 3.0),
        (clipped, "clipped step", _CLIPPED, 3.6),
    ):
        if chosen.any():
            x, y = step[chosen].tolist(), norm[chosen].tolist()
            axes.plot(x, y, label=label, color=color, markersize=size, **dots)
    for index, when in enumerate(step[nonfinite].tolist()):
        label = "" if index else "not finite"
        axes.axvline(when, color=_NONFINITE, linewidth=0.8, alpha=0.7, label=label)
    if max_norm.isfinite().any():
        threshold = max_norm.where(max_norm.isfinite(), torch.nan).tolist()
        style: dict[str, Any] = {"color": _CLIPPED, "linewidth": 1.1, "linestyle": (0, (5, 3))}
        axes.plot(step.tolist(), threshold, label="max_norm", **style)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    summary = (
        f"{int(clipped.sum()):,} of {len(step):,} steps clipped ({clipped.double().mean():.1%})"
    )
    if nonfinite.any():
        summary += f", {int(nonfinite.sum()):,} not finite"
    axes.set_title(summary, loc="right", color=_CLIPPED if clipped.any() else _INK, fontsize=10)
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("norm before clipping", color=_INK)
    axes.tick_params(colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=False, labelcolor=_INK, markerscale=1.6)
