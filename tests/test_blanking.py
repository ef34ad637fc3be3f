"""Zeros in the padding, whatever stands there, and in gradients of any order."""

from __future__ import annotations

import math

import pytest
import torch

from fastrnn.blanking import blank_, blanked, keep_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
EMPTY = torch.tensor([[False, True, False], [True, True, False]])
KEEP = keep_bits(EMPTY)


def poisoned(dtype, shape=(2, 3, 5)):
    x = torch.randn(shape).to(dtype)
    x[EMPTY] = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0], dtype=dtype)
    return x


@every_dtype
def test_padding_is_positive_zero_and_the_rest_is_as_it_was(dtype):
    x = poisoned(dtype)
    for found in (blanked(x, KEEP), blank_(x.clone(), KEEP)):
        assert found.dtype == dtype
        assert (found[EMPTY] == 0).all() and not found[EMPTY].signbit().any()
        assert torch.equal(found[~EMPTY], x[~EMPTY])


@every_dtype
def test_what_is_not_contiguous(dtype):
    wide, x = torch.randn(2, 3, 7).to(dtype), poisoned(dtype)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = blanked(transposed, KEEP)
    assert found.is_contiguous()
    assert torch.equal(found, blanked(x, KEEP))
    assert torch.equal(blanked(x[:1, :1].expand(2, 3, 5), KEEP)[~EMPTY], x[0, 0].expand(3, 5))
    before = wide.clone()
    blank_(wide[..., :5], KEEP)
    assert torch.equal(wide[..., 5:], before[..., 5:])
    assert (wide[EMPTY][:, :5] == 0).all()


def test_a_copy_shares_no_memory():
    x = torch.randn(2, 3, 5)
    assert blanked(x, KEEP).data_ptr() != x.data_ptr()
    assert blank_(x, KEEP) is x


def test_gradients_of_any_order():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: blanked(x, KEEP), x)
    assert torch.autograd.gradgradcheck(lambda x: blanked(x, KEEP) ** 2, x)


def test_a_gradient_of_nan_in_the_padding_stays_there():
    x = torch.randn(2, 3, 5, requires_grad=True)
    blanked(x, KEEP).backward(poisoned(torch.float32))
    assert (x.grad[EMPTY] == 0).all() and x.grad.isfinite().all()
