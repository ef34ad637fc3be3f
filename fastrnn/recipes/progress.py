"""The progress bar of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class TrainingProgress:
    """Moves the bar; made by :func:`training_progress`."""

    def __init__(self, bar: Progress, task: TaskID, epochs: int) -> None:
        self._bar = bar
        self._task = task
        self._epochs = epochs

    def start_epoch(self, epoch: int) -> None:
        """Say which epoch it is, counted from 1."""
        self._bar.update(self._task, description=f"epoch {epoch}/{self._epochs}")

    def advance(self) -> None:
        """A step is done."""
        self._bar.advance(self._task)

    def finish_epoch(self, values: str) -> None:
        """Show what came out of the epoch, until the next one ends."""
        self._bar.update(self._task, values=values)


@contextmanager
def training_progress(
    console: Console, epochs: int, steps: int, done: int = 0
) -> Iterator[TrainingProgress]:
    """Show epoch, bar, values and the time left. Away from a terminal, only the last state.

    Args:
        console: rich's console to draw on.
        epochs: of the whole run.
        steps: in each epoch.
        done: epochs that an earlier run has done. Default: 0.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]left[/]"),
        console=console,
        expand=True,
        disable=done >= epochs,
    )
    with bar:
        task = bar.add_task("", total=epochs * steps, completed=done * steps, values="")
        yield TrainingProgress(bar, task, epochs)
