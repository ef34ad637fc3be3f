"""The last words of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastrnn.recipes.settings import TrainingSettings

if TYPE_CHECKING:
    from rich.console import Console


def training_facts(
    settings: TrainingSettings, first_epoch: int, seconds: float, norms: Sequence[float]
) -> dict[str, str]:
    """What the summary of every recipe says of its training.

    Args:
        settings: of the run.
        first_epoch: with which this run began.
        seconds: that it trained.
        norms: of the gradient before clipping, of every step.
    """
    if first_epoch > settings.epochs:
        trained = f"{settings.epochs} epochs, all before; --resume --epochs N goes on to N"
    else:
        trained = f"epochs {first_epoch}–{settings.epochs} in {seconds:.1f} s"
    clipped = sum(norm > settings.max_norm for norm in norms)
    return {
        "trained": trained,
        "clipped": f"{clipped} of {len(norms)} steps, at norm {settings.max_norm:g}",
    }


def summarize(console: Console, result: str, facts: dict[str, str]) -> None:
    """Print the result in bold, and the facts below it, one a line."""
    from rich.text import Text

    width = max(map(len, facts))
    console.print()
    console.print(Text(result, style="bold"))
    for name, fact in facts.items():
        # A path is to be copied: the terminal may break its line, not rich.
        console.print(Text.assemble((f"  {name:{width}}  ", "dim"), fact), soft_wrap=True)
