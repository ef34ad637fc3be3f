"""The kernels' oracle against nn.LSTM in float64 over a PackedSequence."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fastrnn_kernels.reference import reference, rows_of


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (4, 4), (1,)], ids=str)
def test_reference_is_nn_lstm(lengths: tuple[int, ...], bidirectional: bool) -> None:
    torch.manual_seed(0)
    B, I, H, D = len(lengths), 3, 4, 1 + bidirectional
    lstm = torch.nn.LSTM(I, H, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(max(lengths), B, I, dtype=torch.float64)
    h_0, c_0 = torch.randn(2, D, B, H, dtype=torch.float64).requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor(lengths))
    output, (h_n, c_n) = lstm(packed, (h_0, c_0))

    suffixes = ["", "_reverse"][:D]
    gates_x = torch.stack(
        [
            packed.data @ getattr(lstm, f"weight_ih_l0{s}").T
            + getattr(lstm, f"bias_ih_l0{s}")
            + getattr(lstm, f"bias_hh_l0{s}")
            for s in suffixes
        ],
        dim=1,
    )
    weight_hh = torch.stack([getattr(lstm, f"weight_hh_l0{s}") for s in suffixes])
    ours = reference(gates_x, weight_hh, h_0, c_0, rows_of(*lengths))
    theirs = (output.data, h_n, c_n)
    for a, b in zip((ours[0].flatten(1), *ours[1:3]), theirs, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [h_0, c_0, *lstm.parameters()]
    for a, b in zip(
        torch.autograd.grad(sum((y**2).sum() for y in (ours[0], *ours[1:3])), leaves),
        torch.autograd.grad(sum((y**2).sum() for y in theirs), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
