"""GradientClipper: the same as clip_grad_norm_, and what it adds."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

import fastrnn
from fastrnn import GradientClipper, clip_grad_norm_
from fastrnn.clip.history import Ring
from tests.clip.parameters import assert_bits, gradients, parameters, set_gradients, spoil

inf, nan = math.inf, math.nan


class TestClip:
    @pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, inf, 3.0])
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
    )
    def test_equals_clip_grad_norm_to_the_bit(
        self, dtype: torch.dtype, norm_type: float, ratio: float
    ) -> None:
        ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
        max_norm = ratio * clip_grad_norm_(parameters(dtype=dtype), inf, norm_type).item()
        norm = GradientClipper(ours, max_norm, norm_type).clip()
        assert_bits(norm, clip_grad_norm_(theirs, max_norm, norm_type))
        assert_bits(gradients(ours), gradients(theirs))

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    def test_equals_it_with_mixed_dtypes_too(self, max_norm: float) -> None:
        def make() -> list[nn.Parameter]:
            dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
            return [parameters((3, n + 1), dtype=dtypes[n % 4], seed=n)[0] for n in range(12)]

        ours, theirs = make(), make()
        clipper = GradientClipper(ours, max_norm)
        assert_bits(clipper.clip(), clip_grad_norm_(theirs, max_norm))
        assert_bits(gradients(ours), gradients(theirs))
        for p, norm in zip(make(), clipper.parameter_norms().values()):
            assert norm.item() == pytest.approx(p.grad.norm().item(), rel=1e-2)

    def test_step_after_step(self) -> None:
        ours, theirs = parameters(), parameters()
        clipper = GradientClipper(iter(ours), 8.0)
        for step in range(5):
            set_gradients(ours, step)
            set_gradients(theirs, step)
            assert_bits(clipper.clip(), clip_grad_norm_(theirs, 8.0))
            assert_bits(gradients(ours), gradients(theirs))

    def test_without_gradients_the_norm_is_zero_and_nothing_is_recorded(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, 1.0)
        for p in made:
            p.grad = None
        with pytest.warns(UserWarning, match="none of the clipper's 4 parameters has") as caught:
            assert_bits(clipper.clip(), torch.tensor(0.0))
        assert caught[0].filename == __file__
        assert_bits(clipper.clip(), torch.tensor(0.0))  # which says nothing any more
        assert clipper.steps == 0

    def test_autograd_is_left_alone(self) -> None:
        made = parameters()
        made[0].grad.requires_grad_()
        assert not GradientClipper(made, 0.1).clip().requires_grad
        assert torch.is_grad_enabled()

    def test_parameter_norms_have_the_names_given(self) -> None:
        model = nn.Linear(3, 2)
        model.weight.grad = torch.ones(2, 3)
        clipper = GradientClipper(model.named_parameters(), 1.0)
        clipper.clip()
        assert_bits(clipper.parameter_norms(), {"weight": torch.tensor(6.0).sqrt()})

    def test_parameter_norms_have_numbers_without_names(self) -> None:
        made = parameters()
        made[1].grad = None
        clipper = GradientClipper(made, 1.0)
        before = gradients(made)
        clipper.clip()
        expected = {str(n): before[n].norm() for n in (0, 2, 3)}
        torch.testing.assert_close(clipper.parameter_norms(), expected)

    def test_float16_norms_in_float32_do_not_overflow(self) -> None:
        made = [nn.Parameter(torch.zeros(9, dtype=torch.float16)) for _ in range(2)]
        for p in made:
            p.grad = torch.full((9,), 6e4, dtype=torch.float16)
        theirs = [nn.Parameter(p.detach()) for p in made]
        for p, q in zip(made, theirs):
            q.grad = p.grad.clone()
        assert GradientClipper(theirs, 1.0).clip() == inf  # as torch
        norm = GradientClipper(made, 1.0, norm_dtype=torch.float32).clip()
        truth = math.sqrt(18) * 6e4
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(truth, rel=1e-3)
        expected = torch.full((9,), 1 / math.sqrt(18), dtype=torch.float16)
        torch.testing.assert_close(made[0].grad, expected, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_norms_in_float32_are_not_rounded(self, dtype: torch.dtype) -> None:
        made = parameters((50, 50), (1000,), dtype=dtype)
        truth = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in made))
        norm = GradientClipper(made, inf, norm_dtype=torch.float32).clip()
        assert norm.item() == pytest.approx(truth, rel=1e-6)


class TestGroups:
    def test_each_max_norm_has_a_norm_of_its_own(self) -> None:
        ours, theirs = parameters(), parameters()
        groups = [{"params": ours[:2], "max_norm": 0.5}, {"params": ours[2:], "max_norm": 2.0}]
        norms = GradientClipper(groups, 100.0).clip()
        expected = [clip_grad_norm_(theirs[:2], 0.5), clip_grad_norm_(theirs[2:], 2.0)]
        assert_bits(norms, torch.stack(expected))
        assert_bits(gradients(ours), gradients(theirs))

    def test_groups_without_one_are_clipped_together(self) -> None:
        ours, theirs = parameters(), parameters()
        optimizer = SGD([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.1}], lr=1.0)
        norm = GradientClipper(optimizer.param_groups, 0.5).clip()
        assert_bits(norm, clip_grad_norm_(theirs, 0.5))
        assert_bits(gradients(ours), gradients(theirs))

    def test_both_kinds_at_once(self) -> None:
        ours, theirs = parameters(), parameters()
        groups = [
            {"params": ours[0]},
            {"params": iter(ours[1:2]), "max_norm": 0.25},
            {"params": ours[2:]},
        ]
        norms = GradientClipper(groups, 0.5).clip()
        expected = [
            clip_grad_norm_([theirs[0], *theirs[2:]], 0.5),
            clip_grad_norm_(theirs[1], 0.25),
        ]
        assert_bits(norms, torch.stack(expected))
        assert_bits(gradients(ours), gradients(theirs))

    def test_a_group_without_gradients(self) -> None:
        made = parameters()
        made[0].grad = None
        clipper = GradientClipper(
            [{"params": made[:1], "max_norm": 1.0}, {"params": made[1:]}], max_norm=0.5
        )
        expected = clip_grad_norm_(parameters()[1:], 0.5)
        assert_bits(clipper.clip(), torch.stack((torch.tensor(0.0), expected)))
        assert clipper.history().coefficient[0].tolist() == [1.0, pytest.approx(0.5 / expected)]

    def test_an_optimizers_parameter_names(self) -> None:
        model = nn.Linear(3, 2)
        model(torch.ones(1, 3)).sum().backward()
        optimizer = SGD(model.named_parameters(), lr=1.0)
        clipper = GradientClipper(optimizer.param_groups, 1.0)
        clipper.clip()
        assert list(clipper.parameter_norms()) == ["weight", "bias"]


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ([], ValueError, "no parameters"),
            ((p for p in ()), ValueError, "generator"),
            ([{"params": []}], ValueError, "no parameters"),
            (nn.Linear(2, 2), TypeError, r"got a Linear; pass its parameters\(\)"),
            (SGD([torch.ones(1)], lr=1.0), TypeError, "pass its param_groups"),
            ([3], TypeError, "must be tensors, got a int"),
            ([torch.ones(2)] * 2, ValueError, r"comes twice: 1, of shape \[2\]"),
        ],
        ids=["empty", "generator", "empty-group", "module", "optimizer", "number", "twice"],
    )
    def test_parameters(self, given: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            GradientClipper(given, 1.0)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"max_norm": -1.0}, r"max_norm must be at least 0, got -1\.0"),
            ({"max_norm": nan}, "max_norm must be at least 0, got nan"),
            ({"nonfinite": "ignore"}, "nonfinite must be one of keep, raise, skip, zero, got 'ig"),
            ({"percentile": 101}, "percentile must be from 0 to 100, got 101"),
            ({"norm_dtype": torch.float16}, r"norm_dtype must be None or torch\.float32, got"),
            ({"history": 0}, "history must be at least 1 step, got 0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            GradientClipper(parameters(), **{"max_norm": 1.0} | options)

    def test_a_groups_max_norm(self) -> None:
        with pytest.raises(ValueError, match="got -2"):
            GradientClipper([{"params": parameters(), "max_norm": -2}], 1.0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.1),
    "SGD-momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "Adam": lambda ps: Adam(ps, lr=0.1),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.1),
    "NAdam": lambda ps: NAdam(ps, lr=0.1),
}
FUSED: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.1, fused=True),
    "SGD-momentum": lambda ps: SGD(
        ps, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, fused=True
    ),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True, fused=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.1, fused=True),
    "Adagrad": lambda ps: Adagrad(ps, lr=0.1, weight_decay=0.1, fused=True),
}
BOTH = OPTIMIZERS | {f"fused-{name}": make for name, make in FUSED.items()}


class TestNonFinite:
    @pytest.mark.parametrize("value", [nan, inf])
    def test_keep_is_torchs_way(self, value: float) -> None:
        ours, theirs = parameters(), parameters()
        for made in (ours, theirs):
            spoil(made, value)
        clipper = GradientClipper(ours, 1.0)
        assert_bits(clipper.clip(), nn.utils.clip_grad_norm_(theirs, 1.0))
        assert_bits(gradients(ours), gradients(theirs))
        assert clipper.nonfinite_steps == 1

    @pytest.mark.parametrize("into", [False, True], ids=["clip", "clip_into"])
    def test_raise_comes_before_anything_is_done(self, into: bool) -> None:
        made = parameters()
        optimizer = Adam(made, fused=True)
        spoil(made)
        before = gradients(made)
        clipper = GradientClipper(made, 1.0, nonfinite="raise")
        with pytest.raises(RuntimeError, match=r"^The total norm of order 2\.0 for gradients"):
            clipper.clip_into(optimizer) if into else clipper.clip()
        assert_bits(gradients(made), before)
        assert not hasattr(optimizer, "grad_scale")
        assert clipper.nonfinite_steps == 1
        set_gradients(made, 1)
        clipper.clip()

    @pytest.mark.parametrize("by_hand", [False, True], ids=["step", "clip"])
    @pytest.mark.parametrize("bad", [0, 2], ids=["first", "later"])
    @pytest.mark.parametrize("name", BOTH)
    def test_skip_leaves_parameters_and_state_as_they_were(
        self, name: str, bad: int, by_hand: bool
    ) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = BOTH[name](ours), BOTH[name](theirs)
        our_clipper = GradientClipper(ours, 5.0, nonfinite="skip")
        their_clipper = GradientClipper(theirs, 5.0)

        def take(clipper: GradientClipper, optimizer: Optimizer) -> None:
            if by_hand:
                clipper.clip()
                optimizer.step()
            else:
                clipper.step(optimizer)

        for step in range(4):
            set_gradients(ours, step)
            if step == bad:
                spoil(ours)
                before = copy.deepcopy((ours, our_optimizer.state_dict()["state"]))
            take(our_clipper, our_optimizer)
            if step == bad:
                assert_bits([p.detach() for p in ours], [p.detach() for p in before[0]])
                if bad:
                    assert_bits(our_optimizer.state_dict()["state"], before[1])
            else:  # the other one never sees the bad step
                set_gradients(theirs, step)
                take(their_clipper, their_optimizer)
        assert_bits(ours, theirs)
        assert_bits(our_optimizer.state_dict()["state"], their_optimizer.state_dict()["state"])
        assert (our_clipper.steps, our_clipper.nonfinite_steps) == (4, 1)
        assert our_clipper.history().coefficient.isnan().tolist() == [n == bad for n in range(4)]

    @pytest.mark.parametrize("value", [nan, inf])
    def test_zero_sets_the_gradients_of_the_group_to_zero(self, value: float) -> None:
        ours, theirs = parameters(), parameters()
        spoil(ours, value)
        groups = [{"params": ours[:2], "max_norm": 1.0}, {"params": ours[2:], "max_norm": 1.0}]
        clipper = GradientClipper(groups, 1.0, nonfinite="zero")
        clipper.clip()
        clip_grad_norm_(theirs[2:], 1.0)
        assert not any(p.grad.any() for p in ours[:2])
        assert_bits(gradients(ours[2:]), gradients(theirs[2:]))
        assert clipper.history().coefficient[0, 0] == 0

    def test_skip_skips_all_groups(self) -> None:
        made = parameters()
        spoil(made)
        groups = [{"params": made[:2], "max_norm": 1.0}, {"params": made[2:], "max_norm": 1.0}]
        GradientClipper(groups, 1.0, nonfinite="skip").clip()
        assert all(p.grad is None for p in made)

    @pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
    def test_finite_steps_are_as_ever(self, nonfinite: Any) -> None:
        ours, theirs = parameters(), parameters()
        assert_bits(
            GradientClipper(ours, 1.0, nonfinite=nonfinite).clip(), clip_grad_norm_(theirs, 1.0)
        )
        assert_bits(gradients(ours), gradients(theirs))


class TestWithoutASync:
    """Tensors on the meta device have no values to wait for: to ask for one raises."""

    def make(self) -> list[nn.Parameter]:
        made = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
        for p in made:
            p.grad = torch.empty(3, device="meta")
        return made

    @pytest.mark.parametrize(
        "options",
        [{}, {"nonfinite": "zero"}, {"percentile": 10}, {"norm_dtype": torch.float32}],
        ids=str,
    )
    def test_clip(self, options: dict[str, Any]) -> None:
        assert GradientClipper(self.make(), 1.0, **options).clip().is_meta

    @pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"percentile": 10}], ids=str)
    def test_clip_into(self, options: dict[str, Any]) -> None:
        made = self.make()
        optimizer = Adam(made, fused=True)
        GradientClipper(made, 1.0, **options).clip_into(optimizer)
        assert optimizer.grad_scale.is_meta
        assert hasattr(optimizer, "found_inf") == (options == {"nonfinite": "skip"})

    def test_that_would_notice(self) -> None:
        with pytest.raises(RuntimeError, match="meta"):
            GradientClipper(self.make(), 1.0, nonfinite="skip").clip()


class TestHistory:
    def test_is_what_happened(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, 9.0)
        norms = []
        for step in range(6):
            set_gradients(made, step, scale=3.0 if step == 2 else 1.0)
            if step == 4:
                spoil(made)
            norms.append(clipper.clip().item())
        history = clipper.history()
        assert_bits(history.norm, torch.tensor(norms))
        assert history.step.tolist() == list(range(6))
        assert history.max_norm.tolist() == [9.0] * 6
        finite = [step for step in range(6) if step != 4]
        expected = [min(9.0 / (norms[step] + 1e-6), 1.0) for step in finite]
        torch.testing.assert_close(history.coefficient[finite], torch.tensor(expected))
        assert history.clipped.tolist() == [norms[step] > 9.0 for step in range(6)]
        assert history.clipped.any() and not history.clipped.all()
        assert history.nonfinite.tolist() == [step == 4 for step in range(6)]

    @pytest.mark.parametrize("read_between", [False, True])
    @pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
    def test_keeps_the_latest(self, steps: int, read_between: bool) -> None:
        made = parameters()
        clipper = GradientClipper(made, 1.0, history=4)
        norms = []
        for step in range(steps):
            set_gradients(made, step)
            norms.append(clipper.clip().item())
            if read_between:
                assert clipper.history().step[-1] == step
        assert clipper.history().norm.tolist() == norms[-4:]
        assert clipper.history().step.tolist() == list(range(steps))[-4:]
        assert clipper.steps == steps

    def test_has_a_column_for_each_group(self) -> None:
        made = parameters()
        groups = [{"params": made[:2], "max_norm": 2.0}, {"params": made[2:], "max_norm": 1.0}]
        clipper = GradientClipper(groups, 1.0)
        norms = clipper.clip()
        assert_bits(clipper.history().norm, norms[None])
        assert clipper.history().max_norm.tolist() == [[2.0, 1.0]]

    def test_on_a_device_it_is_the_same(self) -> None:
        ours, theirs = Ring(4, 2), Ring(4, 2)
        for step in range(7):
            row = torch.randn(3, 2)
            if step == 3:
                row[0, 1] = inf
            ours.record(*row)
            theirs._record_on_device(*row)
        assert_bits(ours.read(), theirs.read())
        assert ours.counts() == theirs.counts() == (7, 1)
        assert_bits(ours.percentile(30, row[0]), theirs.percentile(30, row[0]))

    def test_does_not_grow(self) -> None:
        ring = Ring(3, 1)
        for _ in range(10):
            ring.record(*torch.ones(3, 1))
            assert len(ring._unwritten) < 3

    def test_suggests_a_quantile_of_the_norms(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, inf, history=50)
        norms = []
        for step in range(20):
            set_gradients(made, step)
            if step == 7:
                spoil(made, inf)
            norm = clipper.clip().item()
            norms += [norm] * math.isfinite(norm)
        for quantile in (0.0, 0.5, 0.9, 1.0):
            suggested = clipper.suggest_max_norm(quantile)
            assert suggested == pytest.approx(np.quantile(norms, quantile), rel=1e-6)

    def test_suggests_nothing_from_nothing(self) -> None:
        clipper = GradientClipper(parameters(), inf)
        with pytest.raises(ValueError, match="train some steps first"):
            clipper.suggest_max_norm()
        with pytest.raises(ValueError, match="quantile must be from 0 to 1, got 90"):
            clipper.suggest_max_norm(90)

    def test_a_saved_state_goes_on(self, tmp_path: Path) -> None:
        made = parameters()
        whole, half = (GradientClipper(made, inf, percentile=30, history=6) for _ in range(2))
        for step in range(10):
            if step == 5:
                torch.save(half.state_dict(), tmp_path / "state")
                half = GradientClipper(made, inf, percentile=30, history=6)
                half.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            for clipper in (whole, half):
                set_gradients(made, step)
                clipper.clip()
        assert_bits(half.history(), whole.history())
        assert half.steps == 10

    def test_a_saved_state_of_another_form_is_refused(self) -> None:
        state = GradientClipper(parameters(), 1.0, history=6).state_dict()
        with pytest.raises(ValueError, match="of 6 steps and 1 groups, this one of 1000 and 1"):
            GradientClipper(parameters(), 1.0).load_state_dict(state)

    def test_a_saved_state_does_not_change_any_more(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, 1.0)
        clipper.clip()
        state = clipper.state_dict()
        before = copy.deepcopy(state)
        clipper.clip()
        clipper.history()
        assert_bits(state, before)


class TestPlot:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("max_norm", [9.0, inf, 0.1, 1e9])
    def test_writes_a_png(self, max_norm: float, groups: int, tmp_path: Path) -> None:
        made = parameters()
        given = [{"params": made[0], "max_norm": 1.0}, {"params": made[1:]}]
        clipper = GradientClipper(made if groups == 1 else given, max_norm)
        for step in range(5):
            set_gradients(made, step)
            if step == 3:
                spoil(made)
            clipper.clip()
        clipper.plot(tmp_path / "norms.png")
        assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")

    def test_needs_a_step(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no step is recorded"):
            GradientClipper(parameters(), 1.0).plot(tmp_path / "norms.png")

    def test_without_matplotlib_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        clipper = GradientClipper(parameters(), 1.0)
        clipper.clip()
        with pytest.raises(ModuleNotFoundError, match=r'pip install "fastrnn\[demo\]"'):
            clipper.plot(tmp_path / "norms.png")


class TestAutoClip:
    @pytest.mark.parametrize("percentile", [0, 10, 50, 100])
    def test_is_the_papers_algorithm(self, percentile: float) -> None:
        ours, theirs = parameters(), parameters()
        clipper = GradientClipper(ours, inf, percentile=percentile)
        seen: list[float] = []
        for step in range(12):
            for made in (ours, theirs):
                set_gradients(made, step, scale=1 + step % 3)
            norm = clipper.clip()
            # https://github.com/pseeth/autoclip: append the norm, then clip to the percentile.
            seen.append(clip_grad_norm_(theirs, inf).item())
            threshold = np.percentile(seen, percentile)
            clip_grad_norm_(theirs, threshold)
            assert norm.item() == seen[-1]
            torch.testing.assert_close(gradients(ours), gradients(theirs))
            assert clipper.history().max_norm[-1].item() == pytest.approx(threshold, rel=1e-6)

    def test_max_norm_bounds_it(self) -> None:
        ours, theirs = parameters(), parameters()
        GradientClipper(ours, 0.5, percentile=50).clip()
        clip_grad_norm_(theirs, 0.5)
        assert_bits(gradients(ours), gradients(theirs))

    def test_norms_that_are_not_finite_are_left_out(self) -> None:
        made = parameters()
        clipper = GradientClipper(made, 100.0, percentile=10, nonfinite="zero")
        norms = []
        for step in range(6):
            set_gradients(made, step)
            if step in (0, 3):
                spoil(made, inf)
            norms.append(clipper.clip().item())
        thresholds = clipper.history().max_norm.tolist()
        assert thresholds[0] == 100.0
        assert thresholds[-1] == pytest.approx(
            np.percentile([n for n in norms if math.isfinite(n)], 10), rel=1e-6
        )

    @pytest.mark.parametrize("name", FUSED)
    def test_goes_into_a_fused_step(self, name: str) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = FUSED[name](ours), FUSED[name](theirs)
        our_clipper, their_clipper = (
            GradientClipper(m, inf, percentile=20) for m in (ours, theirs)
        )
        for step in range(6):
            for made in (ours, theirs):
                set_gradients(made, step, scale=1 + step % 3)
            our_clipper.clip_into(our_optimizer)
            our_optimizer.step()
            their_clipper.clip()
            their_optimizer.step()
        assert_bits(our_clipper.history(), their_clipper.history())
        torch.testing.assert_close(ours, theirs)


class OwnStep(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Inherits(AdamW):
    """Has torch's own step."""


class TestClipInto:
    @pytest.mark.parametrize("max_norm", [1.0, 8.0, 1e3])
    @pytest.mark.parametrize("name", FUSED)
    def test_equals_clip_and_step(self, name: str, max_norm: float) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = FUSED[name](ours), FUSED[name](theirs)
        clipper = GradientClipper(ours, max_norm)
        for step in range(5):
            for made in (ours, theirs):
                set_gradients(made, step)
            before = gradients(ours)
            norm = clipper.clip_into(our_optimizer)
            assert_bits(gradients(ours), before)
            our_optimizer.step()
            assert_bits(norm, clip_grad_norm_(theirs, max_norm))
            their_optimizer.step()
            torch.testing.assert_close(gradients(ours), gradients(theirs))
            assert not {"grad_scale", "found_inf"} & vars(our_optimizer).keys()
        torch.testing.assert_close(ours, theirs)
        if max_norm == 1e3:
            assert_bits(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
        for made in (ours, theirs):
            optimizer = SGD(made, lr=0.1, fused=True)
            clipper = GradientClipper(made, 1.0, norm_dtype=torch.float32)
            if made is ours:
                clipper.clip_into(optimizer)
            else:
                clipper.clip()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)

    @pytest.mark.parametrize("max_norm", [0.0, 1e-30])
    def test_thresholds_near_zero(self, max_norm: float) -> None:
        made = parameters()
        before = copy.deepcopy(made)
        optimizer = SGD(made, lr=0.1, fused=True)
        GradientClipper(made, max_norm).clip_into(optimizer)
        optimizer.step()
        torch.testing.assert_close(made, before, rtol=0, atol=1e-29)

    @pytest.mark.parametrize("value", [nan, inf])
    def test_keep_is_torchs_way(self, value: float) -> None:
        ours, theirs = parameters(), parameters()
        for made in (ours, theirs):
            spoil(made, value)
        optimizer = SGD(ours, lr=0.1, fused=True)
        GradientClipper(ours, 1.0).clip_into(optimizer)
        optimizer.step()
        nn.utils.clip_grad_norm_(theirs, 1.0)
        assert_bits(gradients(ours), gradients(theirs))

    def test_the_next_step_without_it_is_a_plain_one(self) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = FUSED["Adam"](ours), FUSED["Adam"](theirs)
        clipper = GradientClipper(ours, 1.0, nonfinite="skip")
        clipper.step(our_optimizer)
        GradientClipper(theirs, 1.0).step(their_optimizer)
        for made, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            set_gradients(made, 1)
            optimizer.step()
        assert_bits(ours, theirs)

    def test_the_latest_call_counts(self) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = FUSED["SGD"](ours), FUSED["SGD"](theirs)
        clipper = GradientClipper(ours, 1.0)
        clipper.clip_into(our_optimizer)
        for made in (ours, theirs):
            set_gradients(made, 5)
        clipper.step(our_optimizer)
        GradientClipper(theirs, 1.0).step(their_optimizer)
        assert_bits(ours, theirs)

    def test_without_gradients(self) -> None:
        made = parameters()
        optimizer = FUSED["Adam"](made)
        clipper = GradientClipper(made, 1.0)
        clipper.clip_into(optimizer)
        optimizer.zero_grad()
        assert_bits(clipper.clip_into(optimizer), torch.tensor(0.0))
        assert not hasattr(optimizer, "grad_scale")

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda ps: RMSprop(ps), "RMSprop does not read grad_scale"),
            (lambda ps: NAdam(ps), "NAdam does not read grad_scale"),
            (lambda ps: Adam(ps), "Adam reads grad_scale only with fused=True"),
            (lambda ps: OwnStep(ps, fused=True), "OwnStep has a step of its own"),
            (lambda ps: Adam(ps[1:], fused=True), "steps 3 parameters .* clips 4"),
            (
                lambda ps: Adam([*ps, *parameters((2,))], fused=True),
                "steps 5 parameters .* clips 4",
            ),
        ],
        ids=["RMSprop", "NAdam", "unfused", "own-step", "fewer", "more"],
    )
    def test_refuses_other_optimizers(self, make: Callable[..., Optimizer], words: str) -> None:
        made = parameters()
        optimizer = make(made)
        clipper = GradientClipper(made, 1.0)
        before = gradients(made)
        with pytest.raises(ValueError, match=words):
            clipper.clip_into(optimizer)
        assert_bits(gradients(made), before)
        assert clipper.steps == 0
        clipper.step(optimizer)  # which takes clip() then
        assert_bits(clip_grad_norm_(parameters(), 1.0), clipper.history().norm[0])

    def test_takes_a_subclass_with_torchs_step(self) -> None:
        made = parameters()
        GradientClipper(made, 1.0).clip_into(Inherits(made, fused=True))

    def test_refuses_what_is_no_optimizer(self) -> None:
        made = parameters()
        with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
            GradientClipper(made, 1.0).clip_into(nn.Linear(1, 1))

    def test_refuses_several_groups(self) -> None:
        made = parameters()
        groups = [{"params": made[:2], "max_norm": 1.0}, {"params": made[2:]}]
        with pytest.raises(ValueError, match="takes one scale, and there are 2 groups"):
            GradientClipper(groups, 1.0).clip_into(Adam(made, fused=True))

    def test_refuses_to_zero(self) -> None:
        made = parameters()
        with pytest.raises(ValueError, match='nonfinite="zero" has to write the gradients'):
            GradientClipper(made, 1.0, nonfinite="zero").clip_into(Adam(made, fused=True))

    def test_refuses_a_scale_that_somebody_else_has_set(self) -> None:
        made = parameters()
        optimizer = Adam(made, fused=True)
        optimizer.grad_scale = torch.tensor(2.0)
        with pytest.raises(RuntimeError, match="has a grad_scale which this clipper has not set"):
            GradientClipper(made, 1.0).clip_into(optimizer)
        assert optimizer.grad_scale == 2.0

    def test_a_step_that_fails_leaves_nothing_behind(self) -> None:
        made = parameters()
        optimizer = Adam(made, fused=True)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            GradientClipper(made, 1.0).step(optimizer)
        assert not hasattr(optimizer, "grad_scale")


class TestGradScaler:
    """float16 mixed precision, as on a GPU, with `torch.amp.GradScaler("cpu")`."""

    SCALE = 2.0**10

    def scaled(self, made: list[nn.Parameter], seed: int, bad: bool = False) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=self.SCALE)
        scaler.scale(torch.zeros(()))
        set_gradients(made, seed, scale=self.SCALE)
        if bad:
            spoil(made, inf)
        return scaler

    @staticmethod
    def unscale_clip(clipper: GradientClipper, optimizer: Optimizer, scaler: Any) -> Tensor:
        scaler.unscale_(optimizer)
        norm = clipper.clip()
        scaler.step(optimizer)
        return norm

    @staticmethod
    def unscale_clip_into(clipper: GradientClipper, optimizer: Optimizer, scaler: Any) -> Tensor:
        scaler.unscale_(optimizer)
        norm = clipper.clip_into(optimizer)
        scaler.step(optimizer)
        return norm

    @staticmethod
    def clip_into(clipper: GradientClipper, optimizer: Optimizer, scaler: Any) -> Tensor:
        norm = clipper.clip_into(optimizer, scaler)
        scaler.step(optimizer)
        return norm

    @staticmethod
    def step(clipper: GradientClipper, optimizer: Optimizer, scaler: Any) -> Tensor:
        return clipper.step(optimizer, scaler)

    @pytest.mark.parametrize("way", ["unscale_clip_into", "step"])
    def test_an_optimizer_that_leaves_the_unscaling_to_the_scaler(self, way: str) -> None:
        ours, theirs = parameters(), parameters()
        optimizer = FUSED["Adagrad"](ours)
        optimizer._step_supports_amp_scaling = False  # as in torch 2.11
        clipper = GradientClipper(ours, 1.0)
        scaler = self.scaled(ours, 0)
        with pytest.raises(ValueError, match=r"call scaler\.unscale_\(optimizer\) first"):
            clipper.clip_into(optimizer, scaler)
        getattr(self, way)(clipper, optimizer, scaler)
        set_gradients(theirs, 0)
        GradientClipper(theirs, 1.0).step(FUSED["Adagrad"](theirs))
        torch.testing.assert_close(ours, theirs)
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()

    @pytest.mark.parametrize("max_norm", [1.0, 1e3])
    @pytest.mark.parametrize(
        ("way", "name"),
        [
            *(("unscale_clip", name) for name in ("Adam", "fused-Adam", "fused-SGD-momentum")),
            *(("unscale_clip_into", f"fused-{name}") for name in FUSED),
            *(("clip_into", f"fused-{name}") for name in FUSED if name != "Adagrad"),
            *(("step", name) for name in ("Adam", "RMSprop", "fused-Adam", "fused-SGD")),
        ],
    )
    def test_equals_a_step_without_scaling(self, way: str, name: str, max_norm: float) -> None:
        ours, theirs = parameters(), parameters()
        our_optimizer, their_optimizer = BOTH[name](ours), BOTH[name](theirs)
        clipper = GradientClipper(ours, max_norm)
        for step in range(3):
            scaler = self.scaled(ours, step)
            norm = getattr(self, way)(clipper, our_optimizer, scaler)
            scaler.update()
            set_gradients(theirs, step)
            torch.testing.assert_close(norm, clip_grad_norm_(theirs, max_norm))
            their_optimizer.step()
            assert not {"grad_scale", "found_inf"} & vars(our_optimizer).keys()
            assert scaler.get_scale() == self.SCALE
        torch.testing.assert_close(ours, theirs)
        assert clipper.history().norm[-1] == norm
        norms = torch.stack(list(clipper.parameter_norms().values()))
        torch.testing.assert_close(norms.norm(), norm)

    @pytest.mark.parametrize("nonfinite", ["keep", "skip"])
    @pytest.mark.parametrize(
        ("way", "name"),
        [
            ("unscale_clip", "Adam"),
            ("unscale_clip", "fused-Adam"),
            ("unscale_clip_into", "fused-Adam"),
            ("clip_into", "fused-Adam"),
            ("clip_into", "fused-SGD-momentum"),
            ("step", "SGD-momentum"),
        ],
    )
    def test_an_overflow_skips_the_step_and_lowers_the_scale(
        self, way: str, name: str, nonfinite: Any
    ) -> None:
        made = parameters()
        optimizer = BOTH[name](made)
        clipper = GradientClipper(made, 1.0, nonfinite=nonfinite)
        scaler = self.scaled(made, 0, bad=True)
        before = copy.deepcopy(made)
        getattr(self, way)(clipper, optimizer, scaler)
        scaler.update()
        assert_bits(made, before)
        assert scaler.get_scale() == self.SCALE / 2
        assert clipper.nonfinite_steps == 1
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()

    @pytest.mark.parametrize("unscaled", [False, True])
    def test_a_norm_that_overflows_though_no_gradient_does_is_skipped(self, unscaled: bool) -> None:
        made = parameters()
        optimizer = FUSED["SGD-momentum"](made)
        clipper = GradientClipper(made, 1.0, nonfinite="skip")
        scaler = self.scaled(made, 0)
        for p in made:
            p.grad.fill_(3e38)
        before = copy.deepcopy(made)
        if unscaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            scaler.scale(torch.zeros(()))
            scaler.unscale_(optimizer)
        clipper.clip_into(optimizer, None if unscaled else scaler)
        scaler.step(optimizer)
        assert_bits(made, before)
        assert clipper.nonfinite_steps == 1
        assert not any("momentum_buffer" in state for state in optimizer.state.values())

    @pytest.mark.parametrize("max_norm", [1.0, 1e9])
    def test_scaled_gradients_without_the_scaler_are_an_error(self, max_norm: float) -> None:
        made = parameters()
        optimizer = FUSED["Adam"](made)
        scaler = self.scaled(made, 0)
        before = copy.deepcopy(made)
        GradientClipper(made, max_norm).clip_into(optimizer)
        with pytest.raises(RuntimeError, match="the gradients are still scaled"):
            scaler.step(optimizer)
        assert_bits(made, before)
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()

    @pytest.mark.parametrize("max_norm", [1.0, 1e9])
    @pytest.mark.parametrize("unscaled", [False, True])
    def test_the_scaler_with_unscaled_gradients_or_without_its_step_is_an_error(
        self, unscaled: bool, max_norm: float
    ) -> None:
        made = parameters()
        optimizer = FUSED["Adam"](made)
        scaler = self.scaled(made, 0)
        before = copy.deepcopy(made)
        if unscaled:
            scaler.unscale_(optimizer)
        GradientClipper(made, max_norm).clip_into(optimizer, scaler)
        with pytest.raises(RuntimeError, match=r"clip_into was given a scaler"):
            scaler.step(optimizer) if unscaled else optimizer.step()
        assert_bits(made, before)

    @pytest.mark.parametrize("name", ["Adam", "fused-Adam"])
    def test_a_scaler_that_is_not_enabled(self, name: str) -> None:
        ours, theirs = parameters(), parameters()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        GradientClipper(ours, 1.0).step(BOTH[name](ours), scaler)
        GradientClipper(theirs, 1.0).step(BOTH[name](theirs))
        assert_bits(ours, theirs)


class TestOtherPeoplesLoops:
    """The shape of Lightning 2.6's and accelerate 1.15's calls, read from their sources."""

    class Module(nn.Linear):
        """What docs/clip.md shows for a LightningModule."""

        def configure_gradient_clipping(
            self,
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            if not hasattr(self, "clipper"):
                self.clipper = GradientClipper(self.named_parameters(), max_norm=0.5)
            self.norm = self.clipper.clip()

    class IntoModule(Module):
        def configure_gradient_clipping(
            self,
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            if not hasattr(self, "clipper"):
                self.clipper = GradientClipper(self.named_parameters(), max_norm=0.5)
            self.norm = self.clipper.clip_into(optimizer, self.scaler)

    def losses(self, module: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 12).view(4, 3)
        return (module(x) ** 2).sum() * 10

    def trained_by_torch(self, make: Callable[..., Optimizer], steps: int = 3) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = make(list(module.parameters()))
        for _ in range(steps):
            optimizer.zero_grad()
            self.losses(module).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
        return module

    @pytest.mark.parametrize("into", [False, True], ids=["clip", "clip_into"])
    def test_lightning_calls_the_hook_inside_the_closure(self, into: bool) -> None:
        torch.manual_seed(0)
        module = (self.IntoModule if into else self.Module)(3, 2)
        module.scaler = None
        optimizer = FUSED["AdamW"](list(module.parameters()))
        for _ in range(3):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.losses(module)
                loss.backward()
                module.configure_gradient_clipping(
                    optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
                )
                return loss

            optimizer.step(closure=closure)
            assert not hasattr(optimizer, "grad_scale")
        expected = self.trained_by_torch(FUSED["AdamW"])
        torch.testing.assert_close(list(module.parameters()), list(expected.parameters()))
        assert module.clipper.steps == 3

    def test_lightning_in_float16_leaves_the_unscaling_to_a_fused_optimizer(self) -> None:
        torch.manual_seed(0)
        module = self.IntoModule(3, 2)
        optimizer = FUSED["AdamW"](list(module.parameters()))
        module.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(self.losses(module)).backward()
            module.configure_gradient_clipping(optimizer, None, None)
            scaler.step(optimizer)
            scaler.update()
        expected = self.trained_by_torch(FUSED["AdamW"])
        torch.testing.assert_close(list(module.parameters()), list(expected.parameters()))

    def test_the_hook_takes_what_lightning_passes(self) -> None:
        # call._call_lightning_module_hook(trainer, "configure_gradient_clipping", optimizer,
        #     gradient_clip_val=clip_val, gradient_clip_algorithm=gradient_clip_algorithm)
        signature = inspect.signature(self.Module.configure_gradient_clipping)
        signature.bind(None, None, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    @pytest.mark.parametrize("name", ["RMSprop", "fused-AdamW"])
    def test_accelerate_unscales_then_steps_by_its_scaler(self, name: str) -> None:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = BOTH[name](list(module.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        clipper = GradientClipper(module.parameters(), max_norm=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(self.losses(module)).backward()  # accelerator.backward
            scaler.unscale_(optimizer)  # accelerator.unscale_gradients
            clipper.clip()
            scaler.step(optimizer, None)  # AcceleratedOptimizer.step passes its closure, None
            scaler.update()
        expected = self.trained_by_torch(BOTH[name])
        torch.testing.assert_close(list(module.parameters()), list(expected.parameters()))


def test_the_loop_of_the_docstring_trains() -> None:
    model = fastrnn.LSTM(3, 5, batch_first=True)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    clipper = GradientClipper(model.named_parameters(), max_norm=0.5)
    x, losses = torch.randn(4, 6, 3), []
    for _ in range(8):
        optimizer.zero_grad()
        out, _ = model(x, lengths=[6, 3, 1, 2])
        loss = (out.sum() - 3.0) ** 2
        loss.backward()
        assert clipper.step(optimizer).isfinite()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert clipper.history().clipped.any()
    assert list(clipper.parameter_norms()) == [n for n, _ in model.named_parameters()]


class TestMeasuredOnly:
    """Groups that are measured and never scaled, and that may be left out of the norm."""

    @pytest.mark.parametrize("nonfinite", ["keep", "raise", "skip", "zero"])
    @pytest.mark.parametrize("count", [True, False])
    def test_are_not_scaled(self, count: bool, nonfinite: Any) -> None:
        ours, theirs = parameters(), parameters()
        groups = [{"params": ours[:2], "clip": False, "count": count}, {"params": ours[2:]}]
        clipper = GradientClipper(groups, 0.5, nonfinite=nonfinite)
        before = gradients(ours)
        counted = theirs if count else theirs[2:]
        expected = clip_grad_norm_(counted, 0.5)
        torch.testing.assert_close(clipper.clip(), expected)
        assert_bits(gradients(ours[:2]), before[:2])
        torch.testing.assert_close(gradients(ours[2:]), gradients(theirs[2:]))
        each = clipper.parameter_norms()
        assert sorted(each) == ["0", "1", "2", "3"]
        torch.testing.assert_close(each, {str(n): g.norm() for n, g in enumerate(before)})

    def test_may_be_scaled_without_counting(self) -> None:
        ours, theirs = parameters(), parameters()
        clipper = GradientClipper([{"params": ours[:2], "count": False}, {"params": ours[2:]}], 0.5)
        norm = clipper.clip()
        assert_bits(norm, clip_grad_norm_(theirs[2:], 0.5))
        assert_bits(
            gradients(ours),
            [p.grad * (0.5 / (norm + 1e-6)) for p in theirs[:2]] + [p.grad for p in theirs[2:]],
        )

    @pytest.mark.parametrize("value", [nan, inf])
    @pytest.mark.parametrize("nonfinite", ["keep", "raise", "skip", "zero"])
    def test_what_does_not_count_may_be_to_blame(self, nonfinite: Any, value: float) -> None:
        made = parameters()
        spoil(made, value)
        groups = [{"params": made[:2], "clip": False, "count": False}, {"params": made[2:]}]
        clipper = GradientClipper(groups, 0.5, nonfinite=nonfinite)
        if nonfinite == "raise":
            with pytest.raises(RuntimeError, match="is non-finite"):
                clipper.clip()
            return
        norm = clipper.clip()
        assert norm.isnan() == (nonfinite != "keep")
        assert clipper.nonfinite_names() == ["1"]
        if nonfinite == "zero":
            assert not any(p.grad.any() for p in made)
        elif nonfinite == "skip":
            assert all(p.grad is None for p in made)
            assert clipper.nonfinite_steps == 1

    def test_a_clipper_that_only_measures(self) -> None:
        made = parameters()
        before = gradients(made)
        clipper = GradientClipper([{"params": made, "clip": False}], 0.1)
        norm = clipper.clip()
        assert_bits(norm, clip_grad_norm_(parameters(), inf))
        assert_bits(gradients(made), before)
        assert not clipper.history().clipped.any()

    def test_of_a_step_without_their_gradients(self) -> None:
        made = parameters()
        groups = [{"params": made[:2], "clip": False, "count": False}, {"params": made[2:]}]
        clipper = GradientClipper(groups, 0.5)
        for p in made[2:]:
            p.grad = None
        assert clipper.clip() == 0.0
        assert sorted(clipper.parameter_norms()) == ["0", "1"]

    def test_go_into_the_step_of_the_others(self) -> None:
        ours, theirs = parameters(), parameters()
        optimizer = AdamW(ours[2:], fused=True)
        groups = [{"params": ours[:2], "clip": False}, {"params": ours[2:]}]
        clipper = GradientClipper(groups, 0.5)
        norm = clipper.clip_into(optimizer)
        assert optimizer.grad_scale > 1
        optimizer.step()
        assert_bits(norm, clip_grad_norm_(theirs, 0.5))
        AdamW(theirs[2:], fused=True).step()
        torch.testing.assert_close(ours, theirs)

    def test_skip_has_to_take_their_gradients_away(self) -> None:
        made = parameters()
        groups = [{"params": made[:2], "clip": False}, {"params": made[2:]}]
        clipper = GradientClipper(groups, 0.5, nonfinite="skip")
        optimizer = AdamW(made[2:], fused=True)
        with pytest.raises(ValueError, match="gradients that are only measured"):
            clipper.clip_into(optimizer)
        spoil(made)
        clipper.step(optimizer)
        assert all(p.grad is None for p in made)

    @pytest.mark.parametrize(
        ("groups", "words"),
        [
            ([{"max_norm": 1.0, "clip": False}, {}], "max_norm of its own has to be clipped"),
            ([{"max_norm": 1.0, "count": False}, {}], "max_norm of its own has to be clipped"),
            ([{"count": False}, {"max_norm": 1.0}], "no parameter counts in the norm"),
        ],
        ids=["own-norm-unclipped", "own-norm-uncounted", "nothing-counts"],
    )
    def test_what_makes_no_sense(self, groups: list[dict[str, Any]], words: str) -> None:
        first, *rest = parameters()
        given = [group | {"params": ps} for group, ps in zip(groups, ([first], rest))]
        with pytest.raises(ValueError, match=words):
            GradientClipper(given, 1.0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_the_muon_recipe_of_the_docstring() -> None:
    def train(clipped: bool) -> tuple[list[nn.Parameter], list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        muon = torch.optim.Muon(matrices, lr=0.02)
        adamw = torch.optim.AdamW(others, lr=3e-4, fused=True)
        clipper = GradientClipper(
            [{"params": matrices, "clip": False, "count": False}, {"params": others}],
            max_norm=1.0,
        )
        x, norms = torch.randn(32, 6), []
        for _ in range(5):
            model.zero_grad()
            (model(x) - x[:, :3]).square().sum().backward()
            if clipped:
                norms.append(clipper.step(adamw).item())
                assert set(clipper.parameter_norms()) == {"0", "1", "2", "3"}
            else:
                norms.append(nn.utils.clip_grad_norm_(others, 1.0).item())
                adamw.step()
            muon.step()
        return list(model.parameters()), norms

    ours, theirs = train(clipped=True), train(clipped=False)
    assert max(theirs[1]) > 1.0
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


class TestWhoIsToBlame:
    def test_names(self) -> None:
        model = nn.Linear(3, 2)
        model(torch.ones(1, 3)).sum().backward()
        clipper = GradientClipper(model.named_parameters(), 1.0)
        assert clipper.nonfinite_names() == clipper.finite_names() == []  # nothing yet
        clipper.clip()
        assert (clipper.nonfinite_names(), clipper.finite_names()) == ([], ["weight", "bias"])
        model.bias.grad[0] = nan
        clipper.clip()
        assert (clipper.nonfinite_names(), clipper.finite_names()) == (["bias"], ["weight"])

    @pytest.mark.parametrize("way", ["clip", "step", "clip_into"])
    @pytest.mark.parametrize("max_skips", [1, 3])
    def test_so_many_skips_in_a_row_are_an_error(self, max_skips: int, way: str) -> None:
        made = parameters()
        optimizer = AdamW(made, fused=True)
        clipper = GradientClipper(made, 5.0, nonfinite="skip", max_skips=max_skips)
        before = copy.deepcopy(made)

        def take(bad: bool) -> None:
            set_gradients(made, 0)
            if bad:
                spoil(made)
            if way == "step":
                clipper.step(optimizer)
            else:
                clipper.clip() if way == "clip" else clipper.clip_into(optimizer)
                optimizer.step()

        for _ in range(max_skips - 1):
            take(bad=True)
        if max_skips > 1:
            take(bad=False)  # so that the row begins anew
            before = copy.deepcopy(made)
        for _ in range(max_skips - 1):
            take(bad=True)
        with pytest.raises(RuntimeError, match=rf"in {max_skips} steps in a row.*gradients: 1\."):
            take(bad=True)
        assert_bits([p.detach() for p in made], [p.detach() for p in before])
        assert not hasattr(optimizer, "grad_scale")

    def test_a_sum_that_overflows_has_no_one_to_blame(self) -> None:
        made = parameters()
        for p in made:
            p.grad.fill_(2.2e18)
        clipper = GradientClipper(made, 1.0, nonfinite="skip", max_skips=1)
        with pytest.raises(RuntimeError, match="none by itself, only their sum"):
            clipper.clip()

    def test_the_row_is_part_of_the_state(self) -> None:
        made = parameters()
        first, second = (
            GradientClipper(made, 1.0, nonfinite="skip", max_skips=2) for _ in range(2)
        )
        spoil(made)
        first.clip()
        second.load_state_dict(first.state_dict())
        set_gradients(made, 0)
        spoil(made)
        with pytest.raises(RuntimeError, match="in 2 steps in a row"):
            second.clip()

    def test_the_state_of_an_earlier_version_is_taken(self) -> None:
        clipper = GradientClipper(parameters(), 1.0)
        clipper.clip()
        state = clipper.state_dict()
        state["history"]["counts"] = state["history"]["counts"][:2]
        again = GradientClipper(parameters(), 1.0)
        again.load_state_dict(state)
        assert_bits(again.history(), clipper.history())

    def test_the_device_is_waited_for_once_in_so_many_steps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ring = Ring(10, 1)
        waits = []
        item = Tensor.item
        monkeypatch.setattr(Tensor, "item", lambda t: waits.append(t) or item(t))
        found = []
        for value in (1.0, inf, 1.0, 1.0, 1.0, inf, inf, inf, inf):
            row = torch.full((1,), value)
            ring._record_on_device(row, row, row)
            found.append(ring.nonfinite_in_a_row(3))
        assert found == [0, 0, 0, 0, 0, 0, 0, 3, 4]
        assert len(waits) < 6


class TestAFullHistory:
    @pytest.mark.parametrize("recorded", [0, 1, 5])
    def test_only_what_is_recorded_is_sorted(
        self, recorded: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ring = Ring(10**6, 1)
        for _ in range(recorded):
            ring.record(*torch.ones(3, 1))
        sorted_: list[int] = []
        sort = Tensor.sort
        monkeypatch.setattr(
            Tensor, "sort", lambda t, **options: sorted_.append(len(t)) or sort(t, **options)
        )
        ring.percentile(10, torch.ones(1))
        assert sorted_ == [recorded + 1]

    def test_longer_than_torchs_quantile_takes(self) -> None:
        ring = Ring(17_000_000, 1)
        ring._rows[:, 0, 0] = torch.arange(17_000_000, dtype=torch.float32)
        ring._rows_written = 17_000_000
        assert ring.percentile(50).item() == pytest.approx(8_499_999.5, rel=1e-7)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_is_numpys_percentile(self, groups: int) -> None:
        ring = Ring(50, groups)
        norms = torch.randn(70, groups).abs()
        norms[5::9, 0] = nan
        for row in norms:
            ring.record(row, row, row)
        for percent in (0.0, 10.0, 33.3, 50.0, 100.0):
            expected = np.nanpercentile(norms[-50:].numpy(), percent, axis=0)
            np.testing.assert_allclose(ring.percentile(percent).numpy(), expected, rtol=1e-5)
