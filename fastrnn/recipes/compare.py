"""`--compare`: the same training by torch alone, step by step beside fastrnn's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.recipes.side import Side
from fastrnn.recipes.tables import new_table

if TYPE_CHECKING:
    from rich.console import Console


class PackedLSTM(nn.LSTM):
    """nn.LSTM as torch's documentation has it for ragged batches, called as fastrnn.LSTM is.

    It packs, runs, and pads again; of fastrnn's arguments it takes `lengths`.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :class:`fastrnn.LSTM`, for a padded `x` and `lengths [B]` on the CPU, or none."""
        if lengths is None:
            return super().forward(x, hx)
        packed = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        out, states = super().forward(packed, hx)
        steps = x.shape[1 if self.batch_first else 0]
        padded, _ = pad_packed_sequence(out, self.batch_first, total_length=steps)
        return padded, states


class CompactedLSTM(nn.LSTM):
    """nn.LSTM for batches with holes, as one does it by hand; called as fastrnn.LSTM is.

    Each sequence's valid steps are moved together, packed, run, padded, and moved back. Of
    fastrnn's arguments it takes `mask`; batch first.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :class:`fastrnn.LSTM`, for `x [B, T, I]` and `mask [B, T]`, each row with a step."""
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # valid steps first
        compact = x.gather(1, order[..., None].expand_as(x))
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(compact, lengths, batch_first=True, enforce_sorted=False)
        out, states = super().forward(packed, hx)
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        spread = torch.zeros_like(padded).scatter(1, order[..., None].expand_as(padded), padded)
        return spread, states


def compare_sides(
    console: Console,
    ours: Side,
    theirs: Side,
    steps: int,
    metrics: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Print two tables: the sides' time and results, and how far apart their losses are.

    Args:
        console: rich's console to print to.
        ours: fastrnn's side.
        theirs: torch's side, trained from the same weights on the same batches.
        steps: in an epoch. The first epoch's differences are shown apart: they are rounding, and
            training amplifies them afterwards.
        metrics: rows of the recipe's own: a name, our value, their value.
    """
    sides = (ours, theirs)
    times = new_table("The same training twice, in turn step by step", ours.name, theirs.name, "")
    medians = [statistics.median(side.seconds) for side in sides]
    ratio = medians[1] / medians[0]
    words = f"{ratio:.2f}× as fast" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    times.add_row("step, median", *(f"{1e3 * median:.1f} ms" for median in medians), words)
    times.add_row("step, p20 – p80", *(_spread(side.seconds) for side in sides))
    times.add_row("all steps", *(f"{sum(side.seconds):.1f} s" for side in sides))
    last = [statistics.fmean(side.losses[-steps:]) for side in sides]
    times.add_row("loss, last epoch", *(f"{loss:.5f}" for loss in last))
    for row in metrics:
        times.add_row(*row)

    losses = new_table("Difference of the losses, step by step", "mean", "largest", "at a loss of")
    apart = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    for name, count in (("first epoch", steps), ("all epochs", len(apart))):
        part = apart[:count]
        loss = theirs.losses[part.index(max(part))]
        losses.add_row(name, f"{statistics.fmean(part):.1e}", f"{max(part):.1e}", f"{loss:.3f}")
    console.print()
    console.print(times)
    console.print(losses)


def _spread(seconds: Sequence[float]) -> str:
    """The 20th and the 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return f"{1e3 * fifths[0]:.1f} – {1e3 * fifths[-1]:.1f} ms"
