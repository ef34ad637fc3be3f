"""LuongAttention: its equation, and memories of any length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrnn.training import LuongAttention

B, S, N, P, E, A = 4, 7, 5, 6, 3, 2
LENGTHS = [7, 1, 0, 4]


def problem() -> tuple[LuongAttention, Tensor, Tensor]:
    attention = LuongAttention(P, E, A).double()
    memory = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
    return attention, memory, torch.randn(B, N, P, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("lengths", [None, LENGTHS, torch.tensor(LENGTHS)], ids=type)
def test_equation(lengths: object) -> None:
    attention, memory, h = problem()
    attend = attention.over(memory, lengths)
    actual, weights = attend(h), attend.weights(h)
    for b, length in enumerate([S] * B if lengths is None else LENGTHS):
        for t in range(N):
            m = memory[b, :length]
            a = torch.softmax(m @ attention.key.weight.T @ h[b, t], 0)
            context = a @ m
            both = torch.cat([context, h[b, t]])
            torch.testing.assert_close(actual[b, t], (attention.combine.weight @ both).tanh())
            torch.testing.assert_close(weights[b, t, :length], a)
            assert not weights[b, t, length:].any()


def test_what_stands_beyond_a_length_reaches_nothing() -> None:
    attention, memory, h = problem()
    found = []
    for padding in (0.0, math.nan):
        beyond = torch.arange(S) >= torch.tensor(LENGTHS)[:, None]
        filled = memory.detach().masked_fill(beyond[:, :, None], padding).requires_grad_()
        out = attention.over(filled, LENGTHS)(h)
        weights = [*attention.parameters(), h, filled]
        found.append([out, *torch.autograd.grad(out.square().sum(), weights)])
    for clean, dirty in zip(*found):
        assert torch.equal(clean, dirty)
    assert not found[1][-1][beyond].any()


def test_gradients() -> None:
    attention, memory, h = problem()
    assert torch.autograd.gradcheck(lambda m, q: attention.over(m, LENGTHS)(q), (memory, h))


def test_steps_do_not_see_each_other() -> None:
    attention, memory, h = problem()
    attend = attention.over(memory, LENGTHS)
    torch.testing.assert_close(attend(h)[:, 2:3], attend(h[:, 2:3]))


def test_output_is_as_wide_as_the_query_by_default() -> None:
    attention = LuongAttention(P, E)
    assert attention.over(torch.randn(B, S, E))(torch.randn(B, N, P)).shape == (B, N, P)


@pytest.mark.parametrize("shape", [(B, S), (B, S, E + 1)], ids=str)
def test_refuses_other_memories(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"memory must have shape \[B, S, 3\]"):
        LuongAttention(P, E).over(torch.zeros(shape))


def test_refuses_lengths_beyond_the_memory() -> None:
    with pytest.raises(ValueError, match="at most the 7 steps"):
        LuongAttention(P, E).over(torch.zeros(B, S, E), [S + 1] * B)


def test_refuses_another_batch() -> None:
    attend = LuongAttention(P, E).over(torch.zeros(B, S, E))
    with pytest.raises(ValueError, match=r"h must have shape \[4, n, P\]"):
        attend(torch.zeros(1, N, P))
