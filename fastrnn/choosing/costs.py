"""What a layer costs on the CPU, by path: the models behind the choice between them.

Seconds, linear in pieces (rectangles, or steps), in rows, and in the weights; fitted by ``python -m
bench costs`` on one and on two threads with torch 2.13, to ragged batches of (I, H) from (12, 64)
to (256, 512), B from 4 to 128 and T from 29 to 200. AVX2: an AMD EPYC (Zen 3), in earlier forms
of the models; these also stand for processors without a fit of their own. AVX512, and bfloat16
there: an Intel Xeon (Sapphire Rapids), 4 to 16 % off in the mean, in bfloat16 8 to 20. Only ratios
matter: between the paths, and between one more call and some more rows. The path chosen takes 1 to
5 % longer than the best.

torch's loop is a path of inference alone. Its cost a step was measured on one thread of an AMD EPYC
with AVX-512 (T from 2 to 50, B from 2 to 64, H from 8 to 200), that of the weights is our loop's.

W below is a direction's weights, 4H (I + H).
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, TypeAlias

import torch


class LayerCosts(NamedTuple):
    """Seconds of a path, for given weights and threads.

    Attributes:
        layer: once a direction: finding the rows, and moving them there and back.
        call: once a rectangle, or a step of the loop or of a padded batch. oneDNN packs the weights
            anew in each rectangle, and compiles code for shapes it has not met, of which a quarter
            is reckoned with.
        row: of a row, padding included.
        step: of a step of a rectangle, in rows.
    """

    layer: float
    call: float
    row: float
    step: float = 0.5

    def seconds(self, calls: float, rows: float) -> float:
        """Of so many calls over so many rows."""
        return self.layer + calls * self.call + rows * self.row


class Costs(NamedTuple):
    """The models of all paths, for given weights and threads.

    Attributes:
        rectangles: of rectangles.py.
        padded: of padded.py.
        loop: of step_loop.py.
        packed: the same where the rows are packed as they come, and stay where they are; forward in
            float32, of torch's loop.
    """

    rectangles: LayerCosts
    padded: LayerCosts
    loop: LayerCosts
    packed: LayerCosts


Path: TypeAlias = Literal["rectangles", "padded", "loop", "torch"]
# That python -m bench costs fits.
PATHS: tuple[Path, ...] = ("rectangles", "padded", "loop")
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
    ("AVX2", "torch", False): (
        ((140e-6, 0.0), (11e-6, 0.075e-9), (0.5e-6, 34e-12)),
        ((140e-6, 0.0), (11e-6, 0.075e-9), (0.5e-6, 21e-12)),
    ),
    ("AVX512", "rectangles", True): (
        ((331e-6, 18e-9), (563e-6, 4.5e-9), (1.4e-6, 66e-12)),
        ((778e-6, 18e-9), (1250e-6, 2e-9), (0.97e-6, 46e-12)),
    ),
    ("AVX512", "rectangles", False): (
        ((370e-6, 12e-9), (506e-6, 1.1e-9), (0.63e-6, 18e-12)),
        ((605e-6, 5.1e-9), (432e-6, 1e-9), (0.51e-6, 11e-12)),
    ),
    ("AVX512", "padded", True): (
        ((931e-6, 0.0), (0.0, 0.0), (0.88e-6, 78e-12)),
        ((1410e-6, 3.7e-9), (7.3e-6, 0.0), (0.67e-6, 50e-12)),
    ),
    ("AVX512", "padded", False): (
        ((421e-6, 11e-9), (0.0, 0.0), (0.44e-6, 18e-12)),
        ((557e-6, 5.1e-9), (0.058e-6, 0.014e-9), (0.35e-6, 10e-12)),
    ),
    ("AVX512", "loop", True): (
        ((534e-6, 33e-9), (47e-6, 0.15e-9), (3e-6, 61e-12)),
        ((0.0, 12e-9), (115e-6, 0.029e-9), (2.6e-6, 60e-12)),
    ),
    ("AVX512", "loop", False): (
        ((1150e-6, 1e-9), (41e-6, 0.13e-9), (0.85e-6, 22e-12)),
        ((928e-6, 6.4e-9), (36e-6, 0.059e-9), (1.2e-6, 15e-12)),
    ),
    ("AVX512", "torch", False): (
        ((140e-6, 0.0), (11e-6, 0.13e-9), (0.5e-6, 22e-12)),
        ((140e-6, 0.0), (11e-6, 0.059e-9), (0.5e-6, 15e-12)),
    ),
    ("bfloat16", "rectangles", True): (
        ((1500e-6, 38e-9), (600e-6, 5.5e-9), (0.62e-6, 18e-12)),
        ((1090e-6, 45e-9), (1530e-6, 1.1e-9), (0.96e-6, 10e-12)),
    ),
    ("bfloat16", "rectangles", False): (
        ((314e-6, 6.5e-9), (414e-6, 0.62e-9), (0.73e-6, 4.4e-12)),
        ((564e-6, 6.8e-9), (570e-6, 0.0), (0.32e-6, 2.8e-12)),
    ),
    ("bfloat16", "padded", True): (
        ((2000e-6, 0.0), (0.0, 0.19e-9), (0.56e-6, 23e-12)),
        ((446e-6, 0.0), (48e-6, 0.12e-9), (0.68e-6, 14e-12)),
    ),
    ("bfloat16", "padded", False): (
        ((294e-6, 8.9e-9), (0.0, 0.0), (0.59e-6, 3.2e-12)),
        ((93e-6, 3.1e-9), (14e-6, 0.0), (0.2e-6, 2.5e-12)),
    ),
    ("bfloat16", "loop", True): (
        ((4900e-6, 0.0), (27e-6, 0.21e-9), (0.86e-6, 76e-12)),
        ((1320e-6, 18e-9), (93e-6, 0.0), (3e-6, 38e-12)),
    ),
    ("bfloat16", "loop", False): (
        ((1430e-6, 1.6e-9), (19e-6, 0.12e-9), (1.4e-6, 17e-12)),
        ((0.0, 7.8e-9), (50e-6, 0.012e-9), (0.96e-6, 14e-12)),
    ),
}
# What the loop's layer does not cost where the rows are packed as they come, in training or not.
_UNMOVED = {True: 0.6e-3, False: 0.3e-3}


def _kind(dtype: torch.dtype) -> str:
    """Which fit holds on this processor where oneDNN computes in ``dtype``."""
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.bfloat16:
        return "bfloat16"
    return "AVX512" if capability.startswith("AVX512") else "AVX2"


@functools.lru_cache(maxsize=64)
def costs_of(
    input_size: int, hidden_size: int, train: bool, threads: int, dtype: torch.dtype
) -> Costs:
    """The models.

    Args:
        input_size: I.
        hidden_size: H.
        train: forward and backward, rather than forward alone.
        threads: torch's. More than two are reckoned with as if each doubling saved as much as the
            first.
        dtype: that oneDNN computes in.
    """
    kind, weights = _kind(dtype), 4 * hidden_size * (input_size + hidden_size)

    def cost(path: Path) -> LayerCosts:
        one, two = (tuple(a + b * weights for a, b in fit) for fit in _FITS[kind, path, train])
        return LayerCosts(*(_scaled(*pair, threads) for pair in zip(one, two, strict=True)))

    loop = cost("loop")
    if train or dtype != torch.float32:
        packed = loop._replace(layer=max(0.0, loop.layer - _UNMOVED[train]))
    else:  # torch's loop in C++ runs, and is chosen for what stays where it is
        packed = cost("torch")
    return Costs(cost("rectangles"), cost("padded"), loop, packed)


def _scaled(one: float, two: float, threads: int) -> float:
    """A figure on so many threads, of those on one and on two."""
    if threads == 1:
        return one
    doubling = min(two / one, 1.0) if one else 1.0
    return two * math.pow(doubling, math.log2(threads / 2))
