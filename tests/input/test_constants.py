"""What is kept between calls was made as outside of every mode, and no mode gets it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn.input.constants import constant


class Passing(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Marking(TorchFunctionMode):
    """A mode that hands out tensors of a class of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})).as_subclass(type("Marked", (torch.Tensor,), {}))


@pytest.fixture
def numbers():
    """A constant that no other test has made."""

    @constant(maxsize=4)
    def numbers(count):
        return torch.arange(count, device="cpu")

    return numbers


def test_it_is_made_once(numbers):
    assert numbers(3) is numbers(3)
    assert numbers(3).tolist() == [0, 1, 2]
    assert numbers(2).tolist() == [0, 1]


def in_fake_mode(make):
    with FakeTensorMode():
        return make()


def in_a_mode(make):
    with Passing():
        return make()


def in_inference_mode(make):
    with torch.inference_mode():
        return make()


def in_a_function_mode(make):
    with Marking():
        return make()


def in_make_fx(make):
    return make_fx(lambda x: x + make(), tracing_mode="fake")(torch.zeros(3))


def in_grad(make):
    return torch.func.grad(lambda x: (x * make()).sum())(torch.zeros(3))


def in_vmap(make):
    return torch.func.vmap(lambda x: x + make())(torch.zeros(2, 3))


INSIDE = {
    "fake": in_fake_mode,
    "dispatch": in_a_mode,
    "inference": in_inference_mode,
    "function": in_a_function_mode,
    "make_fx": in_make_fx,
    "grad": in_grad,
    "vmap": in_vmap,
}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_the_first_to_ask_leaves_nothing_of_its_own(inside, numbers):
    inside(lambda: numbers(3))
    found = numbers(3)
    assert type(found) is torch.Tensor
    assert not found.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(found)
    assert found.tolist() == [0, 1, 2]


def test_a_mode_sees_it_made(numbers):
    kept = numbers(3)
    with FakeTensorMode():
        assert isinstance(numbers(3), FakeTensor)
    assert numbers(3) is kept
    graph = in_make_fx(lambda: numbers(3))
    assert torch.equal(graph(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))
    assert any(node.target is torch.ops.aten.arange.default for node in graph.graph.nodes)
