"""Side: the history of a model's steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastrnn.recipes.errors import RecipeError
from fastrnn.recipes.side import Side, in_turn


def side(name: str = "test") -> Side:
    model = nn.Linear(2, 1)
    return Side(name, model, torch.optim.Adam(model.parameters()), nn.utils.clip_grad_norm_)


def step(side: Side, loss: float = 1.0) -> None:
    with side.timed():
        side.optimizer.zero_grad()
        side.model(torch.ones(1, 2)).sum().backward()
        side.optimizer.step()
    side.record(torch.tensor(loss), torch.tensor(2 * loss))


def test_steps_are_read_when_the_epoch_ends() -> None:
    trained = side()
    for loss in (1.0, 3.0):
        step(trained, loss)
    assert trained.losses == []
    trained.finish_epoch()
    assert (trained.losses, trained.norms) == ([1.0, 3.0], [2.0, 6.0])
    assert len(trained.seconds) == 2
    assert min(trained.seconds) > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss: float) -> None:
    trained = side("fastrnn")
    step(trained)
    step(trained, loss)
    with pytest.raises(
        RecipeError, match=f"loss of fastrnn became {loss} in step 2: try a smaller"
    ):
        trained.finish_epoch()


def test_state_dict_carries_everything_over() -> None:
    first, second = side(), side()
    step(first)
    first.finish_epoch()
    second.load_state_dict(first.state_dict())
    for trained in (first, second):
        step(trained)
        trained.finish_epoch()
    assert torch.equal(first.model.weight, second.model.weight)
    assert first.losses == second.losses == [1.0, 1.0]


def test_sides_take_turns_in_going_first() -> None:
    sides = [side("a"), side("b")]
    order = []
    for _ in range(3):
        for moving in in_turn(sides):
            step(moving)
            order.append(moving.name)
    assert "".join(order) == "abbaab"
