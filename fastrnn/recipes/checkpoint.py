"""The checkpoint of a run: written whole or not at all, and resumed bit for bit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastrnn.recipes.distributed import ALONE, World
from fastrnn.recipes.errors import Interrupted, RecipeError
from fastrnn.recipes.settings import SettingsT, TrainingSettings, resume_settings
from fastrnn.recipes.side import Side

_FORMAT = 1


def training_state(data: str, sides: Sequence[Side], generator: torch.Generator) -> dict[str, Any]:
    """What every recipe's checkpoint has to keep: for :meth:`Checkpoint.save`.

    Args:
        data: the digest of the data.
        sides: what is trained.
        generator: that orders the data.
    """
    return {
        "data": data,
        "sides": [side.state_dict() for side in sides],
        "generator": generator.get_state(),
    }


class Checkpoint:
    """A run's checkpoint file, `DIRECTORY/checkpoint.pt`.

    It holds what the recipe gives to :meth:`save`, and besides: the recipe's name, its settings,
    the epoch, and the state of torch's global random generators. It is read with
    `weights_only=True`, so a file from elsewhere cannot run code.

    Args:
        recipe: the recipe's name.
        directory: where it is; :meth:`make_directory` makes it.
        world: the processes that train together; one of them writes. Default: this one alone.

    Attributes:
        epoch: of what the file holds, as far as this run wrote or read it; 0 before that.
    """

    def __init__(self, recipe: str, directory: Path, world: World = ALONE) -> None:
        self.recipe = recipe
        self.world = world
        self.path = directory / "checkpoint.pt"
        self.epoch = 0

    def make_directory(self) -> None:
        """Make the directory, before a long epoch rather than after it.

        Raises:
            RecipeError: it cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def save(self, settings: TrainingSettings, epoch: int, contents: dict[str, Any]) -> None:
        """Replace the file. Who interrupts this, or reads meanwhile, finds the old or the new one.

        Raises:
            RecipeError: it cannot be written.
        """
        if self.world.leads:
            self._write(settings, epoch, contents)
        self.epoch = epoch

    def _write(self, settings: TrainingSettings, epoch: int, contents: dict[str, Any]) -> None:
        state = contents | {
            "format": _FORMAT,
            "recipe": self.recipe,
            "settings": settings.record(),
            "epoch": epoch,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(
                    file.fileno()
                )  # else a power cut could leave the new name on an empty file
            os.replace(unfinished, self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, settings: SettingsT) -> tuple[SettingsT, dict[str, Any]]:
        """Read the file. Building a model draws numbers, so :meth:`restore_random` comes after.

        Args:
            settings: of this run. What its command line left out comes from the checkpoint.

        Returns:
            The settings to go on with, and what the file holds.

        Raises:
            RecipeError: there is no file, or it is not this recipe's.
            UsageError: `settings` contradict it.
        """
        if not self.path.exists():
            raise RecipeError(
                f"there is no checkpoint to resume at {self.path}: train once without --resume, or "
                "say with --out where it is"
            )
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            ours = state["format"] == _FORMAT and state["recipe"] == self.recipe
            theirs = f"format {state['format']} of recipe {state['recipe']}"
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
            raise self._unreadable(f"{type(error).__name__}") from error
        except pickle.UnpicklingError as error:
            raise self._unreadable("it holds more than plain data") from error
        if not ours:
            raise self._unreadable(f"it is {theirs}, not format {_FORMAT} of {self.recipe}")
        settings = resume_settings(settings, state["settings"], self.path)
        self.epoch = state["epoch"]
        if self.epoch > settings.epochs:
            raise RecipeError(
                f"{self.path} has {self.epoch} epochs behind it, more than --epochs "
                f"{settings.epochs}: ask for more of them, or start again without --resume"
            )
        return settings, state

    def restore_training(
        self, saved: dict[str, Any], data: str, sides: Sequence[Side], generator: torch.Generator
    ) -> None:
        """Take over what :func:`training_state` gave, and torch's global random state.

        Args:
            saved: what :meth:`load` read.
            data: the digest of this run's data.
            sides: of this run.
            generator: of this run.

        Raises:
            RecipeError: the checkpoint is of other data.
        """
        if saved["data"] != data:
            raise RecipeError(
                f"{self.path} was trained on other data: give the same --data, or start "
                "again without --resume"
            )
        for side, state in zip(sides, saved["sides"], strict=True):
            side.load_state_dict(state)
        generator.set_state(saved["generator"])
        self.restore_random(saved)

    @staticmethod
    def restore_random(state: dict[str, Any]) -> None:
        """Set torch's global random generators as they were when `state` was saved."""
        torch.set_rng_state(state["random"]["cpu"])
        for i, cuda_state in enumerate(state["random"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, i)

    @contextmanager
    def kept_on_interrupt(self) -> Iterator[None]:
        """Turn a Ctrl-C inside into an :class:`Interrupted` that says what is kept."""
        try:
            yield
        except KeyboardInterrupt:
            if self.epoch:
                kept = (
                    f"the checkpoint after epoch {self.epoch} is {self.path}\n"
                    f"go on with: python -m fastrnn {self.recipe} --resume --out {self.path.parent}"
                )
            else:
                kept = "before the first checkpoint, so nothing is kept"
            raise Interrupted(f"stopped; {kept}") from None

    def _unwritable(self, error: OSError) -> RecipeError:
        return RecipeError(
            f"cannot write {error.filename or self.path} ({error.strerror}): mend that, or say "
            "with --out where to write"
        )

    def _unreadable(self, reason: str) -> RecipeError:
        return RecipeError(
            f"{self.path} is not a checkpoint of `python -m fastrnn {self.recipe}` ({reason}): "
            "start again without --resume, which replaces it"
        )
