"""Tables of figures, all of one look."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(title: str, *columns: str) -> Table:
    """An empty table: names of rows to the left, and a column of figures for each name given."""
    from rich import box
    from rich.table import Table

    table = Table("", title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table
