"""Initial weights for an LSTM: orthogonal recurrence, and a forget gate that starts open."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

RNN = TypeVar("RNN", bound=nn.RNNBase)


@torch.no_grad()
def init_lstm_(
    lstm: RNN, forget_bias: float = 1.0, generator: torch.Generator | None = None
) -> RNN:
    """Initialise an LSTM in place, all layers and directions.

    - `weight_hh`: each gate's `[H, P]` block is (semi-)orthogonal, so that neither state nor
      gradient grows or shrinks by it (Saxe et al. 2014).
    - `weight_ih`: each gate's `[H, I]` block is uniform by Glorot and Bengio (2010).
    - `weight_hr`, where there is a projection: semi-orthogonal.
    - the biases: zero, but the forget gate's `forget_bias`, so that a cell remembers until it has
      learned to forget (Jozefowicz et al. 2015). An LSTM of torch adds two biases, `bias_ih` and
      `bias_hh`; the value goes into the first, and the second stays zero: set in both, the gate
      would start at twice the value.

    These are Keras's defaults. torch's own draw everything from `U(-1/sqrt(H), 1/sqrt(H))`.

    Args:
        lstm: fastrnn.LSTM or nn.LSTM, gates in the order i, f, g, o.
        forget_bias: of the forget gate. Without effect where the LSTM has no biases. Default: 1.0.
        generator: of the random numbers. Default: torch's.

    Returns:
        The LSTM.

    Raises:
        ValueError: another kind of RNN, or a weight that is computed (a parametrization, weight
            norm, pruning): what is written there would not stay. Nothing is changed.
    """
    if lstm.mode != "LSTM":
        raise ValueError(f"expected an LSTM (nn.LSTM or fastrnn.LSTM), got mode {lstm.mode}")
    names = [name for layer in lstm._all_weights for name in layer]
    weights = {name: getattr(lstm, name) for name in names}
    computed = [name for name, weight in weights.items() if not isinstance(weight, nn.Parameter)]
    if computed:
        raise ValueError(
            f"expected weights that are parameters, got {', '.join(computed)} computed from "
            "others: initialise before a parametrization or pruning is put on"
        )
    for name, weight in weights.items():
        if name.startswith("weight_hr"):
            nn.init.orthogonal_(weight, generator=generator)
        elif name.startswith("weight"):
            draw = nn.init.orthogonal_ if name.startswith("weight_hh") else nn.init.xavier_uniform_
            for gate in weight.chunk(4):
                draw(gate, generator=generator)
        else:
            weight.zero_()
            if name.startswith("bias_ih"):
                weight.chunk(4)[1].fill_(forget_bias)
    return lstm
