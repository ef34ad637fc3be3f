"""Where the norm cannot be asked for: compiled and traced code, and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from fastrnn import GradientClipper, clip_grad_norm_
from fastrnn.clip.tracing import is_recorded, values_unknown
from tests.clip.parameters import assert_bits, parameters

SMALL, LARGE = torch.full((3,), 0.01), torch.full((3,), 10.0)
Clip = Callable[[list[nn.Parameter]], Tensor]
CLIPS: dict[str, Clip] = {
    "function": lambda ps: clip_grad_norm_(ps, 1.0),
    "clipper": lambda ps: GradientClipper(ps, 1.0).clip(),
    "clipper-zero": lambda ps: GradientClipper(ps, 1.0, nonfinite="zero").clip(),
}
every_clip = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)


def body(clip: Clip) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def clipped(grad: Tensor) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.zeros(3))
        p.grad = grad * 1.0
        return clip([p]), p.grad

    return clipped


TRACERS: dict[str, Callable[[Any], Any]] = {
    "make_fx": lambda f: make_fx(f)(SMALL),
    "make_fx-pre-dispatch": lambda f: make_fx(f, pre_dispatch=True)(SMALL),
    "make_fx-fake": lambda f: make_fx(f, tracing_mode="fake")(SMALL),
    "make_fx-symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(SMALL),
    "jit.trace": lambda f: torch.jit.trace(f, SMALL, check_trace=False),
}


class TestTraced:
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the clipper's constants
    @every_clip
    @pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
    def test_below_the_threshold_it_clips_above_it_all_the_same(
        self, trace: Callable[[Any], Any], clip: Clip
    ) -> None:
        traced = trace(body(clip))
        for grad in (LARGE, SMALL):
            expected = body(lambda ps: nn.utils.clip_grad_norm_(ps, 1.0))(grad)
            torch.testing.assert_close(traced(grad), expected)

    @pytest.mark.parametrize(
        "options", [{"nonfinite": "raise"}, {"nonfinite": "skip"}, {"percentile": 10}], ids=str
    )
    def test_what_a_graph_cannot_do_is_an_error(self, options: dict[str, Any]) -> None:
        with pytest.raises(RuntimeError, match="a graph is being recorded"):
            make_fx(body(lambda ps: GradientClipper(ps, 1.0, **options).clip()))(SMALL)

    def test_knows_a_graph_from_fake_tensors_and_from_neither(self) -> None:
        assert (is_recorded(), values_unknown()) == (False, False)
        with FakeTensorMode():
            assert (is_recorded(), values_unknown()) == (False, True)
        with FlopCounterMode(display=False):
            assert (is_recorded(), values_unknown()) == (False, False)


class TestFake:
    @every_clip
    def test_gradients_made_before_the_mode(self, clip: Clip) -> None:
        made = parameters()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert clip(made).shape == ()

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("nonfinite", ["keep", "raise", "skip", "zero"])
    def test_gradients_made_inside(self, nonfinite: Any, inside: bool) -> None:
        with FakeTensorMode() as mode:
            made = parameters()
            clipper = GradientClipper(made, 1.0, nonfinite=nonfinite)
        with mode if inside else torch.no_grad():
            assert isinstance(clipper.clip(), FakeTensor)
            assert isinstance(clip_grad_norm_(made, 1.0), FakeTensor)
        assert not clipper._ring._unwritten

    @pytest.mark.parametrize("nonfinite", ["keep", "skip"])
    def test_a_fused_step(self, nonfinite: Any) -> None:
        with FakeTensorMode():
            made = parameters()
            optimizer = AdamW(made, fused=True)
            norm = GradientClipper(made, 1.0, nonfinite=nonfinite).step(optimizer)
        assert isinstance(norm, FakeTensor)
        assert not hasattr(optimizer, "grad_scale")


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda ps: AdamW(ps, lr=1e-2, fused=True),
    "SGD": lambda ps: SGD(ps, lr=1e-1, momentum=0.9, fused=True),
    "unfused": lambda ps: AdamW(ps, lr=1e-2),
}


def train(name: str, way: str, compiled: bool) -> tuple[list[Tensor], Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    made = list(model.parameters())
    optimizer = OPTIMIZERS[name](made)
    clipper = GradientClipper(made, 0.3)

    def step() -> None:
        if way == "step":
            clipper.step(optimizer)
        elif way == "clip_into":
            clipper.clip_into(optimizer)
            optimizer.step()
        else:
            clipper.clip()
            optimizer.step()

    run = torch.compile(step, backend="aot_eager") if compiled else step
    for number in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x * (3, 0.01, 2, 0.02)[number]) ** 2).sum().backward()
        run()
    return [p.detach() for p in made], clipper.history()


class TestCompiled:
    @pytest.mark.filterwarnings("default")  # what torch compiles with is not ours to judge
    @pytest.mark.parametrize("way", ["step", "clip_into", "clip"])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_equals_eager_to_the_bit(self, name: str, way: str) -> None:
        if (name, way) == ("unfused", "clip_into"):
            pytest.skip("an optimizer that is not fused takes no scale")
        found, expected = (train(name, way, compiled=compiled) for compiled in (True, False))
        if (name, way) == ("unfused", "clip"):  # torch compiles that optimizer's operations
            torch.testing.assert_close(found, expected)
        else:
            assert_bits(found, expected)

    @pytest.mark.filterwarnings("default")
    def test_an_optimizer_in_the_backward_pass_under_compiled_autograd(self) -> None:
        def trained(compiled: bool) -> Tensor:
            torch._dynamo.reset()
            weight = nn.Parameter(torch.ones(3))
            optimizer = SGD([weight], lr=1.0, fused=True)
            clipper = GradientClipper(weight, 0.1)

            def hook(p: Tensor) -> None:
                clipper.step(optimizer)
                optimizer.zero_grad()

            weight.register_post_accumulate_grad_hook(hook)
            loss = (weight * torch.tensor([1.0, 20.0, 3.0])).sum()
            if compiled:
                compiler = torch.compile(backend="eager")
                with torch._dynamo.compiled_autograd._enable(compiler):
                    loss.backward()
            else:
                loss.backward()
            return weight.detach()

        assert_bits(trained(compiled=True), trained(compiled=False))

    def test_in_one_graph_is_an_error(self) -> None:
        clipper = GradientClipper(parameters(), 1.0)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            torch.compile(lambda: clipper.clip(), fullgraph=True, backend="eager")()

    def test_importing_fastrnn_does_not_import_the_compiler(self) -> None:
        import subprocess
        import sys

        code = "import sys, fastrnn; sys.exit('torch._dynamo' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LAZY: dict[str, Callable[[], Tensor]] = {
    "negative": lambda: torch._neg_view(torch.tensor([3.0, -4.0])),
    "conjugate": lambda: torch.tensor([3.0 + 1j, -4.0]).conj(),
    "imaginary-part": lambda: torch.tensor([3.0 + 1j, -4.0j]).conj().imag,
}


class TestNegatedOnlyWhenRead:
    """Torch's own foreach call refuses these; its loop takes them."""

    @pytest.mark.parametrize("max_norm", [0.5, 1e3])
    @pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
    def test_equals_torchs_loop(self, lazy: Callable[[], Tensor], max_norm: float) -> None:
        def make() -> list[Tensor]:
            made = []
            for grad in (lazy(), torch.ones(2, dtype=lazy().dtype)):
                p = torch.zeros_like(grad, requires_grad=True)
                p.grad = grad
                made.append(p)
            return made

        ours, clipped, theirs = make(), make(), make()
        expected = nn.utils.clip_grad_norm_(theirs, max_norm, foreach=False)
        assert_bits(clip_grad_norm_(ours, max_norm), expected)
        assert_bits(GradientClipper(clipped, max_norm).clip(), expected)
        for p, q, r in zip(ours, clipped, theirs):
            assert_bits([p.grad.resolve_neg(), q.grad.resolve_neg()], [r.grad.resolve_neg()] * 2)

    def test_are_set_to_zero(self) -> None:
        p = torch.zeros(2, requires_grad=True)
        p.grad = torch._neg_view(torch.tensor([3.0, torch.nan]))
        GradientClipper(p, 1.0, nonfinite="zero").clip()
        assert_bits(p.grad.resolve_neg().abs(), torch.zeros(2))

    def test_another_error_stays_what_it_is(self) -> None:
        p = torch.zeros(3, requires_grad=True)
        p.grad = torch.ones(1).expand(3)
        with pytest.raises(RuntimeError, match="single memory location"):
            clip_grad_norm_(p, 0.5)
