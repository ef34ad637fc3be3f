"""Which way computes a call, and why not another: what ``auto`` decides, without computing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.choosing.choose import choose
from fastrnn.choosing.describe import describe, objections
from fastrnn.choosing.measured import kept_times
from fastrnn.choosing.request import Request
from fastrnn.input.arguments import Lengths
from fastrnn.lstm import LSTM
from fastrnn.ways.widening import wide_hidden_size

if TYPE_CHECKING:
    from fastrnn_kernels.tiling import Tile


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printed, a few lines.

    Attributes:
        call: the class of the call, in words.
        way: that computes it: one of :data:`fastrnn.choosing.choose.WAYS`.
        why: the reason.
        tiles: of the kernels' launches by pass, where they are the way.
        microseconds: of each way, where :func:`fastrnn.tune` has measured this class.
        others: what stands against other ways; those that could run and are slower are not in it.
    """

    call: str
    way: str
    why: str
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    microseconds: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.call, f"  {self.way}: {self.why}"]
        lines += [f"  {which} tile: {tile}" for which, tile in self.tiles.items()]
        lines += [f"  measured, {way}: {time:.0f} us" for way, time in self.microseconds.items()]
        lines += [f"  not {way}: {reason}" for way, reason in self.others.items()]
        return "\n".join(lines)


def explain(
    lstm: LSTM,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Lengths | int | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
) -> Explanation:
    """Say which way would compute a call, and why; nothing is computed.

    Call it as the module is called: under the same autocast, with or without gradients.

    Args:
        lstm: the module.
        input: as for the module, and so are all others.
        hx: see there.
        lengths: see there.
        mask: see there.
        resets: see there.
        return_cell_states: see there.

    Raises:
        TypeError: ``lstm`` is no :class:`fastrnn.LSTM`; other errors are those of the call.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(
            f"lstm must be a fastrnn.LSTM, got {type(lstm).__name__}; fastrnn.convert(model) makes "
            "every nn.LSTM of a model one"
        )
    asked, _ = lstm._read(input, hx, lengths, mask, resets, return_cell_states)
    choice = choose(asked)
    others = {way: reason for way, reason in objections(asked).items() if way != choice.way}
    tiles, times = {}, {}
    if "triton" not in objections(asked):
        times = kept_times(asked)
        tiles = _tiles(asked) if choice.way == "triton" else {}
    return Explanation(describe(asked), choice.way, choice.why, tiles, times, others)


def _tiles(asked: Request) -> dict[str, Any]:
    """Those of a layer's launches."""
    from fastrnn.ways.fused import input_precision
    from fastrnn_kernels.tile_store import stored_tile
    from fastrnn_kernels.tiling import Chip, backward_tile, forward_tile

    device, precision = asked.form.device, input_precision()
    size = wide_hidden_size(asked.hidden_size)
    shape = asked.form.batch, size, asked.stack.directions, asked.dtype
    chip = Chip.of(device)
    return {
        "forward": stored_tile("forward", *shape, device, precision)
        or forward_tile(*shape, chip, precision),
        "backward": stored_tile("backward", *shape, device, precision)
        or backward_tile(*shape, chip, precision),
    }
