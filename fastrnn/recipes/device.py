"""The device that `--device` names."""

from __future__ import annotations

import torch

from fastrnn.recipes.errors import RecipeError


def find_device(name: str) -> torch.device:
    """The device, after a number was put there and read back.

    Raises:
        RecipeError: torch does not know the device, or cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"cannot use --device {name} here ({reason}): try --device cpu"
        ) from error
    return device
