"""sequence_loss: the mean over valid steps, and over nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastrnn.training import sequence_loss

B, T, V = 4, 6, 3
LENGTHS = [6, 0, 1, 4]


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(B, T, V, dtype=torch.float64), torch.randint(V, (B, T)), valid


@pytest.mark.parametrize("how", ["lengths", "tensor", "mask"])
def test_is_the_loss_of_the_valid_steps(how: str) -> None:
    outputs, targets, valid = ragged()
    if how == "mask":
        valid = torch.rand(B, T) < 0.5
    which = {"mask": valid} if how == "mask" else {"lengths": LENGTHS}
    which = {"lengths": torch.tensor(LENGTHS)} if how == "tensor" else which
    expected = F.cross_entropy(outputs[valid], targets[valid])
    torch.testing.assert_close(sequence_loss(outputs, targets, **which), expected)


def test_all_steps_by_default() -> None:
    outputs, targets, _ = ragged()
    expected = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(sequence_loss(outputs, targets), expected)


def test_time_first() -> None:
    outputs, targets, valid = ragged()
    expected = sequence_loss(outputs, targets, lengths=LENGTHS)
    turned = outputs.transpose(0, 1), targets.t()
    for which in ({"lengths": LENGTHS}, {"mask": valid.t()}):
        actual = sequence_loss(*turned, **which, batch_first=False)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("how", ["lengths", "mask"])
def test_padding_reaches_neither_loss_nor_gradient(how: str) -> None:
    outputs, targets, valid = ragged()
    which: dict[str, Any] = {"lengths": LENGTHS} if how == "lengths" else {"mask": valid}
    dirty = outputs.masked_fill(~valid[:, :, None], math.nan).requires_grad_()
    outputs.requires_grad_()
    expected = sequence_loss(outputs, targets, **which)
    actual = sequence_loss(dirty, targets.masked_fill(~valid, -100), **which)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in ((actual, dirty), (expected, outputs))]
    assert torch.equal(*grads)
    assert not grads[0][~valid].any()
    assert grads[0][valid].all()


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.binary_cross_entropy_with_logits])
def test_losses_of_values(loss: Any) -> None:
    outputs, _, valid = ragged()
    targets = torch.rand(B, T, V, dtype=torch.float64).masked_fill(~valid[:, :, None], math.nan)
    expected = loss(outputs[valid], targets[valid])
    torch.testing.assert_close(
        sequence_loss(outputs, targets, lengths=LENGTHS, loss=loss), expected
    )


def test_in_a_graph() -> None:
    outputs, targets, valid = ragged()
    compiled = torch.compile(sequence_loss, backend="eager", fullgraph=True)
    expected = sequence_loss(outputs, targets, mask=valid)
    torch.testing.assert_close(compiled(outputs, targets, mask=valid), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [T] * B, "mask": torch.ones(B, T) > 0}, "got both"),
        ({"lengths": [T]}, r"lengths must have shape \[4\]"),
        ({"lengths": [T + 1] * B}, "at most the 6 steps"),
        ({"mask": torch.ones(B, T)}, "mask must be bool"),
        ({"mask": torch.ones(T, B) > 0}, r"of shape \[4, 6\]"),
        ({"lengths": [0] * B}, "expected at least one valid step"),
        ({"mask": torch.zeros(B, T) > 0}, "expected at least one valid step"),
    ],
    ids=["both", "few", "long", "float", "turned", "none", "none-mask"],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sequence_loss(torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.int64), **options)


def test_refuses_targets_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"outputs \[4, 6, 3\] and targets \[6, 4\]"):
        sequence_loss(torch.zeros(B, T, V), torch.zeros(T, B, dtype=torch.int64))
