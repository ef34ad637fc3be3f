"""What must be true of an optimizer before its step is trusted with the scale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from fastrnn import GradientClipper
from fastrnn.clip.fused_step import why_unfused
from tests.clip.parameters import assert_bits, gradients, parameters, set_gradients


def foreign_step(optimizer: Optimizer, closure: Any = None) -> None:
    """A step that knows nothing of grad_scale."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.add_(p.grad, alpha=-group["lr"])


def on_instance(optimizer: Optimizer) -> None:
    optimizer.step = types.MethodType(foreign_step, optimizer)


def by_a_function(optimizer: Optimizer) -> None:
    optimizer.step = lambda closure=None: foreign_step(optimizer)


def wrapped_as_if_it_called_torchs(optimizer: Optimizer) -> None:
    step = types.MethodType(foreign_step, optimizer)
    step.__func__.__dict__.pop("__wrapped__", None)

    def wrapper(closure: Any = None) -> None:
        step()

    wrapper.__wrapped__ = optimizer.step
    optimizer.step = wrapper


def of_another_optimizer(optimizer: Optimizer) -> None:
    other = SGD([p.detach().clone() for p in optimizer.param_groups[0]["params"]], lr=1.0)
    optimizer.step = other.step


def without_hooks(optimizer: Optimizer) -> None:
    optimizer.step = types.MethodType(SGD.step.__wrapped__, optimizer)


def under_a_scheduler(optimizer: Optimizer) -> None:
    on_instance(optimizer)
    StepLR(optimizer, 10)


REPLACED: list[Callable[[Optimizer], None]] = [
    on_instance,
    by_a_function,
    wrapped_as_if_it_called_torchs,
    of_another_optimizer,
    without_hooks,
    under_a_scheduler,
]


def sgd(made: list[nn.Parameter]) -> Optimizer:
    return SGD(made, lr=1.0, fused=True)


class TestTheStepThatWillRun:
    @pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
    def test_a_replaced_one_gets_clipped_gradients(
        self, replace: Callable[[Optimizer], None]
    ) -> None:
        made = parameters()
        optimizer = sgd(made)
        replace(optimizer)
        clipper = GradientClipper(made, 0.1)
        with pytest.raises(ValueError, match="SGD has a step of its own"):
            clipper.clip_into(optimizer)
        clipper.step(optimizer)
        assert torch.stack([p.grad.norm() for p in made]).norm() <= 0.1001

    def test_one_replaced_on_the_class_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SGD, "step", foreign_step)
        assert "step of its own" in why_unfused(sgd(parameters()))

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("schedulers", [0, 1, 2])
    def test_torchs_wrappers_keep_the_fused_way(self, schedulers: int, compiled: bool) -> None:
        optimizer = sgd(parameters())
        for make in (lambda: StepLR(optimizer, 10), lambda: ExponentialLR(optimizer, 0.5))[
            :schedulers
        ]:
            make()
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        assert why_unfused(optimizer) is None


class TestHooks:
    def test_an_optimizer_gets_them_once(self) -> None:
        made = parameters()
        optimizer = sgd(made)
        for _ in range(20):
            clipper = GradientClipper(made, 0.1, history=2)
            set_gradients(made, 0)
            clipper.step(optimizer)
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        assert len(optimizer._optimizer_step_post_hooks) == 1

    def test_they_keep_neither_clipper_nor_optimizer(self) -> None:
        made = parameters()
        optimizer = sgd(made)
        clipper = GradientClipper(made, 0.1)
        clipper.step(optimizer)
        gone = weakref.ref(clipper), weakref.ref(optimizer)
        del clipper
        gc.collect()
        assert gone[0]() is None
        del optimizer
        gc.collect()
        assert gone[1]() is None

    def test_the_latest_of_two_clippers_counts(self) -> None:
        made, expected = parameters(), parameters()
        optimizer = sgd(made)
        GradientClipper(made, 5.0).clip_into(optimizer)
        GradientClipper(made, 0.1).step(optimizer)
        GradientClipper(expected, 0.1).step(sgd(expected))
        assert_bits(made, expected)


class TestClosures:
    @pytest.mark.parametrize("keyword", [False, True])
    @pytest.mark.parametrize(
        "name", ["other-tensors", "the-same-written", "none"], ids=lambda name: name
    )
    def test_one_that_computes_new_gradients_is_refused(self, name: str, keyword: bool) -> None:
        made = parameters()
        optimizer = Adam(made, fused=True)

        def closure() -> float:
            for p in made:
                if name == "other-tensors":
                    p.grad = torch.ones_like(p)
                elif name == "the-same-written":
                    p.grad += 1
                else:
                    p.grad = None
            return 1.0

        GradientClipper(made, 1.0).clip_into(optimizer)
        before = copy.deepcopy(made)
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(closure\) computes new"):
            optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert_bits([p.detach() for p in made], [p.detach() for p in before])
        assert not hasattr(optimizer, "grad_scale")

    @pytest.mark.parametrize("keyword", [False, True])
    def test_one_that_computes_nothing_is_taken(self, keyword: bool) -> None:
        """As Lightning passes to the step in manual optimization."""
        ours, theirs = parameters(), parameters()
        optimizer = Adam(ours, fused=True)
        GradientClipper(ours, 1.0).clip_into(optimizer)
        loss = optimizer.step(closure=lambda: 2.0) if keyword else optimizer.step(lambda: 2.0)
        assert loss == 2.0
        GradientClipper(theirs, 1.0).step(Adam(theirs, fused=True))
        assert_bits(ours, theirs)

    def test_one_that_clips_again_is_taken(self) -> None:
        ours, theirs = parameters(), parameters()
        optimizer = Adam(ours, fused=True)
        clipper = GradientClipper(ours, 1.0)

        def closure() -> None:
            set_gradients(ours, 5)
            clipper.clip_into(optimizer)

        clipper.clip_into(optimizer)
        optimizer.step(closure)
        set_gradients(theirs, 5)
        GradientClipper(theirs, 1.0).step(Adam(theirs, fused=True))
        assert_bits(ours, theirs)

    @pytest.mark.parametrize(
        "make",
        [
            lambda ps: AdamW(ps, lr=0.1, fused=True),
            lambda ps: SGD(ps, lr=0.1),
            lambda ps: LBFGS(ps, lr=0.1, max_iter=4),
        ],
        ids=["fused", "plain", "LBFGS"],
    )
    def test_step_clips_what_the_closure_computes(
        self, make: Callable[[list[nn.Parameter]], Optimizer]
    ) -> None:
        def closure_of(made: list[nn.Parameter], clip: bool) -> Callable[[], Tensor]:
            def closure() -> Tensor:
                for p in made:
                    p.grad = None
                loss = torch.stack([(p - 1).square().sum() for p in made]).sum()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(made, 1.0)
                return loss

            return closure

        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = make(ours), make(theirs)
        clipper = GradientClipper(ours, 1.0)
        for _ in range(3):
            norm = clipper.step(our_optimizer, closure=closure_of(ours, clip=False))
            assert norm == clipper.history().norm[-1]
            their_optimizer.step(closure_of(theirs, clip=True))
        assert_bits(ours, theirs)

    def test_lbfgs_without_a_closure_is_refused_by_name(self) -> None:
        made = parameters()
        with pytest.raises(TypeError, match=r"LBFGS computes gradients several times in a step"):
            GradientClipper(made, 1.0).step(LBFGS(made))

    def test_a_scaler_takes_no_closure(self) -> None:
        made = parameters()
        scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(ValueError, match="a GradScaler takes no closure"):
            GradientClipper(made, 1.0).step(sgd(made), scaler, lambda: None)

    def test_a_step_that_does_not_call_its_closure_is_an_error(self) -> None:
        made = parameters()
        optimizer = sgd(made)
        optimizer.step = lambda closure: None
        with pytest.raises(RuntimeError, match="has not called its closure"):
            GradientClipper(made, 1.0).step(optimizer, closure=lambda: None)


class TestParametersReplaced:
    """By fully_shard, to_empty, or new embeddings, after the clipper was created."""

    def replaced(self) -> tuple[GradientClipper, list[nn.Parameter]]:
        old, new = parameters(), parameters()
        for p in old:
            p.grad = None
        return GradientClipper(old, 0.1), new

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_that_would_not_be_clipped_is_an_error(self, fused: bool) -> None:
        clipper, new = self.replaced()
        optimizer = AdamW(new, fused=fused)
        before = copy.deepcopy(new)
        with pytest.raises(RuntimeError, match=r"none of the clipper's 4 .* create it after that"):
            clipper.step(optimizer)
        with pytest.raises(RuntimeError, match=r"none of the clipper's 4 parameters"):
            clipper.clip_into(optimizer)
        assert_bits([p.detach() for p in new], [p.detach() for p in before])

    def test_a_closure_too(self) -> None:
        clipper, new = self.replaced()
        with pytest.raises(RuntimeError, match=r"none of the clipper's 4 parameters"):
            clipper.step(SGD(new, lr=0.1), closure=lambda: None)

    def test_where_nobody_has_a_gradient_nothing_is_said(self) -> None:
        clipper, new = self.replaced()
        for p in new:
            p.grad = None
        assert clipper.step(AdamW(new)) == 0.0

    def test_some_of_them_are_warned_of_once(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, 0.1)
        made[1].grad = None
        optimizer = SGD([made[0], parameters((9,))[0], *made[2:]], lr=0.1)
        with pytest.warns(UserWarning, match="gradients of 1 parameters that the clipper does not"):
            clipper.step(optimizer)
        clipper.step(optimizer)

    def test_a_clipper_of_some_parameters_is_not_warned_of(self) -> None:
        made, more = parameters(), parameters((9,))
        made[1].grad = None
        GradientClipper(made, 0.1).step(SGD([*made, *more], lr=0.1))


class TestCopies:
    def used(self) -> tuple[nn.Module, Optimizer]:
        module = nn.Linear(3, 2)
        module.clipper = GradientClipper(module.named_parameters(), 0.1, nonfinite="skip")
        optimizer = AdamW(module.parameters(), fused=True)
        for _ in range(3):
            module(torch.ones(4, 3)).sum().backward()
            module.clipper.step(optimizer)
        return module, optimizer

    @staticmethod
    def saved(module: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_go_on_by_themselves(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        module, optimizer = self.used()
        again = duplicate(module)
        assert_bits(again.clipper.history(), module.clipper.history())
        assert_bits(again.clipper.parameter_norms(), module.clipper.parameter_norms())
        twin = AdamW(again.parameters(), fused=True)
        twin.load_state_dict(optimizer.state_dict())
        for each, steps_with in ((module, optimizer), (again, twin)):
            each.zero_grad()
            each(torch.ones(4, 3)).sum().backward()
            each.clipper.step(steps_with)
        assert_bits(list(again.parameters()), list(module.parameters()))
        assert again.clipper.steps == module.clipper.steps == 4
        assert_bits(gradients(list(again.parameters())), gradients(list(module.parameters())))
