"""Zeros in the padding, whatever stands there, and in gradients of any order."""

from __future__ import annotations

import math

import pytest
import torch

from fastrnn.input.blanking import blank_, blanked

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
    copy = blanked(x, VALID)
    assert blank_(x, VALID) is x
    assert copy.data_ptr() != x.data_ptr()
    for found in (x, copy):
        assert found.dtype == dtype
        assert (found[EMPTY] == 0).all() and not found[EMPTY].signbit().any()
        assert torch.equal(found[~EMPTY], before[~EMPTY])


@every_dtype
def test_what_is_not_contiguous(dtype):
    x, wide = poisoned(dtype), torch.randn(3, 2, 7).to(dtype)
    part = wide.transpose(0, 1)[..., :5]
    part.copy_(x)
    behind = wide[..., 5:].clone()
    copy = blanked(part, VALID)
    assert copy.is_contiguous()
    blank_(part, VALID)
    for found in (part, copy):
        assert torch.equal(found, blanked(x, VALID))
    assert torch.equal(wide[..., 5:], behind)
    assert torch.equal(blanked(x[:1, :1].expand(2, 3, 5), VALID)[~EMPTY], x[0, 0].expand(3, 5))


def test_gradients_of_any_order():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: blanked(x, VALID), x)
    assert torch.autograd.gradgradcheck(lambda x: blanked(x, VALID) ** 2, x)


@every_dtype
def test_a_differentiable_copy_is_the_same(dtype):
    x = poisoned(dtype)
    found = blanked(x.clone().requires_grad_(), VALID)
    assert found.requires_grad and torch.equal(found, blanked(x, VALID))


def test_a_gradient_of_nan_in_the_padding_stays_there():
    x = torch.randn(2, 3, 5, requires_grad=True)
    blanked(x, VALID).backward(poisoned(torch.float32))
    assert (x.grad[EMPTY] == 0).all() and x.grad.isfinite().all()
