"""The last words of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def summarize(console: Console, result: str, facts: dict[str, str]) -> None:
    """Print the result in bold, and the facts below it, one a line."""
    from rich.text import Text

    width = max(map(len, facts))
    console.print()
    console.print(Text(result, style="bold"))
    for name, fact in facts.items():
        # A path is to be copied: the terminal may break its line, not rich.
        console.print(Text.assemble((f"  {name:{width}}  ", "dim"), fact), soft_wrap=True)
