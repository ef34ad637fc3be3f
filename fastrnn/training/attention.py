"""Attention after the LSTM: a decoder's outputs look at what the encoder read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrnn.input.arguments import Lengths, check_lengths


class LuongAttention(nn.Module):
    """Luong's global attention with the "general" score.

    `score(h, m_s) = h^T W_a m_s`, `a = softmax over the valid s`, `context = sum_s a_s m_s`; the
    attentional output is `tanh(W_c [context; h])`.

    It takes the LSTM's outputs and gives nothing back to it, so a whole run of decoder steps is one
    fused LSTM call and one attention. Input feeding, which Luong et al. found to help, would make
    every step wait for the one before, and is not done.

    ```
    memory, _ = encoder(x, lengths=lengths)
    attend = attention.over(memory, lengths)
    outputs, _ = teacher_forced_decode(decoder, embed, project, targets, start=0, attend=attend)
    ```

    Args:
        query_size: P, features of the decoder's outputs.
        memory_size: E, features of the encoder's outputs.
        output_size: A, features of the result. Default: `query_size`.

    Source: Luong, Pham, Manning. Effective approaches to attention-based neural machine
    translation. EMNLP 2015, section 3.1.
    """

    def __init__(self, query_size: int, memory_size: int, output_size: int | None = None) -> None:
        super().__init__()
        self.key = nn.Linear(memory_size, query_size, bias=False)
        self.combine = nn.Linear(memory_size + query_size, output_size or query_size, bias=False)

    def over(self, memory: Tensor, lengths: Lengths | None = None) -> Attending:
        """Attention bound to a batch of memories; `W_a m_s` is computed here, once.

        Args:
            memory: `[B, S, E]`, batch first. What stands beyond the lengths, NaN included, reaches
                neither result nor gradient.
            lengths: `[B]` integers in [0, S]. With 0 the context is zero. Default: all S.

        Returns:
            A function from outputs `[B, n, P]` to `[B, n, A]`, for any n.

        Raises:
            ValueError: a shape or a length that does not fit.
        """
        if memory.dim() != 3 or memory.shape[2] != self.key.in_features:
            raise ValueError(
                f"memory must have shape [B, S, {self.key.in_features}] (batch first), got "
                f"{list(memory.shape)}"
            )
        batch, steps = memory.shape[:2]
        beyond = None
        if lengths is not None:
            on_host = not isinstance(lengths, Tensor) or lengths.is_cpu
            checked = check_lengths(lengths, batch, steps, exact=on_host).to(memory.device)
            beyond = torch.arange(steps, device=memory.device) >= checked[:, None]
            memory = memory.masked_fill(beyond[:, :, None], 0)
        return Attending(self, memory, self.key(memory), beyond)


@dataclass(frozen=True, eq=False)
class Attending:
    """A :class:`LuongAttention` over the memories of one batch; made by its method `over`."""

    attention: LuongAttention
    memory: Tensor
    keys: Tensor
    beyond: Tensor | None

    def weights(self, h: Tensor) -> Tensor:
        """Where each step looks: `h [B, n, P]` to `[B, n, S]`, rows of sum 1 (0 at length 0)."""
        scores = h @ self.keys.transpose(1, 2)
        if self.beyond is None:
            return scores.softmax(-1)
        beyond = self.beyond[:, None]
        # Finite, so that a memory of length 0 has weights to be set to zero, and not NaN.
        weights = scores.masked_fill(beyond, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(beyond, 0)

    def __call__(self, h: Tensor) -> Tensor:
        """The attentional outputs: `h [B, n, P]` to `[B, n, A]`.

        Raises:
            ValueError: `h` has another batch than the memories.
        """
        if h.shape[0] != self.memory.shape[0]:
            raise ValueError(
                f"h must have shape [{self.memory.shape[0]}, n, P], as many sequences as there are "
                f"memories, got {list(h.shape)}"
            )
        context = self.weights(h) @ self.memory
        return self.attention.combine(torch.cat([context, h], -1)).tanh()  # type: ignore[no-any-return]
