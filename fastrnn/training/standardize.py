"""Features with mean 0 and variance 1, measured on valid steps only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each feature.

    `y = (x - mean) / std`, with `mean` and `std` those of the valid steps that :meth:`fit` saw.
    Padding in the data measured would pull both towards it; padding in `x` is transformed like
    everything else, and an LSTM that is given the lengths never reads it.

    `mean` and `std` are buffers: `state_dict` saves them, `to` moves them, no optimizer changes
    them.

    Args:
        features: I, the number of features. Until :meth:`fit` or `load_state_dict`, `mean` is 0
            and `std` is 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    @classmethod
    def fit(cls, sequences: Iterable[Tensor]) -> Standardize:
        """Measure the training sequences.

        Args:
            sequences: of shape `[T_i, I]`, without padding; at least one step in all.

        Returns:
            A module whose `std` is the population's, 1 for a feature that never varies. Computed
            in float64, kept in the sequences' dtype and on their device.

        Raises:
            ValueError: no step at all, sequences that are not `[T_i, I]` with one I, or a value
                that is NaN or infinite.
        """
        sequences = list(sequences)
        shapes = {(sequence.dim(), sequence.shape[-1:]) for sequence in sequences}
        if len(shapes) != 1 or sequences[0].dim() != 2:
            found = ", ".join(sorted({str(list(sequence.shape)) for sequence in sequences}))
            raise ValueError(
                "sequences must have shape [T, I] (steps, features) with one I, "
                f"got {found or 'none'}"
            )
        steps = torch.cat(sequences)
        if not len(steps):
            raise ValueError("expected at least one step to measure, got sequences of length 0")
        if not steps.isfinite().all():
            raise ValueError(
                f"sequences must be finite, got {int((~steps.isfinite()).sum())} values that are "
                "NaN or infinite: leave these steps out, or fill them in"
            )
        wide = steps.double()
        constant = (steps == steps[0]).all(0)
        standardize = cls(steps.shape[1])
        standardize.mean = wide.mean(0).to(steps)
        standardize.std = wide.std(0, correction=0).to(steps).masked_fill(constant, 1.0)
        return standardize

    def forward(self, x: Tensor) -> Tensor:
        """Transform features in the last dimension: `[..., I]` to `[..., I]`."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The number of features, for `repr`."""
        return str(len(self.mean))
