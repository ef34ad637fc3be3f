"""One direction of one dense layer by torch's oneDNN operator, and the carry feature for padding.

The operator knows neither lengths nor masks. One extra input feature gives it padded steps all the
same: 1 on a padded step and 0 elsewhere, with weights -CARRY for gates i and o and +CARRY for f.
There i = o = 0 and f = 1 exactly, so c is carried bit for bit, h is zero, and every gate's gradient
is exactly zero; with weights that :func:`can_carry` holds to be small enough.

float32; and bfloat16 where the processor multiplies it (AVX512-BF16, AMX), with cell states rounded
at every step, as nn.LSTM's are. Other 16-bit tensors are computed in float32.

Limits: no projection; no cell-state sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import torch_private
from fastrnn.cells import lstm as lstm_cell
from fastrnn.cells.lstm import LayerWeights
from fastrnn.input.blanking import blank_
from fastrnn.input.constants import constant
from fastrnn.input.transforms import in_dual_level, under_functorch
from fastrnn.ways.recurrence import CPU

# Far beyond a pre-activation of weights below LARGEST, far within float32 and bfloat16: with any
# such pre-activation added, sigmoid(-CARRY) = 0 and sigmoid(CARRY) = 1.
CARRY = 1e30
# float16's largest number: weights that are rounded to it under autocast stay finite.
LARGEST = 65504.0

_LSTM_MODE = 2  # the number of the LSTM in the operator's interface


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it, and oneDNN may use them."""
    has = torch_private.has_avx512_bfloat16() or torch_private.has_amx()
    return has and torch_private.has_mkldnn and torch_private.onednn_multiplies_bfloat16()


@functools.cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows of ``dtype`` are computed in."""
    if dtype == torch.float32:
        return dtype
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return dtype
    return lstm_cell.compute_dtype(dtype)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can compute in this dtype there."""
    return (
        device == CPU
        and dtype in (torch.float32, torch.bfloat16)
        and compute_dtype(dtype) == dtype
        and torch_private.has_onednn_lstm
        and torch_private.mkldnn_enabled()
    )


def can_compute(
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str,
    memory: str,
    cell_states: bool,
    projection: bool,
) -> bool:
    """Whether oneDNN knows all that is asked of a layer, and can run its rows."""
    return (
        backend == "auto"
        and memory == "save"  # it always keeps its workspace
        and not (cell_states or projection)
        and available(device, compute_dtype(dtype))
    )


def can_carry(weights: Sequence[Tensor]) -> bool:
    """Whether the carry feature outweighs all that these weights can make of padded steps.

    A bias may pin a gate for good, with a huge number or an infinite one, which nothing added to it
    undoes. The look takes as long as reading the weights once, and is taken at every call: a write
    through ``.data`` leaves no other trace.

    Args:
        weights: of all layers and directions, in any dtype.

    Returns:
        Whether the norm of each is below LARGEST; False too where a tensor has no values to see.
    """
    squares = 0.0
    for weight in weights:
        flat = weight.detach()
        if flat.dim() > 1:
            flat = flat.reshape(-1)
        if flat.dtype != torch.float32:
            flat = flat.float()
        try:
            squares += flat.dot(flat).item()
        except RuntimeError:  # under a fake mode, and while something traces
            return False
    return squares < LARGEST**2


def outside_transforms() -> bool:
    """Whether nothing traces or transforms what runs: torch has no rule for the operator then."""
    return not torch.compiler.is_compiling() and not under_functorch() and not in_dual_level()


def operands(weights: LayerWeights, *, carry: bool) -> list[Tensor]:
    """A direction's W_ih, W_hh, b_ih and b_hh, as the operator wants them.

    It takes strided tensors for contiguous ones, and computes something else.

    Args:
        weights: without a projection.
        carry: whether the input has the carry feature.
    """
    ih, hh = weights.ih.contiguous(), weights.hh.contiguous()
    if carry:
        ih = torch.cat([ih, _carry_weights(ih.shape[0], ih.shape[1], ih.dtype)], 1)
    if weights.bias_ih is None or weights.bias_hh is None:
        zeros = ih.new_zeros(ih.shape[0])
        return [ih, hh, zeros, zeros]
    return [ih, hh, weights.bias_ih.contiguous(), weights.bias_hh.contiguous()]


def with_carry(x: Tensor, carry: Tensor, valid: Tensor) -> Tensor:
    """``[..., I]`` with the carry feature, and zeros in the padding.

    The gradient there is zero without a mask, as every gate's is.

    Args:
        x: ``[..., I]``; ``[T, B, I]`` may have fewer steps than ``carry``, the others are padding.
        carry: ``[..., 1]``, in the dtype of ``x``: 1 in the padding, else 0.
        valid: bool ``[..., 1]``, the opposite.
    """
    features, missing = x.shape[-1], carry.shape[0] - x.shape[0]
    if missing:
        x = functional.pad(x, (0, 0, 0, 0, 0, missing))
    wide = torch.cat([x, *[carry] * _carry_columns(features, x.dtype)], -1)
    blank_(wide.detach()[..., :features], valid)
    return wide


def _carry_columns(features: int, dtype: torch.dtype) -> int:
    """How often the carry feature stands behind I features."""
    # bfloat16 in odd numbers is slow: T60 B64 H256 on AMX takes 39.6 ms with 129, 7.3 with 130.
    return 2 if dtype == torch.bfloat16 and features % 2 == 0 else 1


@constant(maxsize=16)
def _carry_weights(gates: int, features: int, dtype: torch.dtype) -> Tensor:
    """``[4H, 1 or 2]``, the carry feature's weights behind those of I features."""
    of_gates = torch.tensor([-CARRY, CARRY, 0.0, -CARRY], dtype=dtype, device="cpu")
    column = of_gates.repeat_interleave(gates // 4).unsqueeze(1)
    return column.expand(-1, _carry_columns(features, dtype))


def one_layer(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator as it is: outputs, final states, and a workspace for its backward.

    torch differentiates it, its backward too, and keeps the results for that.

    Args:
        x: ``[T, B, I]``, contiguous.
        weights: of :func:`operands`.
        h_0: ``[B, H]``, contiguous; or ``[1, B, H]``, as the final one comes then.
        c_0: likewise.
    """
    ih, hh, bias_ih, bias_hh = weights
    inputs = (x, h_0, c_0, *weights)
    train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return torch.mkldnn_rnn_layer(
        x,
        ih,
        hh,
        bias_ih,
        bias_hh,
        h_0,
        c_0,
        reverse=False,
        batch_sizes=[],
        mode=_LSTM_MODE,
        hidden_size=h_0.shape[-1],
        num_layers=1,
        has_biases=True,
        bidirectional=False,
        batch_first=False,
        train=train,
    )
