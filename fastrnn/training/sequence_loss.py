"""The loss of a ragged batch: the mean over its valid steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrnn.input.arguments import Lengths, check_lengths


def sequence_loss(
    outputs: Tensor,
    targets: Tensor,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    batch_first: bool = True,
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Average a loss over the valid steps: each counts once, in however long a sequence.

    `sum over valid steps of loss(outputs_bt, targets_bt) / number of valid steps`. What stands at
    other steps, NaN or -100 included, reaches neither the loss nor a gradient; it still costs time.

    Args:
        outputs: `[B, T, ...]`: scores `[B, T, V]` for the default loss.
        targets: `[B, T, ...]`: classes `[B, T]`, int64, for the default loss.
        lengths: `[B]` integers in [0, T], the leading steps that are valid. Default: all.
        mask: bool `[B, T]`, True = valid, instead of `lengths`.
        batch_first: whether outputs, targets and mask are `[B, T, ...]` rather than
            `[T, B, ...]`. Default: True.
        loss: `loss(outputs [N, ...], targets [N, ...], reduction="none")`, as the losses of
            torch.nn.functional are called, to `[N, ...]`. A step's loss is the mean over what
            follows N. Default: `cross_entropy`.

    Returns:
        The mean, a tensor of shape `[]`. Nothing here waits for a GPU; there, and under
        `torch.compile`, a batch without a valid step gives NaN.

    Raises:
        ValueError: both `lengths` and `mask`, a shape that does not fit, or no valid step.
    """
    if lengths is not None and mask is not None:
        raise ValueError("expected lengths or mask, got both: a mask says all that lengths say")
    if not batch_first:
        outputs, targets = outputs.transpose(0, 1), targets.transpose(0, 1)
        mask = None if mask is None else mask.t()
    if outputs.dim() < 2 or targets.shape[:2] != outputs.shape[:2]:
        raise ValueError(
            "outputs and targets must agree in batch and steps, got (batch first) outputs "
            f"{list(outputs.shape)} and targets {list(targets.shape)}"
        )
    valid = _valid(outputs, lengths, mask)
    padding = (~valid).flatten()
    rows = [_blank(part.flatten(0, 1), padding) for part in (outputs, targets)]
    losses = loss(*rows, reduction="none")
    losses = _blank(losses, padding)
    if losses.dim() > 1:
        losses = losses.flatten(1).mean(1)
    return losses.sum() / valid.sum()


def _valid(outputs: Tensor, lengths: Lengths | None, mask: Tensor | None) -> Tensor:
    """Which steps count: bool `[B, T]`, on the outputs' device."""
    batch, steps = outputs.shape[:2]
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch, steps):
            raise ValueError(
                f"mask must be bool of shape [{batch}, {steps}] (batch first), got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        valid = mask.to(outputs.device)
    else:
        given = [steps] * batch if lengths is None else lengths
        on_host = not isinstance(given, Tensor) or given.is_cpu
        exact = on_host and not torch.compiler.is_compiling()
        checked = check_lengths(given, batch, steps, exact).to(outputs.device)
        valid = torch.arange(steps, device=outputs.device) < checked[:, None]
    if valid.is_cpu and not torch.compiler.is_compiling() and not valid.any():
        raise ValueError(
            "expected at least one valid step to average over, got none: leave such a batch out"
        )
    return valid


def _blank(rows: Tensor, padding: Tensor) -> Tensor:
    """`rows [N, ...]` with zeros where `padding [N]`."""
    return rows.masked_fill(padding[(...,) + (None,) * (rows.dim() - 1)], 0)
