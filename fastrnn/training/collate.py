"""Ragged samples to a padded batch with its lengths, as a DataLoader's `collate_fn`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def collate_ragged(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad sequences to the longest of them, and keep their lengths.

    ```
    batches = DataLoader(samples, batch_size=16, collate_fn=collate_ragged)
    for x, lengths, targets in batches:
        out, (h_n, c_n) = lstm(x, lengths=lengths)
    ```

    Args:
        samples: one or more pairs of a sequence `[T_i, I]` (any T_i, zero too) and its class.

    Returns:
        `x [B, T, I]`, batch first, with T the largest T_i and zeros as padding; `lengths [B]`,
        int64; `targets [B]`, int64. In the order of the samples, on their device; `lengths` stays
        on the CPU.

    Raises:
        ValueError: no samples, or sequences that are not `[T_i, I]` with one I.
    """
    if not samples:
        raise ValueError("expected at least one sample, got none")
    features = samples[0][0].shape[-1:]
    for i, (sequence, _) in enumerate(samples):
        if sequence.dim() != 2 or sequence.shape[-1:] != features:
            raise ValueError(
                f"each sequence must have shape [T, {', '.join(map(str, features)) or 'I'}] "
                f"(steps, features), got {list(sequence.shape)} in sample {i}"
            )
    sequences = [sequence for sequence, _ in samples]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    targets = torch.tensor([target for _, target in samples], device=sequences[0].device)
    return pad_sequence(sequences, batch_first=True), lengths, targets
