"""One model in training: what a step needs, and what it leaves behind.

A run has one side, or two with `--compare`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastrnn.recipes.distributed import ALONE, World
from fastrnn.recipes.errors import RecipeError

Clip: TypeAlias = Callable[[Iterable[Tensor], float], Tensor]
"""`clip(parameters, max_norm)` scales gradients, and returns their norm before that."""


class Side:
    """A model with its optimizer, its clip, and the history of its steps.

    Args:
        name: what reports call it.
        model: what is trained, on its device already; `list(model.parameters())` is what is
            clipped.
        optimizer: over the model's parameters.
        clip: fastrnn's or torch's `clip_grad_norm_`.
        synchronize: whether :meth:`timed` waits for the GPU, so that it measures the step and not
            its launch. Default: False.
        world: the processes that train together. Default: this one alone.

    Attributes:
        replica: `model`, to be called in training: it averages gradients over the world.
        losses: of each step of the finished epochs, over the whole batch.
        norms: of the gradient before clipping, of each of these steps.
        seconds: that each of these steps took.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: Clip,
        synchronize: bool = False,
        world: World = ALONE,
    ) -> None:
        self.name = name
        self.model = model
        self.replica = world.replicate(model)
        self.world = world
        self.optimizer = optimizer
        self.clip = clip
        self.synchronize = synchronize
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self._pending: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure one step."""
        started = self._now()
        yield
        self.seconds.append(self._now() - started)

    def record(self, loss: Tensor, norm: Tensor) -> None:
        """Keep a step's loss and gradient norm, on their device until the epoch ends.

        Args:
            loss: that backward started from; its mean over the world is the loss of the batch.
            norm: of the gradient, which is the same on every rank.
        """
        self._pending.append((loss.detach(), norm))

    def finish_epoch(self) -> None:
        """Read the losses and norms of the epoch's steps.

        Raises:
            RecipeError: a loss is NaN or infinite.
        """
        first = len(self.losses)
        self.losses += self.world.mean(torch.stack([loss for loss, _ in self._pending])).tolist()
        self.norms += torch.stack([norm for _, norm in self._pending]).tolist()
        self._pending.clear()
        for step, loss in enumerate(self.losses[first:], first + 1):
            if not math.isfinite(loss):
                raise RecipeError(
                    f"the loss of {self.name} became {loss} in step {step}: try a smaller --lr or "
                    "--max-norm; the checkpoint of the last epoch that went well stays as it is"
                )

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to keep."""
        return {
            "name": self.name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "norms": self.norms,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.norms = list(state["norms"])
        self.seconds = list(state["seconds"])

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def in_turn(sides: Sequence[Side]) -> Sequence[Side]:
    """The sides in the order of this step: the first to move in one step is the last in the next.

    So whatever else the machine does, and what the first leaves in the caches, meets them alike.
    """
    return sides if len(sides[0].seconds) % 2 == 0 else sides[::-1]
