"""What a decoded batch is, and greedy decoding: at each step the likeliest token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrnn.training.decoder import States, Transform, check_decoder, run_decoder, scorer


class Decoded(NamedTuple):
    """Sequences that a model wrote.

    Attributes:
        tokens: int64 `[B, n]` (`[B, K, n]` from a beam), n the longest of them; after a sequence's
            end it is filled with the end token.
        lengths: int64 `[B]` (`[B, K]`), tokens before the end.
        scores: `[B]` (`[B, K]`), the log-probability of the sequence, its end included where it
            came; a beam's divided by the length penalty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


@torch.no_grad()
def greedy_decode(
    lstm: nn.RNNBase,
    embed: Transform,
    project: Transform,
    state: States,
    *,
    start: Tensor | int,
    end: int,
    max_steps: int,
    attend: Transform | None = None,
) -> Decoded:
    """Write a sequence for each state of a batch, token by token, until all have ended.

    `token_t = argmax project(attend(lstm(embed(token_{t-1}))))`. One LSTM call a step for the whole
    batch; each waits for the GPU, to see whether all have ended. Without gradients. Call
    `model.eval()` before, as for any evaluation.

    Args:
        lstm: a unidirectional fastrnn.LSTM or nn.LSTM, batch first or not.
        embed: tokens `[B, 1]` to `[B, 1, I]`.
        project: `[B, 1, P]` (or what `attend` returns) to scores `[B, 1, V]`.
        state: `(h_0 [L, B, P], c_0 [L, B, H])`.
        start: the first input, a token or one for each sequence, `[B]`.
        end: the token that ends a sequence.
        max_steps: the most tokens written, the end included; a sequence may have none by then.
        attend: `[B, 1, P]` to `[B, 1, A]`. Default: none.

    Raises:
        ValueError: a bidirectional LSTM, or `max_steps` below 1.
    """
    check_decoder(lstm)
    check_max_steps(max_steps)
    score = scorer(project, attend)
    batch, device = state[0].shape[1], state[0].device
    token = torch.as_tensor(start, device=device).expand(batch)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    total = state[0].new_zeros(batch)
    written: list[Tensor] = []
    for _ in range(max_steps):
        out, state = run_decoder(lstm, embed(token[:, None]), state)
        best, token = score(out)[:, 0].log_softmax(-1).max(-1)
        total = total + best.masked_fill(~alive, 0)
        token = token.masked_fill(~alive, end)
        written.append(token)
        alive = alive & (token != end)
        if not alive.any():
            break
    return trimmed(torch.stack(written, 1), total, end)


def check_max_steps(max_steps: int) -> None:
    """Refuse to write nothing."""
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def trimmed(tokens: Tensor, scores: Tensor, end: int) -> Decoded:
    """Tokens `[..., n]` that hold `end` from each one's end on, cut to the longest of them."""
    lengths = (tokens != end).sum(-1)
    longest = int(lengths.max()) if lengths.numel() else 0
    return Decoded(tokens[..., :longest], lengths, scores)
