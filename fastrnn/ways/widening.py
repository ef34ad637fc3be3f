"""Hidden sizes that are no multiple of 8, which the kernels compute at the next one that is.

Rows then begin at multiples of 16 bytes in every dtype of the kernels, and are read and written
16 bytes at a time, with one address for several numbers. Else each number needs an address of its
own, for which there are not the registers (kernels/README.md, Limits).

The units that are added have zero weights, biases and initial states, and stay exactly zero::

    a_g = 0,   g = tanh(0) = 0,   c_t = f c_{t-1} + i g = 0,   h_t = o tanh(0) = 0

and so do their gradients: no other unit notices them. They are added and cut off by differentiable
operations, so derivatives of any order are right.

Limits: for finite numbers. An infinite input makes its whole sequence NaN from there on, because
0 inf is NaN, where at a multiple of 8 an infinite gate only saturates. A layer at 8 k + 1 units
does the work of 8 k + 8, and its weights are copied in every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import LayerWeights
from fastrnn.ways.recurrence import LayerOutput

# Numbers of 16 bits in 16 bytes; of 32 bits half as many would do.
UNITS = 8


def wide_hidden_size(hidden_size: int) -> int:
    """The hidden size that the kernels are asked for: the next multiple of 8."""
    return -(-hidden_size // UNITS) * UNITS


def widen(
    weights: Sequence[LayerWeights], h_0: Tensor, c_0: Tensor
) -> tuple[Sequence[LayerWeights], Tensor, Tensor]:
    """A layer with zero units behind its own; the layer itself where none are missing.

    Args:
        weights: of each direction, without a projection.
        h_0: ``[D, S, H]``.
        c_0: ``[D, S, H]``.

    Returns:
        The same three at :func:`wide_hidden_size`.
    """
    hidden_size = weights[0].hidden_size
    missing = wide_hidden_size(hidden_size) - hidden_size
    if not missing:
        return weights, h_0, c_0

    def wide(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else _widen_gates(bias, missing)

    wider = [
        LayerWeights(
            _widen_gates(direction.ih, missing, 0),
            _widen_gates(direction.hh, missing, missing),
            wide(direction.bias_ih),
            wide(direction.bias_hh),
        )
        for direction in weights
    ]
    return wider, functional.pad(h_0, (0, missing)), functional.pad(c_0, (0, missing))


def _widen_gates(weight: Tensor, units: int, *columns: int) -> Tensor:
    """``[4H, ...]`` with zero units behind those of each gate, and zero columns at the right."""
    pads = [pad for more in (*columns, units) for pad in (0, more)]
    return functional.pad(weight.unflatten(0, (4, -1)), pads).flatten(0, 1)


def narrow(output: LayerOutput, hidden_size: int) -> LayerOutput:
    """What a layer computed, without the units that :func:`widen` added.

    Returns:
        Copies, contiguous: what is kept for backward is wider, and shares no memory with them. The
        output itself where no units were added.
    """
    width = output.c_n.shape[-1]
    if width == hidden_size:
        return output

    def own(states: Tensor) -> Tensor:
        by_direction: Tensor = states.unflatten(-1, (-1, width))[..., :hidden_size]
        return by_direction.clone(memory_format=torch.contiguous_format).flatten(-2)

    return LayerOutput(
        own(output.h),
        own(output.h_n),
        own(output.c_n),
        None if output.c is None else own(output.c),
    )
