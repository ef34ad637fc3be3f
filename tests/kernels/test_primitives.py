"""sigmoid and tanh over the whole float32 range, and the sum of groups."""

from __future__ import annotations

import pytest
import torch

from fastrnn_kernels.primitives import sigmoid, sum_groups, tanh
from tests.interpreter import cooperative

import triton  # isort: skip
import triton.language as tl  # isort: skip

pytestmark = pytest.mark.interpreter


@triton.jit
def functions_kernel(x_ptr, sigmoid_ptr, tanh_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    tl.store(sigmoid_ptr + offsets, sigmoid(x))
    tl.store(tanh_ptr + offsets, tanh(x))


@triton.jit
def groups_kernel(product_ptr, total_ptr, GROUPS: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, B)[:, None] * N + tl.arange(0, N)[None, :]
    groups = tl.arange(0, GROUPS)[:, None, None] * (B * N)
    product = tl.load(product_ptr + groups + offsets[None, :, :])
    tl.store(total_ptr + offsets, sum_groups(product, GROUPS))


def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid and tanh of 4096 values."""
    results = torch.empty_like(x), torch.empty_like(x)
    with cooperative():
        functions_kernel[(1,)](x, *results, N=x.numel())
    return results


@pytest.mark.parametrize("reach", [1e-30, 1e-3, 0.6, 0.7, 5.0, 44.0, 100.0, 1e30])
def test_within_two_roundings(reach: float) -> None:
    x = torch.linspace(-reach, reach, 4096)
    got_sigmoid, got_tanh = evaluate(x)
    for got, exact in ((got_sigmoid, x.double().sigmoid()), (got_tanh, x.double().tanh())):
        # sigmoid of -88 and less is 0, for exp overflows: down there only the absolute error
        # counts.
        error = (got.double() - exact).abs() / exact.abs().clamp_min(1e-33)
        # exp's own error grows with its argument: |x| eps, as does torch's.
        assert error.max() <= 4e-7 * max(1.0, min(reach, 88.0))
    assert (got_sigmoid.double() - x.double().sigmoid()).abs().max() <= 2e-7
    assert (got_tanh.double() - x.double().tanh()).abs().max() <= 2e-7


def test_infinite_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 3e38, -3e38, 1e-45]).repeat(8)
    got_sigmoid, got_tanh = evaluate(x)
    expected = [1.0, 0.0, nan, 0.5, 0.5, 1.0, 0.0, 0.5]
    torch.testing.assert_close(got_sigmoid[:8], torch.tensor(expected), equal_nan=True)
    expected = [1.0, -1.0, nan, 0.0, 0.0, 1.0, -1.0, 1e-45]
    torch.testing.assert_close(got_tanh[:8], torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_every_group_is_added_once_to_its_element(groups: int) -> None:
    # Small whole numbers, whose sums are exact in any order.
    product = torch.randint(-1000, 1000, (groups, 4, 16)).float()
    total = torch.full((4, 16), float("nan"))
    with cooperative():
        groups_kernel[(1,)](product, total, GROUPS=groups, B=4, N=16)
    torch.testing.assert_close(total, product.sum(0), rtol=0, atol=0)
