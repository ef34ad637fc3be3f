"""A measured search for the tiles of one LSTM's launches; opt-in, its results kept on disk.

Without it an analytical rule (fastrnn_kernels/tiling.py) cuts the work of the Triton kernels. The
search launches every tile that fits the GPU, over the lengths of an example batch, and keeps the
fastest for this GPU and class of shapes: H up to the next multiple of 8, D, dtype, precision and
the number of sequences up to the next power of two. The lengths themselves do not enter, so one
example serves an epoch. From then on every LSTM of that class uses it, in this process and in later
ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.choosing.backends import can_run_triton
from fastrnn.input.arguments import Lengths
from fastrnn.input.packing import PackedLayout, ragged_layout
from fastrnn.lstm import LSTM
from fastrnn.ways.recurrence import autocast_dtype
from fastrnn.ways.widening import wide_hidden_size

if TYPE_CHECKING:
    from fastrnn_kernels.tuning import Tuned


def tune(
    lstm: LSTM,
    example: Tensor | PackedSequence,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    training: bool = True,
    rounds: int = 20,
) -> list[Tuned]:
    """Measure which tiles are fastest for an LSTM on this GPU, and use them from now on.

    All layers have the same recurrence and share the result. Compiling the tiles takes most of the
    time, seconds each on a first call. Call it under autocast if the LSTM is used so. Parameters,
    gradients and torch's random state stay as they are.

    Args:
        lstm: on a GPU.
        example: a batch such as ``lstm`` is called with, not an unbatched sequence; of its values
            none matters.
        lengths: as for ``lstm``.
        mask: as for ``lstm``.
        resets: as for ``lstm``.
        training: measure the backward launch as well. Default: True.
        rounds: samples of each tile; the median counts. Default: 20.

    Returns:
        For the forward launch, then the backward one: the tile, its microseconds, and the same of
        the rule's tile. They are kept in ``$XDG_CACHE_HOME/fastrnn``, or ``~/.cache/fastrnn``.

    Raises:
        TypeError: ``lstm`` is no :class:`fastrnn.LSTM`.
        ValueError: ``rounds`` is not positive, or the example does not fit the LSTM.
        RuntimeError: the Triton kernels cannot run here, or not such an LSTM; with the reason.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(
            f"lstm must be a fastrnn.LSTM, got {type(lstm).__name__}; fastrnn.convert(model) makes "
            "every nn.LSTM of a model one"
        )
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if isinstance(example, Tensor) and not example.is_nested and example.dim() == 2:
        raise ValueError(
            "example must be a batch [T, B, I], [B, T, I], packed or jagged, got an unbatched "
            f"sequence {list(example.shape)}; give it a batch dimension"
        )
    form = lstm._form(example)
    dtype = form.data.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(form.device) or dtype
    directions = 2 if lstm.bidirectional else 1
    reason = can_run_triton(form.device, dtype, lstm.hidden_size, directions, lstm.proj_size)
    if reason is None and lstm.backend == "reference":
        reason = 'this LSTM has backend="reference"'
    if reason is not None:
        raise RuntimeError(f"nothing to tune: {reason}. Only the Triton kernels have tiles")
    layout = ragged_layout(form, lengths, mask, resets)
    assert isinstance(layout, PackedLayout)  # nobody asked for it to be cut
    if not layout.rows or not layout.sequences:
        raise ValueError("example must have at least one valid step")

    from fastrnn.ways.fused import input_precision
    from fastrnn_kernels.tuning import tune_recurrence

    return tune_recurrence(
        layout.batch_sizes.to(form.device),
        layout.sequences,
        layout.rows,
        wide_hidden_size(lstm.hidden_size),
        directions,
        dtype,
        input_precision=input_precision(),
        training=training,
        rounds=rounds,
    )
