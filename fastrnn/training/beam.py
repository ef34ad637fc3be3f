"""Beam search: the best of several sequences kept side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastrnn.training.decoder import States, Transform, check_decoder, run_decoder, scorer
from fastrnn.training.decoding import Decoded, check_max_steps, trimmed


@torch.no_grad()
def beam_decode(
    lstm: nn.RNNBase,
    embed: Transform,
    project: Transform,
    state: States,
    *,
    start: Tensor | int,
    end: int,
    max_steps: int,
    width: int = 4,
    length_penalty: float = 0.0,
    attend: Transform | None = None,
) -> Decoded:
    """Write the K likeliest sequences that a beam finds for each state of a batch, best first.

    At each step every unfinished sequence of the beam is continued by every token, finished ones
    stay as they are, and the `width` best of all these remain, by `log p / length^length_penalty`
    (length with the end). It stops when all have ended. One LSTM call a step for the whole batch;
    each waits for the GPU. Without gradients. Call `model.eval()` before, as for any evaluation.

    It is exact where the beam is as wide as there are sequences; with `width=1` it is greedy.

    Args:
        lstm: a unidirectional fastrnn.LSTM or nn.LSTM, batch first or not.
        embed: tokens `[B * K, 1]` to `[B * K, 1, I]`.
        project: `[B, K, P]` (or what `attend` returns) to scores `[B, K, V]`, each by itself.
        state: `(h_0 [L, B, P], c_0 [L, B, H])`, of the batch, not of the beams.
        start: the first input, a token or one for each sequence of the batch, `[B]`.
        end: the token that ends a sequence.
        max_steps: the most tokens written, the end included.
        width: K, sequences kept. Default: 4.
        length_penalty: 0 ranks by probability, which favours short sequences; 1 by the mean
            log-probability of a token. Default: 0.0.
        attend: `[B, K, P]` to `[B, K, A]`: the sequences of a beam are so many queries to one
            memory, which is not copied. Default: none.

    Returns:
        `tokens [B, K, n]`, `lengths [B, K]`, `scores [B, K]`. A score of -inf says that there are
        fewer than K sequences.

    Raises:
        ValueError: a bidirectional LSTM, `max_steps` or `width` below 1, or a length penalty that
            is negative or not finite.
    """
    check_decoder(lstm)
    check_max_steps(max_steps)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be finite and at least 0, got {length_penalty}")
    score = scorer(project, attend)
    batch, device = state[0].shape[1], state[0].device
    state = state[0].repeat_interleave(width, 1), state[1].repeat_interleave(width, 1)
    token = torch.as_tensor(start, device=device).expand(batch)[:, None].expand(batch, width)
    tokens = torch.empty(batch, width, 0, dtype=torch.int64, device=device)
    # All sequences of a beam are the same one at first: let one of them be continued.
    total = torch.full((batch, width), -math.inf, device=device, dtype=state[0].dtype)
    total[:, 0] = 0
    alive = torch.ones(batch, width, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, width, dtype=torch.int64, device=device)
    for _ in range(max_steps):
        out, state = run_decoder(lstm, embed(token.flatten()[:, None]), state)
        log_p = score(out.view(batch, width, -1)).log_softmax(-1)
        words = log_p.shape[-1]
        # An ended sequence has one continuation, the end again, which costs nothing.
        ended = torch.full_like(log_p[0, 0], -math.inf)
        ended[end] = 0
        log_p = torch.where(alive[:, :, None], log_p, ended)
        lengths = lengths + alive
        candidates = total[:, :, None] + log_p
        ranks = candidates / lengths[:, :, None].to(candidates) ** length_penalty
        chosen = ranks.flatten(1).topk(width, 1).indices
        parent = chosen // words
        token = chosen % words
        total = candidates.flatten(1).gather(1, chosen)
        lengths = lengths.gather(1, parent)
        alive = alive.gather(1, parent) & (token != end)
        tokens = tokens.gather(1, parent[:, :, None].expand_as(tokens))
        tokens = torch.cat([tokens, token[:, :, None]], 2)
        rows = (torch.arange(batch, device=device)[:, None] * width + parent).flatten()
        state = state[0].index_select(1, rows), state[1].index_select(1, rows)
        if not alive.any():
            break
    scores = total / lengths.to(total) ** length_penalty
    return trimmed(tokens, scores, end)
