"""A measured search for the fastest way and tiles of an LSTM; opt-in, its results kept on disk.

Without it rules decide: choose.py says whether torch's own LSTM runs or the kernels, and an
analytical one (fastrnn_kernels/tiling.py) cuts the work of the Triton kernels. The
search launches every tile that fits the GPU, over the lengths of an example batch, and keeps the
fastest for this GPU and class of shapes: H up to the next multiple of 8, D, dtype, precision and
the number of sequences up to the next power of two. The lengths themselves do not enter, so one
example serves an epoch. Then the whole call is timed by both ways, forward alone and in training
(choosing/measured.py). From then on every LSTM of that class uses what was found, in this process
and in later ones. ``FASTRNN_TUNE=1`` measures the ways, not the tiles, at first sight of a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.choosing import measured
from fastrnn.choosing.backends import can_run_triton
from fastrnn.choosing.describe import describe
from fastrnn.compute import run_once
from fastrnn.input.arguments import Lengths
from fastrnn.input.packing import PackedLayout, ragged_layout
from fastrnn.lstm import LSTM
from fastrnn.ways.recurrence import autocast_dtype
from fastrnn.ways.widening import wide_hidden_size

if TYPE_CHECKING:
    from fastrnn_kernels.tuning import Tuned


@dataclass(frozen=True)
class TunedWay:
    """What timing the ways of a call found.

    Attributes:
        call: the class of calls, in words.
        way: the fastest.
        microseconds: of each.
    """

    call: str
    way: str
    microseconds: Mapping[str, float]


def tune(
    lstm: nn.Module,
    example: Tensor | PackedSequence | tuple[Any, ...],
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    training: bool = True,
    rounds: int = 20,
) -> list[Tuned | TunedWay]:
    """Measure what is fastest for an LSTM on this GPU, and use it from now on.

    First the tiles of the kernels' launches, then torch's own LSTM against the kernels. All layers
    have the same recurrence and share the result. Compiling the tiles takes most of the time,
    seconds each on a first call. Call it under autocast if the LSTM is used so. Parameters,
    gradients and torch's random state stay as they are.

    Args:
        lstm: on a GPU; or a model that holds some, which is run once to see how it calls them.
        example: a batch such as ``lstm`` is called with, not an unbatched sequence; of its values
            none matters. For a model its argument, or a tuple of them.
        lengths: as for ``lstm``; not for a model, and so are the next two.
        mask: see there.
        resets: see there.
        training: measure the backward launch and the training step as well. Default: True.
        rounds: samples of each tile and way; the median counts. Default: 20.

    Returns:
        A tile, its microseconds, and the same of the rule's tile, for the forward launch and then
        the backward one; then the ways and theirs, for inference and training. They are kept in
        ``$XDG_CACHE_HOME/fastrnn``, or ``~/.cache/fastrnn``.

    Raises:
        TypeError: ``lstm`` is no :class:`fastrnn.LSTM` and holds none.
        ValueError: ``rounds`` is not positive, or the example does not fit the LSTM.
        RuntimeError: the Triton kernels cannot run here, or not such an LSTM; with the reason.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not isinstance(lstm, LSTM):
        return _tune_model(lstm, example, training=training, rounds=rounds)
    if isinstance(example, Tensor) and not example.is_nested and example.dim() == 2:
        raise ValueError(
            "example must be a batch [T, B, I], [B, T, I], packed or jagged, got an unbatched "
            f"sequence {list(example.shape)}; give it a batch dimension"
        )
    assert not isinstance(example, tuple) or isinstance(example, PackedSequence)
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

    found: list[Tuned | TunedWay] = []
    found += tune_recurrence(
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
    for needs_grad in (False, True) if training else (False,):
        with torch.set_grad_enabled(needs_grad):
            asked, _ = lstm._read(example, None, lengths, mask, resets, False)
        times = measured.measure(asked, run_once, rounds=rounds)
        best = min(times, key=times.__getitem__)
        found.append(TunedWay(describe(asked), best, times))
    return found


def _tune_model(
    model: nn.Module, example: Any, *, training: bool, rounds: int
) -> list[Tuned | TunedWay]:
    """Every LSTM of a model, as one call of the model calls it."""
    calls: list[tuple[LSTM, tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, LSTM)
        calls.append((module, args, kwargs))

    lstms = [module for module in model.modules() if isinstance(module, LSTM)]
    if not lstms:
        raise TypeError(
            f"lstm must be a fastrnn.LSTM, or a model that holds one, got {type(model).__name__}; "
            "fastrnn.convert(model) makes every nn.LSTM of a model one"
        )
    hooks = [lstm.register_forward_pre_hook(note, with_kwargs=True) for lstm in lstms]
    whole = isinstance(example, tuple) and not isinstance(example, PackedSequence)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(*(example if whole else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    found: list[Tuned | TunedWay] = []
    for lstm, args, kwargs in calls:
        ragged = {name: kwargs.get(name) for name in ("lengths", "mask", "resets")}
        given = args[0] if args else kwargs["input"]
        found += tune(lstm, given, **ragged, training=training, rounds=rounds)
    return found
