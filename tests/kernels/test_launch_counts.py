"""How much is started around the kernels, and that nothing in the way waits for the GPU.

Counted on the real host path, with a stand-in for the GPU. Mathematics needs the two launches, a
product before, the products and the sum of the gradients after; what else is started costs the host
3 to 5 us each, and a short sequence's recurrence no more than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn.input import upload
from tests.kernels.stand_in_driver import GPU, counting, stand_in

T, B, I, H = 12, 6, 16, 256
LENGTHS = [12, 7, 5, 9, 1, 12]
VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
RESET = torch.arange(T) % 5 == torch.arange(B).unsqueeze(1)
NEEDED = {"lstm_forward_kernel", "lstm_backward_kernel", "addmm", "addmm_", "mm", "bmm", "sum"}


def on_gpu(value: Any) -> Tensor:
    return torch.as_tensor(value).to(GPU)


def packed() -> PackedSequence:
    sizes = VALID.sum(0)
    rows = torch.zeros(len(VALID[VALID]), I, device=GPU, requires_grad=True)
    order = torch.arange(B, device=GPU)
    return PackedSequence(rows, sizes, order, order)


# What to call a layer with, besides a padded x.
FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "lengths-list": lambda: {"lengths": LENGTHS},
    "lengths-host": lambda: {"lengths": torch.tensor(LENGTHS)},
    "mask-host": lambda: {"mask": VALID},
    "resets-host": lambda: {"resets": RESET},
    "packed": lambda: {"input": packed()},
    "lengths": lambda: {"lengths": on_gpu(LENGTHS)},
    "mask": lambda: {"mask": on_gpu(VALID)},
    "resets": lambda: {"resets": on_gpu(RESET)},
    "lengths-mask-resets": lambda: {
        "lengths": on_gpu(LENGTHS),
        "mask": on_gpu(VALID),
        "resets": on_gpu(RESET),
    },
    "lengths-host-resets": lambda: {"lengths": LENGTHS, "resets": on_gpu(RESET)},
}
ON_HOST = {"lengths-list", "lengths-host", "mask-host", "resets-host", "packed"}
every_form = pytest.mark.parametrize("form", FORMS)
directions_of = pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])


class Count(NamedTuple):
    forward: Counter[str]
    backward: Counter[str]
    copies: list[str]


def count(form: str, layers: int, directions: int, has_hx: bool = False, **config: Any) -> Count:
    """What a training step of a module starts."""
    lstm = fastrnn.LSTM(
        *(I, H, layers),
        bidirectional=directions == 2,
        batch_first=True,
        backend="triton",
        device=GPU,
        **config,
    )
    arguments = {"input": torch.zeros(B, T, I, device=GPU, requires_grad=True), **FORMS[form]()}
    if has_hx:
        shape = layers * directions, B, H
        arguments["hx"] = tuple(
            torch.zeros(shape, device=GPU, requires_grad=True) for _ in range(2)
        )
    with stand_in() as driver:
        with counting(driver) as forward:
            output, _ = lstm(**arguments)
        data = output.data if isinstance(output, PackedSequence) else output
        gradient = torch.zeros_like(data)
        with counting(driver) as backward:
            data.backward(gradient)
    copies = forward.copies + backward.copies
    return Count(Counter(forward.names), Counter(backward.names), copies)


def others(names: Counter[str]) -> int:
    """All but what mathematics needs."""
    return sum(number for name, number in names.items() if name not in NEEDED)


@directions_of
def test_a_dense_layer(directions: int) -> None:
    one, two, three = (count("dense", layers, directions) for layers in (1, 2, 3))
    layer = Count(three.forward - two.forward, three.backward - two.backward, [])
    # Both directions in one launch and one product of their own.
    assert layer.forward["lstm_forward_kernel"] == layer.forward["addmm"] == 1
    assert layer.backward["lstm_backward_kernel"] == layer.backward["sum"] == 1
    assert sum(layer.backward[name] for name in ("mm", "bmm", "addmm_")) == 2 + 2 * directions
    assert others(layer.forward) <= 4
    assert others(layer.backward) <= 8
    assert layer.forward.total() <= 3 + directions
    assert layer.backward.total() <= 6 + 3 * directions
    # Once a batch: steps, zero states, time in front, the output that the caller may write to; the
    # final states of several layers.
    assert (one.forward - layer.forward).total() <= 5
    assert (one.backward - layer.backward).total() <= 1
    assert (two.forward - layer.forward - one.forward).total() <= 2


@directions_of
@pytest.mark.parametrize(
    ("form", "most"),
    [
        ("lengths-list", 4),
        ("packed", 4),
        ("lengths", 6),
        ("mask", 6),
        ("resets", 12),
        ("lengths-mask-resets", 12),
    ],
)
def test_raggedness_costs_so_much_a_batch_and_nothing_a_layer(
    form: str, most: int, directions: int
) -> None:
    more = []
    for layers in (1, 3):
        ragged, dense = (count(name, layers, directions) for name in (form, "dense"))
        more.append(ragged.forward.total() - dense.forward.total())
        assert ragged.backward["previous_states_kernel"] == layers
        # Those of a dense batch, the kernel for h_{t-1} in every layer, and the way back.
        assert others(ragged.backward) <= others(dense.backward) + layers + 3
    assert more[0] == more[1] <= most


@pytest.mark.parametrize("form", ["dense", "lengths"])
def test_gates_made_again_cost_five_operations_more(form: str) -> None:
    saved, again = (count(form, 1, 2, memory=memory) for memory in ("save", "recompute"))
    assert again.forward == saved.forward
    # The biases' sum, the two products, three activations; of a dense batch h_{t-1} by the kernel.
    assert again.backward.total() - saved.backward.total() <= 6


@every_form
def test_what_comes_from_the_host_is_one_copy_that_nobody_waits_for(form: str) -> None:
    expected = ["pinned"] if form in ON_HOST or form == "lengths-host-resets" else []
    assert count(form, 2, 2).copies == expected


@every_form
@pytest.mark.parametrize("has_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_nothing_waits(form: str, has_hx: bool, memory: str) -> None:
    """What reads a value of the stand-in, or its size where that depends on values, is an error."""
    found = count(form, 2, 2, has_hx, memory=memory)
    assert found.forward["lstm_forward_kernel"] == found.backward["lstm_backward_kernel"] == 2


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.cpu, bool, Tensor.numpy, Tensor.unique],
    ids=lambda wait: wait.__name__,
)
def test_a_wait_is_an_error(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        wait(torch.ones(1, device=GPU))


def test_a_copy_from_pageable_memory_is_seen() -> None:
    with stand_in() as driver, counting(driver) as found:
        torch.tensor(LENGTHS).to(GPU, non_blocking=True)
    assert found.copies == ["pageable"]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("mps", False), ("meta", False)])
def test_the_memory_that_is_copied_from_is_pinned_for_cuda(device: str, pinned: bool) -> None:
    with mock.patch.object(torch, "empty") as empty:
        upload._staging(32, torch.device(device))
    assert empty.call_args.kwargs["pin_memory"] is pinned


def test_nothing_of_the_host_is_captured_in_a_graph() -> None:
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        pytest.raises(RuntimeError, match="put them on the GPU"),
    ):
        upload.upload(torch.device("cuda"), torch.tensor(LENGTHS))
