"""What every decoding loop does with its LSTM: run some steps, and hand the state on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

States: TypeAlias = tuple[Tensor, Tensor]
"""`(h, c)`, `[L, B, P]` and `[L, B, H]`."""

Transform: TypeAlias = Callable[[Tensor], Tensor]


def check_decoder(lstm: nn.RNNBase) -> None:
    """Refuse an LSTM that would read the steps that it is to write.

    Raises:
        ValueError: it is bidirectional.
    """
    if lstm.bidirectional:
        raise ValueError(
            "a decoder must run forward only, got an LSTM with bidirectional=True: its output at a "
            "step would depend on the steps after it"
        )


def run_decoder(
    lstm: nn.RNNBase, x: Tensor, state: States | None, lengths: Tensor | None = None
) -> tuple[Tensor, States]:
    """Run `lstm` over `x [B, n, I]`, whatever its `batch_first`.

    Args:
        lstm: fastrnn.LSTM, or nn.LSTM where no `lengths` are given.
        x: embedded inputs `[B, n, I]`.
        state: before the first step. None: zeros.
        lengths: `[B]`, the valid steps of each sequence. Default: all.

    Returns:
        The outputs `[B, n, P]` and the state after each sequence's last valid step.
    """
    ragged = {} if lengths is None else {"lengths": lengths}
    out, state = lstm(x if lstm.batch_first else x.transpose(0, 1), state, **ragged)
    return out if lstm.batch_first else out.transpose(0, 1), state


def scorer(project: Transform, attend: Transform | None) -> Transform:
    """From LSTM outputs `[B, n, P]` to scores `[B, n, V]`, by way of the attention if any."""
    if attend is None:
        return project
    return lambda h: project(attend(h))
