"""Pairs of an nn.LSTM and a fastrnn.LSTM with the same weights, and how they are compared.

Most tests that use them are one program that takes an LSTM. `assert_same` runs it on both kinds and
compares what it returns.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence

import fastrnn

B, T, I, H = 3, 6, 4, 5
CONFIGURATIONS = {
    "plain": {},
    "2-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
}
PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
every_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def make_pair(**config):
    """An nn.LSTM and a fastrnn.LSTM with the same weights."""
    theirs, ours = nn.LSTM(I, H, **config), fastrnn.LSTM(I, H, **config)
    with torch.no_grad():
        for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
            ours_p.copy_(theirs_p)
    return theirs, ours


def assert_close(actual, expected):
    double = torch.float64 in {t.dtype for t in tensors_of(expected)}
    tolerance = 1e-12 if double else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rows(output):
    """The values of an output, padded or packed."""
    return output.data if isinstance(output, PackedSequence) else output


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values for tensor in tensors_of(value)]


def assert_same(program, **config):
    """With the same weights and random state, both kinds of LSTM return the same from `program`."""
    theirs, ours = make_pair(**config)
    torch.manual_seed(1)
    expected = program(theirs)
    assert tensors_of(expected), "the program returned nothing to compare"
    torch.manual_seed(1)
    assert_close(program(ours), expected)


def make_input(lstm, dtype=torch.float32):
    shape = (B, T, I) if lstm.batch_first else (T, B, I)
    return torch.randn(shape, dtype=dtype)


def make_state(lstm, batch=B, dtype=torch.float32):
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    h_0 = torch.randn(rows, batch, lstm.proj_size or H, dtype=dtype)
    return h_0, torch.randn(rows, batch, H, dtype=dtype)


def gradients(loss, lstm):
    """The gradient of every parameter, by name."""
    named = dict(lstm.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
