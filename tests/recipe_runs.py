"""What a recipe's run has left behind, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def checkpoint(out: Path) -> dict[str, Any]:
    """The checkpoint in a run's directory."""
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def flat(value: Any) -> Any:
    """A checkpoint without its times, as plain values that can be compared exactly."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [flat(part) for part in value]
    return value
