"""Zeros in the padding, whatever stands there."""

from __future__ import annotations

import math

import pytest
import torch

from fastrnn.blanking import blank_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
EMPTY = torch.tensor([[False, True, False], [True, True, False]])
VALID = ~EMPTY.unsqueeze(-1)


def poisoned(dtype, shape=(2, 3, 5)):
    x = torch.randn(shape).to(dtype)
    x[EMPTY] = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0], dtype=dtype)
    return x


@every_dtype
def test_padding_is_positive_zero_and_the_rest_is_as_it_was(dtype):
    x = poisoned(dtype)
    before = x.clone()
    assert blank_(x, VALID) is x
    assert (x[EMPTY] == 0).all() and not x[EMPTY].signbit().any()
    assert torch.equal(x[~EMPTY], before[~EMPTY])


@every_dtype
def test_what_is_not_contiguous(dtype):
    x, wide = poisoned(dtype), torch.randn(3, 2, 7).to(dtype)
    part = wide.transpose(0, 1)[..., :5]
    part.copy_(x)
    behind = wide[..., 5:].clone()
    blank_(part, VALID)
    assert torch.equal(part, blank_(x, VALID))
    assert torch.equal(wide[..., 5:], behind)
