"""Other projects' LSTMs for a GPU, measured where they are installed.

Each is called with nn.LSTM's weights on the padded batch, as ``padded`` is; what their own modules
would add in convenience is left out. Neither stops at a sequence's end.

- FlashRNN (NX-AI/flashrnn): ``flashrnn.flashrnn.flashrnn``, its fused CUDA kernel, built by nvcc
  when it first runs.
- TorchRL (pytorch/rl): ``lstm_triton``, the Triton LSTM with resets behind its LSTMModule.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import Batch, Case

Outputs = tuple[Tensor, Tensor]

PACKAGES = {"flashrnn": "flashrnn", "torchrl": "torchrl"}


def installed(name: str) -> bool:
    """Whether the rival's package can be imported; it is not imported for that."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def cannot_run(name: str, case: Case, device: torch.device) -> str | None:
    """Why a rival has no figure for a case; None where it should."""
    if device.type != "cuda":
        return "runs on CUDA only"
    if case.bidirectional:
        return "has one direction only"
    if case.resets and name == "flashrnn":
        return "has no resets"
    return None


def layer_weights(module: nn.Module, layer: int) -> list[Tensor]:
    """``weight_ih [4H, I]``, ``weight_hh [4H, H]``, ``bias_ih [4H]``, ``bias_hh [4H]``."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(module, f"{name}_l{layer}") for name in names]


def flashrnn(module: nn.Module, batch: Batch) -> Outputs:
    """Its layout has gates and heads apart: input ``[B, T, 4, 1, H]``, weight ``[4, 1, H, H]``."""
    from flashrnn.flashrnn import flashrnn as run

    rows, states = batch.x, []
    dtype = str(rows.dtype).removeprefix("torch.")
    for layer in range(module.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = layer_weights(module, layer)
        hidden_size = module.hidden_size
        sizes = (4, 1, hidden_size)
        gates_x = nn.functional.linear(rows, weight_ih).unflatten(-1, sizes)
        values, last = run(
            gates_x,
            weight_hh.view(*sizes, hidden_size),
            (bias_ih + bias_hh).view(sizes),
            function="lstm",
            backend="cuda_fused",
            dtype=dtype,
        )
        rows = values[0].flatten(2)
        states.append(last[0].reshape(1, -1, hidden_size))
    return rows, torch.cat(states)


def torchrl(module: nn.Module, batch: Batch) -> Outputs:
    """It wants a state for each step, read where the episode starts there: zeros."""
    from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

    rows, states = batch.x, []
    starts: Any = batch.resets
    if starts is None:
        starts = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    for layer in range(module.num_layers):
        zeros = rows.new_zeros(*rows.shape[:2], module.hidden_size)
        rows, _, last, _ = lstm_triton(
            rows, zeros, zeros, *layer_weights(module, layer), starts, compute_dtype=rows.dtype
        )
        states.append(last)
    return rows, torch.stack(states)
