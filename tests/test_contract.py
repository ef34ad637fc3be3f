"""What docs/determinism.md promises of a sequence among others, on every backend and dtype."""

from __future__ import annotations

import math

import pytest
import torch

import fastrnn
from tests.oracle import assert_identical, everything, make_state

B, T, I, H = 8, 50, 16, 32
LENGTHS = torch.tensor([50, 3, 41, 17, 50, 28, 1, 9])
# A sequence alone against the same in a batch, of values up to 1.
ALONE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}

every_backend = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
every_dtype = pytest.mark.parametrize("dtype", ALONE, ids=lambda dtype: str(dtype)[6:])


def make(backend, dtype):
    sizes = (I, H, 2)
    return fastrnn.LSTM(*sizes, batch_first=True, bidirectional=True, backend=backend, dtype=dtype)


def first(lstm, x):
    """All that concerns the first sequence: its output, states and gradient."""
    x = x.clone().requires_grad_()
    output, (h_n, c_n) = lstm(x, lengths=LENGTHS)
    [d_x] = torch.autograd.grad(output.square().sum() + h_n.sum() + c_n.sum(), x)
    return {"output": output[0], "h_n": h_n[:, 0], "c_n": c_n[:, 0], "d_x": d_x[0]}


@every_backend
@every_dtype
@pytest.mark.parametrize("other", ["values", "NaN"])
def test_the_values_of_other_sequences_change_no_bit(other, dtype, backend):
    lstm, x = make(backend, dtype), torch.randn(B, T, I, dtype=dtype)
    changed = x.clone()
    changed[1:] = torch.randn(B - 1, T, I) if other == "values" else math.nan
    assert_identical(first(lstm, changed), first(lstm, x))


@every_backend
@every_dtype
def test_a_sequence_alone_differs_by_rounding(dtype, backend):
    lstm, x = make(backend, dtype), torch.randn(B, T, I, dtype=dtype)
    output, _ = lstm(x, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, _ = lstm(x[row : row + 1, :length])
        torch.testing.assert_close(alone[0], output[row, :length], rtol=0, atol=ALONE[dtype])


@every_backend
@every_dtype
def test_what_was_called_before_changes_no_bit(dtype, backend):
    lstm = make(backend, dtype)
    x, hx = torch.randn(B, T, I, dtype=dtype), make_state(lstm, B)

    def call(lstm, x, hx):
        output, states = lstm(x, hx, lengths=LENGTHS)
        return output, *states

    before = everything(call, lstm, x, hx)
    for steps in (7, 23, 50):
        lstm(x[:, :steps])
        lstm(x[:3, :steps], lengths=[steps, 1, 4])
    assert_identical(everything(call, lstm, x, hx), before)
