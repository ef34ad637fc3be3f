"""Who is measured: fastrnn, and nn.LSTM in each of the ways that its users run it.

A provider maps a :class:`~bench.workloads.Batch` to the padded output ``[B, T, D * H]`` and ``h_n``
``[L * D, B, H]``. All are batch-first, and hold the same weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from bench.workloads import Batch, Case

Outputs = tuple[Tensor, Tensor]
Forward = Callable[[nn.Module, Batch], Outputs]


def _fastrnn(module: nn.Module, batch: Batch) -> Outputs:
    lengths = None if batch.dense else batch.lengths
    output, (h_n, _) = module(batch.x, lengths=lengths, resets=batch.resets)
    return output, h_n


def _packed(module: nn.Module, batch: Batch) -> Outputs:
    packed = pack_padded_sequence(batch.x, batch.lengths, batch_first=True, enforce_sorted=False)
    packed_output, (h_n, _) = module(packed)
    output, _ = pad_packed_sequence(packed_output, batch_first=True)
    return output, h_n


def _padded(module: nn.Module, batch: Batch) -> Outputs:
    output, (h_n, _) = module(batch.x)
    return output, h_n


def _lstm_loop(module: nn.Module, batch: Batch) -> Outputs:
    """One step a call, the states multiplied by 1 - reset: the loop of CleanRL and others."""
    keep = batch.resets.logical_not().to(batch.x.dtype)
    h = c = batch.x.new_zeros(1, batch.x.shape[0], module.hidden_size)
    outputs = []
    for step in range(batch.x.shape[1]):
        kept = keep[:, step].view(1, -1, 1)
        output, (h, c) = module(batch.x[:, step : step + 1], (h * kept, c * kept))
        outputs.append(output)
    return torch.cat(outputs, 1), h


def _cell_loop(module: nn.Module, batch: Batch) -> Outputs:
    """The same with nn.LSTMCell."""
    keep = batch.resets.logical_not().to(batch.x.dtype)
    h = c = batch.x.new_zeros(batch.x.shape[0], module.hidden_size)
    outputs = []
    for step in range(batch.x.shape[1]):
        kept = keep[:, step].unsqueeze(1)
        h, c = module(batch.x[:, step], (h * kept, c * kept))
        outputs.append(h)
    return torch.stack(outputs, 1), h.unsqueeze(0)


FORWARDS: dict[str, Forward] = {
    "fastrnn": _fastrnn,
    "packed": _packed,
    "padded": _padded,
    "lstm-loop": _lstm_loop,
    "cell-loop": _cell_loop,
}
LABELS = {
    "fastrnn": "fastrnn",
    "packed": "nn.LSTM packed",
    "padded": "nn.LSTM padded",
    "lstm-loop": "nn.LSTM step by step",
    "cell-loop": "nn.LSTMCell step by step",
}


class Provider:
    """A module and the way it is called.

    Args:
        name: of :data:`FORWARDS`.
        case: what it is for.
        dtype: of the parameters. Default: the case's.
    """

    def __init__(self, name: str, case: Case, dtype: torch.dtype | None = None) -> None:
        shape = case.shape
        sizes = (shape.input_size, shape.hidden_size)
        torch.manual_seed(0)
        # nn.LSTM, LSTMCell and fastrnn.LSTM draw the same values from the same seed.
        if name == "cell-loop":
            module: nn.Module = nn.LSTMCell(*sizes)
        else:
            kind = fastrnn.LSTM if name == "fastrnn" else nn.LSTM
            module = kind(
                *sizes, case.num_layers, batch_first=True, bidirectional=case.bidirectional
            )
        # Rounded first: a reference in a wider dtype has the values that the case's dtype can hold.
        self.module = module.to(case.dtype).to(dtype or case.dtype).train(case.training)
        self.training = case.training
        self._forward = FORWARDS[name]

    def run(self, batch: Batch) -> Outputs:
        """The timed part: a training step without the optimizer's, or a forward pass."""
        if not self.training:
            with torch.no_grad():
                return self._forward(self.module, batch)
        output, h_n = self._forward(self.module, batch)
        torch.autograd.backward((output, h_n), (batch.d_output, batch.d_h_n))
        return output, h_n

    def clear(self, batch: Batch) -> None:
        """Forget gradients."""
        self.module.zero_grad(set_to_none=True)
        batch.x.grad = None

    def results(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs, and in training every gradient, by name."""
        self.clear(batch)
        output, h_n = self.run(batch)
        results = {"output": output.detach(), "h_n": h_n.detach()}
        if self.training:
            results["d_x"] = batch.x.grad
            for name, parameter in self.module.named_parameters():
                # LSTMCell's names have no layer.
                results[f"d_{name}" if "_l" in name else f"d_{name}_l0"] = parameter.grad
        return results


# Largest error of a tensor over its largest magnitude. Both sides round: in float32 they differ by
# 1e-6 or so. bfloat16, whose outputs and gradients have 8 bits, is compared with float32.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2.0**-6}


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def worst_error(results: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that is furthest off, and by how much of its largest magnitude; inf for NaN."""
    errors = {}
    for name, expected in reference.items():
        got = results[name].to(expected.dtype)
        if got.shape != expected.shape:
            return name, float("inf")
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        error = float((got - expected).abs().max() / scale)
        errors[name] = float("inf") if error != error else error
    return max(errors.items(), key=lambda item: item[1])
