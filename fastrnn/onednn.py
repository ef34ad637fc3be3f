"""One direction of one dense layer by torch's oneDNN operator, and the carry feature for padding.

The operator knows neither lengths nor masks. One extra input feature gives it padded steps all the
same: 1 on a padded step and 0 elsewhere, with weights -CARRY for gate i and +CARRY for f. There
i = 0 and f = 1 exactly, so c is carried bit for bit, and every gate's gradient is exactly zero.

float32; and bfloat16 where the processor multiplies it (AVX512-BF16, AMX), where c_0 in float32
keeps all cell states in it, and gradients come in float32. Other 16-bit tensors are computed in
float32.

Limits: no projection; no cell-state sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from fastrnn import reference
from fastrnn.recurrence import CPU, OutputGradients
from fastrnn.reference import LayerWeights, twin_gradients

# Far beyond any pre-activation, far within float32: sigmoid(-CARRY) = 0 and sigmoid(CARRY) = 1.
CARRY = 1e4

_LSTM_MODE = 2  # the number of the LSTM in the operator's interface


class Operands(NamedTuple):
    """A direction's weights as the operator wants them: contiguous, with biases.

    Attributes:
        ih: ``[4H, I]``, or ``[4H, I + 1]`` with the carry feature.
        hh: ``[4H, H]``.
        bias_ih: ``[4H]``.
        bias_hh: ``[4H]``.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor


class WeightGradients(NamedTuple):
    """Of :class:`Operands`; both biases have the same.

    Attributes:
        ih: ``[4H, I]``, or ``[4H, I + 1]``.
        hh: ``[4H, H]``.
        bias: ``[4H]``.
    """

    ih: Tensor
    hh: Tensor
    bias: Tensor


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows of ``dtype`` are computed in, but for cell states."""
    if dtype == torch.float32:
        return dtype
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return dtype
    return reference.compute_dtype(dtype)


def to_compute(rows: Tensor, h_0: Tensor, c_0: Tensor, *flat: Tensor) -> list[Tensor]:
    """The tensors in the dtypes they are computed in, without their history."""
    dtype = compute_dtype(rows.dtype)
    if rows.dtype == torch.float32:
        return [tensor.detach() for tensor in (rows, h_0, c_0, *flat)]
    rows, h_0, *flat_ = (tensor.detach().to(dtype) for tensor in (rows, h_0, *flat))
    return [rows, h_0, c_0.detach().float(), *flat_]


def gradients_to_compute(grads: OutputGradients) -> OutputGradients:
    """The same for the gradients that reach a layer's outputs."""
    h, h_n = (None if g is None else g.to(compute_dtype(g.dtype)) for g in (grads.h, grads.h_n))
    return grads._replace(h=h, h_n=h_n, c_n=None if grads.c_n is None else grads.c_n.float())


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can compute in this dtype there."""
    return (
        device == CPU
        and dtype in (torch.float32, torch.bfloat16)
        and compute_dtype(dtype) == dtype
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
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


def outside_transforms() -> bool:
    """Whether nothing traces or transforms what runs: torch has no rule for the operator then."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def operands(weights: LayerWeights, *, carry: bool) -> Operands:
    """The operator takes strided tensors for contiguous ones and computes something else."""
    ih, hh = weights.ih.contiguous(), weights.hh.contiguous()
    if carry:
        ih = with_carry_weights(ih)
    if weights.bias_ih is None or weights.bias_hh is None:
        zeros = ih.new_zeros(ih.shape[0])
        return Operands(ih, hh, zeros, zeros)
    return Operands(ih, hh, weights.bias_ih.contiguous(), weights.bias_hh.contiguous())


def with_carry(rows: Tensor, carry: Tensor) -> Tensor:
    """Rows ``[..., I]`` with the carry feature; ``carry`` is ``[..., 1]``, 1 in the padding."""
    return torch.cat([rows, *[carry.to(rows.dtype)] * _carry_columns(rows)], -1)


def mask_with_carry(x: Tensor, padding: Tensor) -> Tensor:
    """``[T, B, I]`` with zeros and the carry feature at ``padding``, indices into ``[T * B]``.

    The gradient there is zero without a mask, as every gate's is.
    """
    columns = _carry_columns(x)
    wide = functional.pad(x, (0, columns))
    row = _padding_row(x.shape[2], columns, x.dtype).expand(padding.shape[0], -1)
    wide.detach().view(-1, wide.shape[2]).index_copy_(0, padding, row)
    return wide


def with_carry_weights(ih: Tensor) -> Tensor:
    """``W_ih``, ``[4H, I]``, with the weights of the carry feature."""
    column = _carry_column(ih.shape[0] // 4, ih.dtype)
    return torch.cat([ih, *[column] * _carry_columns(ih)], 1)


def _carry_columns(features: Tensor) -> int:
    """How often the carry feature stands behind ``[..., I]``."""
    # bfloat16 in odd numbers is slow: T60 B64 H256 on AMX takes 39.6 ms with 129, 7.3 with 130.
    return 2 if features.dtype == torch.bfloat16 and features.shape[-1] % 2 == 0 else 1


@functools.lru_cache(maxsize=16)
def _padding_row(features: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``[1, I + columns]``, a padded step: zeros, and the carry feature."""
    with torch.inference_mode(False):
        return torch.tensor([[0.0] * features + [1.0] * columns], dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=16)
def _carry_column(hidden_size: int, dtype: torch.dtype) -> Tensor:
    """``[4H, 1]`` weights of the carry feature."""
    gates = torch.tensor([-CARRY, CARRY, 0.0, 0.0], dtype=dtype, device="cpu")
    return gates.repeat_interleave(hidden_size).unsqueeze(1)


def one_layer(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator as it is: outputs, final states and, where gradients are enabled, its workspace.

    torch differentiates it, and keeps the results for that.

    Args:
        x: ``[T, B, I]``, contiguous.
        weights: as :class:`Operands`.
        h_0: ``[B, H]``, contiguous; or ``[1, B, H]``, as the final one comes then.
        c_0: likewise.
        reverse: walk the steps from last to first.
    """
    ih, hh, bias_ih, bias_hh = weights
    return torch.mkldnn_rnn_layer(
        x,
        ih,
        hh,
        bias_ih,
        bias_hh,
        h_0,
        c_0,
        reverse,
        batch_sizes=[],
        mode=_LSTM_MODE,
        hidden_size=h_0.shape[-1],
        num_layers=1,
        has_biases=True,
        bidirectional=False,
        batch_first=False,
        train=torch.is_grad_enabled(),
    )


def dense_forward(
    x: Tensor, weights: Operands, h_0: Tensor, c_0: Tensor, *, reverse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Outputs ``[T, B, H]``, final states ``[B, H]`` and, with ``save``, the workspace.

    Args:
        x: ``[T, B, I]``, contiguous.
        weights: of :func:`operands`.
        h_0: ``[B, H]``, contiguous.
        c_0: ``[B, H]``, contiguous.
        reverse: walk the steps from last to first.
        save: make the workspace that :func:`dense_backward` needs.
    """
    hidden_size = h_0.shape[1]
    with torch.set_grad_enabled(save):
        output, h_n, c_n, workspace = one_layer(x, weights, h_0, c_0, reverse=reverse)
    return output, h_n.view(-1, hidden_size), c_n.view(-1, hidden_size), workspace


def dense_backward(
    d_output: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor,
    x: Tensor,
    weights: Operands,
    h_0: Tensor,
    c_0: Tensor,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    workspace: Tensor,
    *,
    reverse: bool,
) -> tuple[Tensor, WeightGradients, Tensor, Tensor]:
    """Gradients of ``x``, the weights, ``h_0`` and ``c_0``; all tensors contiguous.

    Args:
        d_output: ``[T, B, H]``.
        d_h_n: ``[B, H]``.
        d_c_n: ``[B, H]``.
        x: as in :func:`dense_forward`, and so are the next three and ``reverse``.
        weights: see there.
        h_0: see there.
        c_0: see there.
        output: what it returned, and so are the next three.
        h_n: see there.
        c_n: see there.
        workspace: see there.
        reverse: see there.
    """
    hidden_size = h_0.shape[1]
    d_x, d_ih, d_hh, d_bias, _, d_h_0, d_c_0 = torch.ops.aten.mkldnn_rnn_layer_backward(
        *(x, *weights, h_0, c_0, output, h_n, c_n, d_output, d_h_n, d_c_n),
        *(reverse, _LSTM_MODE, hidden_size, 1, True, True, False, [], False, workspace),
    )
    d_weights = WeightGradients(d_ih, d_hh, d_bias)
    return d_x, d_weights, d_h_0.view(-1, hidden_size), d_c_0.view(-1, hidden_size)


def weight_gradients(
    d_weights: WeightGradients, weights: LayerWeights
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ih, hh, bias_ih, bias_hh and hr: without the carry feature's, where it was."""
    d_ih = d_weights.ih[:, : weights.ih.shape[1]]
    d_bias = None if weights.bias_ih is None else d_weights.bias
    return d_ih, d_weights.hh, *twin_gradients(d_bias, True, True), None
