"""What a layer costs on the CPU, by path: the models behind the choice between them.

Seconds, linear in rows, steps, calls and weights, for float32. Fitted to medians, interleaved, of
ragged batches of (I, H) from (12, 64) to (256, 512), B from 4 to 128 and T from 29 to 400, with
torch 2.13 on one thread of an AMD EPYC (Zen 3, AVX2): to 7 % or better; two threads fit worse. Only
ratios matter: between the paths, and between one more call and some more rows.

W below is a direction's weights, 4H (I + H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class RectangleCosts(NamedTuple):
    """Of the path in rectangles.py.

    Attributes:
        layer: once a direction: finding the rows, and moving them there and back.
        call: once a rectangle; oneDNN packs the weights anew in each, and compiles code for shapes
            it has not met, of which half is reckoned with.
        row: of a row, padding included.
        step: of a step of a rectangle, in rows.
    """

    layer: float
    call: float
    row: float
    step: float = 0.5


def rectangle_costs(
    input_size: int, hidden_size: int, *, train: bool, threads: int
) -> RectangleCosts:
    """The model of rectangles.py; its rows scale with the threads, its packing less well."""
    weights = 4 * hidden_size * (input_size + hidden_size)
    packing = weights / threads**0.7
    if train:
        return RectangleCosts(
            1060e-6, 330e-6 + 3.5e-9 * packing, (2.1e-6 + 0.0755e-9 * weights) / threads
        )
    return RectangleCosts(
        700e-6, 170e-6 + 1.2e-9 * packing, (0.9e-6 + 0.0254e-9 * weights) / threads
    )


def step_loop_seconds(
    sizes: Sequence[int],
    input_size: int,
    hidden_size: int,
    *,
    train: bool,
    threads: int,
    packed: bool = False,
) -> float:
    """The model of reference.py; its many small products use more threads badly.

    Args:
        sizes: active sequences at each step.
        input_size: I.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        threads: torch's.
        packed: the input is a PackedSequence, whose rows stay where they are. Default: False.
    """
    weights = 4 * hidden_size * (input_size + hidden_size)
    scale = float(threads**-0.7)
    if train:
        layer, step, row = 1.3e-3, 33e-6, 2.4e-6 + 0.080e-9 * weights
        layer, step = layer + 24e-9 * weights, step + 0.12e-9 * weights
    else:
        layer, step, row = 0.1e-3, 37e-6, 1.0e-6 + 0.034e-9 * weights
        layer, step = layer + 8.9e-9 * weights, step + 0.075e-9 * weights
    if packed:
        layer -= 0.6e-3 if train else 0.3e-3
    return layer + len(sizes) * step + sum(sizes) * row * scale


def worth_padding(
    padded_rows: int, input_size: int, hidden_size: int, *, train: bool, threads: int
) -> bool:
    """Whether computing the padding costs less than leaving it out: index work, plan and copies.

    Args:
        padded_rows: steps of the padded batch that are not valid.
        input_size: I.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        threads: torch's.
    """
    cost = rectangle_costs(input_size, hidden_size, train=train, threads=threads)
    return padded_rows * cost.row <= (2.0e-3 if train else 0.75e-3)
