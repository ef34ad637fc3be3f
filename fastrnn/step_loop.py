"""A layer by the step loop, with all that it saves in tensors of shapes known beforehand.

``[N, D, ...]`` over all rows allocated, zeros past the valid ones: what an operator can promise
while it is traced, and what the kernels save as well, so that this can stand in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastrnn.recurrence import (
    Call,
    DirectionRun,
    LayerOutput,
    OutputGradients,
    pad_rows,
    run_backward,
    run_forward,
)


class States(NamedTuple):
    """What a layer went through; None where nobody needs it.

    Attributes:
        c: ``[N, D, H]`` cell states.
        gates: ``[N, D, 4H]``, activated.
        tanh_c: ``[N, D, H]``.
    """

    c: Tensor | None
    gates: Tensor | None
    tanh_c: Tensor | None


def steps_forward(
    call: Call, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
) -> tuple[LayerOutput, States]:
    """Run every direction; rows past ``sum(call.sizes)`` are not read.

    The states come in the dtype they are computed in; where they are an output, they are not in
    ``LayerOutput.c`` too.
    """
    count, valid = rows.shape[0], sum(call.sizes)
    output, runs = run_forward(call, rows[:valid], h_0, c_0, flat, save=save)
    output = output._replace(h=pad_rows(output.h, count), c=None)
    if not (save or call.cell_states):
        return output, States(None, None, None)
    parts = zip(*((run.c, *run.saved) for run in runs), strict=True)
    states = [_beside([part for part in each if part is not None], count) for each in parts]
    return output, States(*states, *[None] * (3 - len(states)))


def _beside(parts: Sequence[Tensor], count: int) -> Tensor:
    """``[n, F]`` of each direction to ``[count, D, F]``."""
    states = parts[0].new_zeros(count, len(parts), parts[0].shape[1])
    for index, part in enumerate(parts):
        states[: part.shape[0], index] = part
    return states


def steps_backward(
    call: Call,
    grads: OutputGradients,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    h: Tensor,
    states: States,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of rows, h_0, c_0 and each weight; what ``states`` lack is computed again.

    Args:
        call: the layer's.
        grads: that reach its outputs; None is zero.
        rows: its input, and so are the next three.
        h_0: see there.
        c_0: see there.
        flat: see there.
        h: ``[N, D * P]``, its output.
        states: with ``c`` at least.
        needs: whether each gradient is wanted.
    """
    valid = sum(call.sizes)
    c, gates, tanh_c = states
    assert c is not None
    runs = []
    for index in range(call.directions):
        saved: tuple[Tensor, ...] = ()
        if gates is not None and tanh_c is not None:
            saved = gates[:valid, index], tanh_c[:valid, index]
        runs.append(DirectionRun(c[:valid, index], saved))
    grads = grads.of_rows(valid)
    d_rows, *others = run_backward(
        call, grads, rows[:valid], h_0, c_0, flat, h[:valid], runs, needs
    )
    return [None if d_rows is None else pad_rows(d_rows, rows.shape[0]), *others]
