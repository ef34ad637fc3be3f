"""What a layer costs on the CPU, by path: the models behind the choice between them.

Seconds, linear in pieces (rectangles, or steps), in rows, and in the weights; fitted by ``python -m
bench costs`` on one and on two threads with torch 2.13, to ragged batches of (I, H) from (12, 64)
to (256, 512), B from 4 to 128 and T from 29 to 200. AVX2: an AMD EPYC (Zen 3), in earlier forms
of the models; these also stand for processors without a fit of their own. AVX512, and bfloat16
there: an Intel Xeon (Sapphire Rapids). A tenth off in the mean; padded's fixed costs in float32 are
less than was fitted, by what that path has gained since. Only ratios matter: between the paths, and
between one more call and some more rows. The path chosen takes 2 to 5 % longer than the best.

W below is a direction's weights, 4H (I + H).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch


class LayerCosts(NamedTuple):
    """Seconds of a path, for given weights and threads.

    Attributes:
        layer: once a direction: finding the rows, and moving them there and back.
        call: once a rectangle, or a step of the loop or of a padded batch. oneDNN packs the weights
            anew in each rectangle, and compiles code for shapes it has not met, of which half is
            reckoned with.
        row: of a row, padding included.
        step: of a step of a rectangle, in rows.
    """

    layer: float
    call: float
    row: float
    step: float = 0.5


Path: TypeAlias = Literal["rectangles", "padded", "loop"]
PATHS: tuple[Path, ...] = get_args(Path)
# Of layer, call and row: a + b W as (a, b); on one thread, and on two.
_Fit: TypeAlias = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
_FITS: dict[tuple[str, Path, bool], tuple[_Fit, _Fit]] = {
    ("AVX2", "rectangles", True): (
        ((1060e-6, 0.0), (330e-6, 3.5e-9), (2.1e-6, 75.5e-12)),
        ((1060e-6, 0.0), (330e-6, 2.2e-9), (1.05e-6, 37.8e-12)),
    ),
    ("AVX2", "rectangles", False): (
        ((700e-6, 0.0), (170e-6, 1.2e-9), (0.9e-6, 25.4e-12)),
        ((700e-6, 0.0), (170e-6, 0.74e-9), (0.45e-6, 12.7e-12)),
    ),
    ("AVX2", "padded", True): (
        ((0.0, 0.0), (0.0, 0.0), (2.31e-6, 83e-12)),
        ((0.0, 0.0), (0.0, 0.0), (1.16e-6, 41.6e-12)),
    ),
    ("AVX2", "padded", False): (
        ((290e-6, 0.0), (0.0, 0.0), (1.0e-6, 28e-12)),
        ((290e-6, 0.0), (0.0, 0.0), (0.5e-6, 14e-12)),
    ),
    ("AVX2", "loop", True): (
        ((1300e-6, 24e-9), (33e-6, 0.12e-9), (2.4e-6, 80e-12)),
        ((1300e-6, 24e-9), (33e-6, 0.12e-9), (1.48e-6, 49e-12)),
    ),
    ("AVX2", "loop", False): (
        ((100e-6, 8.9e-9), (37e-6, 0.075e-9), (1.0e-6, 34e-12)),
        ((100e-6, 8.9e-9), (37e-6, 0.075e-9), (0.62e-6, 21e-12)),
    ),
    ("AVX512", "rectangles", True): (
        ((1030e-6, 15e-9), (530e-6, 4.0e-9), (0.65e-6, 61e-12)),
        ((1570e-6, 12e-9), (720e-6, 2.3e-9), (0.59e-6, 47e-12)),
    ),
    ("AVX512", "rectangles", False): (
        ((330e-6, 6.8e-9), (300e-6, 0.9e-9), (0.35e-6, 14.8e-12)),
        ((790e-6, 8.7e-9), (310e-6, 0.3e-9), (0.18e-6, 12.2e-12)),
    ),
    ("AVX512", "padded", True): (
        ((1000e-6, 0.0), (0.0, 0.06e-9), (0.43e-6, 68e-12)),
        ((1200e-6, 0.0), (0.0, 0.0), (0.23e-6, 54e-12)),
    ),
    ("AVX512", "padded", False): (
        ((0.0, 13e-9), (0.0, 0.0), (0.36e-6, 12.2e-12)),
        ((100e-6, 2.4e-9), (3.7e-6, 0.03e-9), (0.17e-6, 12.6e-12)),
    ),
    ("AVX512", "loop", True): (
        ((500e-6, 0.0), (53e-6, 0.29e-9), (1.62e-6, 54e-12)),
        ((0.0, 12.5e-9), (73e-6, 0.0), (2.06e-6, 59e-12)),
    ),
    ("AVX512", "loop", False): (
        ((330e-6, 16e-9), (19e-6, 0.03e-9), (0.62e-6, 17e-12)),
        ((430e-6, 0.0), (32e-6, 0.07e-9), (0.56e-6, 22e-12)),
    ),
    ("bfloat16", "rectangles", True): (
        ((600e-6, 59e-9), (650e-6, 2.8e-9), (0.6e-6, 14e-12)),
        ((670e-6, 57e-9), (1020e-6, 0.0), (0.9e-6, 10e-12)),
    ),
    ("bfloat16", "rectangles", False): (
        ((470e-6, 7.8e-9), (280e-6, 1.4e-9), (0.42e-6, 4.4e-12)),
        ((590e-6, 7.3e-9), (540e-6, 0.0), (0.27e-6, 3.6e-12)),
    ),
    ("bfloat16", "padded", True): (
        ((1120e-6, 6.5e-9), (0.0, 0.19e-9), (0.44e-6, 21e-12)),
        ((140e-6, 9.1e-9), (33e-6, 0.08e-9), (0.51e-6, 18e-12)),
    ),
    ("bfloat16", "padded", False): (
        ((390e-6, 1.4e-9), (0.0, 0.05e-9), (0.31e-6, 5.0e-12)),
        ((510e-6, 3.2e-9), (8.8e-6, 0.0), (0.1e-6, 3.7e-12)),
    ),
}
# What the loop's layer does not cost where the rows are packed as they come, in training or not.
_UNMOVED = {True: 0.6e-3, False: 0.3e-3}


def _kind(path: Path, dtype: torch.dtype) -> str:
    """Which fit holds on this processor for rows computed in ``dtype``."""
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.bfloat16 and path != "loop":
        return "bfloat16"
    return "AVX512" if capability.startswith("AVX512") else "AVX2"


@functools.lru_cache(maxsize=64)
def layer_costs(
    path: Path,
    input_size: int,
    hidden_size: int,
    *,
    train: bool,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> LayerCosts:
    """The model of a path.

    Args:
        path: "rectangles", "padded" or "loop": rectangles.py, padded.py, reference.py.
        input_size: I.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        threads: torch's. More than two are reckoned with as if each doubling saved as much as the
            first.
        dtype: that oneDNN computes in. Default: float32.
    """
    weights = 4 * hidden_size * (input_size + hidden_size)
    one, two = (
        tuple(a + b * weights for a, b in fit) for fit in _FITS[_kind(path, dtype), path, train]
    )
    return LayerCosts(*(_scaled(*pair, threads) for pair in zip(one, two, strict=True)))


def _scaled(one: float, two: float, threads: int) -> float:
    """A figure on so many threads, of those on one and on two."""
    if threads == 1:
        return one
    doubling = min(two / one, 1.0) if one else 1.0
    return two * math.pow(doubling, math.log2(threads / 2))


def step_loop_seconds(
    rows: int,
    steps: int,
    input_size: int,
    hidden_size: int,
    *,
    train: bool,
    threads: int,
    packed: bool = False,
) -> float:
    """The model of reference.py.

    Args:
        rows: valid steps of the batch.
        steps: of its longest sequence.
        input_size: as in :func:`layer_costs`, and so are the next three.
        hidden_size: see there.
        train: see there.
        threads: see there.
        packed: the input is a PackedSequence, whose rows stay where they are. Default: False.
    """
    cost = layer_costs("loop", input_size, hidden_size, train=train, threads=threads)
    layer = max(0.0, cost.layer - _UNMOVED[train]) if packed else cost.layer
    return layer + steps * cost.call + rows * cost.row


def worth_padding(
    rows: int,
    lengths: Sequence[int],
    input_size: int,
    hidden_size: int,
    *,
    train: bool,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether computing the padding costs less than leaving it out: index work, plan and copies.

    To find the best rectangles takes a part of what padding saves; two of which a sixth is padding
    stand for them.

    Args:
        rows: of the padded batch.
        lengths: of its sequences.
        input_size: as in :func:`layer_costs`, and so are the next four.
        hidden_size: see there.
        train: see there.
        threads: see there.
        dtype: see there.
    """
    size, valid = (input_size, hidden_size), sum(lengths)
    padded = layer_costs("padded", *size, train=train, threads=threads, dtype=dtype)
    cut = layer_costs("rectangles", *size, train=train, threads=threads, dtype=dtype)
    steps = rows // len(lengths)
    return padded.layer + steps * padded.call + rows * padded.row <= min(
        cut.layer + 2 * cut.call + 1.2 * valid * cut.row,
        step_loop_seconds(valid, max(lengths), *size, train=train, threads=threads),
    )
