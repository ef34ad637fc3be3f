"""What torch's FlopCounterMode does not know: formulas for oneDNN, cuDNN and our operators.

As for any model the matrix products are counted, 2 K M N each. With N rows and W entries of all
weight matrices of a layer that is 2 N W forward, and twice that backward; rows in the padding that
a way computes count too.

Limits: the kernels' launches are no operators of torch, so outside a graph the counter sees of them
only the products before and after. A graph counts the rows that it allocates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fastrnn import torch_private

_Shape: TypeAlias = Sequence[int]


def teach() -> None:
    """Let torch's counter know the formulas, where somebody has imported it.

    Importing it here would import triton. A counter that is active already has a copy of what torch
    knew when it was made, and learns too.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = (getattr(mode, "counter", None) for mode in torch_private.dispatch_mode_stack())
    registries = [module.flop_registry]
    registries += [c.flop_registry for c in counters if isinstance(c, module.FlopCounterMode)]
    for registry in registries:
        for operator, formula in _formulas():
            registry.setdefault(operator, module.shape_wrapper(formula))


def _formulas() -> list[tuple[Any, Callable[..., int]]]:
    aten, own = torch.ops.aten, torch.ops.fastrnn
    known: list[tuple[Any, Callable[..., int]]] = [
        (aten._cudnn_rnn, _cudnn),
        (aten._cudnn_rnn_backward, _cudnn_backward),
        (own.lstm_layer, _layer),
        (own.lstm_layer_backward, _layer_backward),
    ]
    if torch_private.has_onednn_lstm:
        known.append((aten.mkldnn_rnn_layer, _onednn))
        known.append((aten.mkldnn_rnn_layer_backward, _onednn_backward))
    return known


def _products(rows: _Shape, weights: Sequence[_Shape]) -> int:
    """Of rows ``[..., I]`` with all matrices among the weights."""
    matrices = sum(math.prod(weight) for weight in weights if len(weight) == 2)
    return 2 * math.prod(rows[:-1]) * matrices


def _onednn(x: _Shape, *weights: Any, **_: Any) -> int:
    return _products(x, weights[:2])


def _onednn_backward(x: _Shape, *weights: Any, **_: Any) -> int:
    return 2 * _products(x, weights[:2])


def _cudnn(x: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return _products(x, weights)


def _cudnn_backward(x: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return 2 * _products(x, weights)


def _layer(
    rows: _Shape,
    batch_sizes: _Shape,
    h_0: _Shape,
    c_0: _Shape,
    weights: Sequence[_Shape],
    *_: Any,
    **__: Any,
) -> int:
    return _products(rows, weights)


def _layer_backward(
    d_h: _Shape,
    d_h_n: _Shape,
    d_c_n: _Shape,
    d_c: _Shape | None,
    rows: _Shape,
    batch_sizes: _Shape,
    h_0: _Shape,
    c_0: _Shape,
    weights: Sequence[_Shape],
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _products(rows, weights)
