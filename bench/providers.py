"""Who is measured: fastrnn, nn.LSTM in each of the ways that its users run it, and rivals.

A provider maps a :class:`~bench.workloads.Batch` to the padded output ``[B, T, D * H]`` and ``h_n``
``[L * D, B, H]``. All are batch-first, and hold the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from bench import rivals
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
    "compiled": _padded,
    "flashrnn": rivals.flashrnn,
    "torchrl": rivals.torchrl,
}
# How fastrnn's own are made; "reference" is the step loop in PyTorch, on any device.
BACKENDS: dict[str, Literal["auto", "reference"]] = {"fastrnn": "auto", "reference": "reference"}
FORWARDS |= dict.fromkeys(BACKENDS, _fastrnn)
LABELS = {
    "fastrnn": "fastrnn",
    "reference": "fastrnn, backend=reference",
    "packed": "nn.LSTM packed",
    "padded": "nn.LSTM padded",
    "lstm-loop": "nn.LSTM step by step",
    "cell-loop": "nn.LSTMCell step by step",
    "compiled": "torch.compile(nn.LSTM) padded",
    "flashrnn": "FlashRNN padded",
    "torchrl": "TorchRL's Triton LSTM padded",
}
# torch.compile makes a node of every operation of every step: 178 for 6 steps of one layer.
UNROLLED_STEPS = 64


def cannot_run(name: str, case: Case, device: torch.device) -> str | None:
    """Why a provider has no figure for a case; None where it should.

    What only a run can tell (a dtype that the processor lacks, too little memory) is not asked.
    """
    if name in rivals.PACKAGES:
        if not rivals.installed(name):
            return "not installed"
        return rivals.cannot_run(name, case, device)
    if name == "compiled":
        steps = unrolled_steps(case)
        if device.type != "cuda":
            return "not measured on the CPU, where compiling takes minutes"
        if steps > UNROLLED_STEPS:
            return f"unrolls {steps} steps; measured up to {UNROLLED_STEPS}"
    return None


def unrolled_steps(case: Case) -> int:
    """Steps that have to be taken one after another, of all layers and directions."""
    return case.shape.steps * case.num_layers * (2 if case.bidirectional else 1)


def reference_of(case: Case) -> str:
    """The way to run nn.LSTM that has this case's right results."""
    if case.resets:
        return "lstm-loop"
    return "padded" if case.lengths == "full" else "packed"


def is_checked(name: str, case: Case) -> bool:
    """Whether its results must be the reference's: not where it also computes the padding."""
    return name in BACKENDS or case.lengths == "full"


class Provider:
    """A module and the way it is called.

    Args:
        name: of :data:`FORWARDS`.
        case: what it is for.
        dtype: of the parameters. Default: the case's.
        device: of the parameters. Default: the CPU.
    """

    def __init__(
        self,
        name: str,
        case: Case,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = case.shape
        sizes = (shape.input_size, shape.hidden_size)
        torch.manual_seed(0)
        # nn.LSTM, LSTMCell and fastrnn.LSTM draw the same values from the same seed.
        if name == "cell-loop":
            module: nn.Module = nn.LSTMCell(*sizes)
        else:
            kind = (
                functools.partial(fastrnn.LSTM, backend=BACKENDS[name])
                if name in BACKENDS
                else nn.LSTM
            )
            module = kind(
                *sizes, case.num_layers, batch_first=True, bidirectional=case.bidirectional
            )
        # Rounded first: a reference in a wider dtype has the values that the case's dtype can hold.
        module = module.to(case.dtype).to(device, dtype or case.dtype)
        self.module = module.train(case.training)
        if name == "compiled":
            torch._dynamo.config.allow_rnn = True
            self.module.compile()
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
