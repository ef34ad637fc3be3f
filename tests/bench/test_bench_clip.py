"""``python -m bench clip`` at toy size: every side is verified, and fastrnn has to be right."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clip, clip_providers, measure, report
from bench.__main__ import main
from bench.clip_cases import ClipCase, make_parameters
from bench.clip_verify import verified_clips, verified_steps
from bench.results_file import load, save

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "clip-toy.json"
    assert main(["clip", "--device", "cpu", "--toy", "--out", str(path)]) == 0
    return load(path)


def test_results_follow_their_schema(measured: dict[str, Any]) -> None:
    documented = (ROOT / "bench/results/README.md").read_text()
    assert (measured["kind"], measured["complete"]) == ("clip", False)
    sections = {"clip": [], "clip-and-step": []}  # type: ignore[var-annotated]
    for case in measured["cases"]:
        sections[case["section"]].append(case["clipped"])
        assert case["status"] == "ok"
        assert case["wrong"] == {}
        assert all(f"`{key}`" in documented for key in case)
        for provider in case["providers"].values():
            assert all(f"`{key}`" in documented for key in provider)
            assert 0 < provider["host_seconds"]["median"] <= provider["seconds"]["median"]
        errors = case["verification"]["errors"]
        assert errors["fastrnn"] <= case["verification"]["budget"]
    assert sections == {"clip": [False, True] * 2, "clip-and-step": [False, True] * 2}
    names = [list(case["providers"]) for case in measured["cases"]]
    assert names[0] == ["fastrnn", "foreach", "loop"]
    assert names[-1] == ["fastrnn", "clip-then-step", "foreach"]


def test_report_writes_the_clips_tables(measured: dict[str, Any], tmp_path: Path) -> None:
    save(measured | {"complete": True}, tmp_path / "clip-toy.json")
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text("\n".join(report.markers("clip")))
    readme.write_text("no markers: there is nothing to sum up")
    report.write(tmp_path, page, readme)
    text = page.read_text()
    assert "| 10 | 1,000 | float32 | yes |" in text
    assert "÷ torch foreach" in text
    assert "Clip, then a step of fused AdamW" in text


@pytest.mark.parametrize(("device", "largest"), [("cpu", 50_000_000), ("cuda", 100_000_000)])
def test_standard_cases_are_distinct(device: str, largest: int) -> None:
    options = clip.Options(torch.device(device))
    cases = options.select()
    assert options.complete
    assert len({case.id for case in cases}) == len(cases)
    assert max(case.elements for case in cases) == largest
    assert {case.clipped for case in cases} == {False, True}
    quick = clip.Options(torch.device(device), quick=True).select()
    assert max(case.elements for case in quick) <= 1_000_000


def parameters(case: ClipCase) -> list[torch.Tensor]:
    return make_parameters(case, CPU)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("wrong", ["norm", "scale"])
def test_a_wrong_clip_has_no_figures(
    wrong: str, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(given: Any, max_norm: float) -> torch.Tensor:
        norm = clip_providers.CLIPS["foreach"](given, max_norm)
        if wrong == "scale":
            given[0].grad *= 1.001
        return norm * 1.001 if wrong == "norm" else norm

    case = ClipCase(3, 30, clipped)
    max_norm = 1.0 if clipped else 1e9
    monkeypatch.setitem(clip_providers.CLIPS, "loop", bad)
    record: dict[str, Any] = {}
    assert "loop" not in verified_clips(record, parameters(case), max_norm)
    assert set(record["wrong"]) == {"loop"}
    monkeypatch.setitem(clip_providers.CLIPS, "fastrnn", bad)
    with pytest.raises(measure.Failed, match="fastrnn"):
        verified_clips({}, parameters(case), max_norm)


def test_a_step_that_does_not_clip_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(self: Any, given: Any, max_norm: float) -> torch.Tensor:
        self.optimizer.step()
        return torch.tensor(1.0)

    monkeypatch.setattr(clip_providers.Step, "_into", unclipped)
    given = parameters(ClipCase(3, 30, True, step=True))
    with pytest.raises(measure.Failed, match="moments are off"):
        verified_steps({}, given, 1.0)


def test_verifying_leaves_parameters_and_gradients_as_they_were() -> None:
    given = parameters(ClipCase(3, 30, True, step=True))
    before = [(p.detach().clone(), p.grad.clone()) for p in given]
    verified_clips({}, given, 1.0)
    verified_steps({}, given, 1.0)
    for parameter, (value, grad) in zip(given, before):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)


def test_rivals_are_sides_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(clip_providers.clips(CPU)) == ["fastrnn", "foreach", "loop"]
    monkeypatch.setattr(clip_providers, "installed", lambda name: True)
    assert list(clip_providers.clips(torch.device("cuda"))) == list(clip_providers.CLIPS)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_transformer_engine_is_called_as_megatron_does(
    max_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two kernels, played by torch."""

    def applier(kernel: Any, overflow: torch.Tensor, lists: Any, *arguments: Any) -> Any:
        return kernel(lists, *arguments)

    def l2norm(lists: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
        return torch.nn.utils.get_total_norm(lists[0]), None

    def scale(lists: Any, factor: float) -> None:
        for source, target in zip(*lists):
            target.copy_(source * factor)

    optimizers = types.ModuleType("optimizers")
    optimizers.multi_tensor_applier = applier  # type: ignore[attr-defined]
    optimizers.multi_tensor_l2norm = l2norm  # type: ignore[attr-defined]
    optimizers.multi_tensor_scale = scale  # type: ignore[attr-defined]
    for module in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, module, optimizers)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.optimizers", optimizers)
    ours, theirs = (parameters(ClipCase(3, 30, True)) for _ in range(2))
    norm = clip_providers.CLIPS["transformer-engine"](theirs, max_norm)
    torch.testing.assert_close(norm, clip_providers.CLIPS["foreach"](ours, max_norm))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize(("clipped", "times"), [(False, 1), (True, 3)])
def test_floor_of_a_clip_is_what_it_must_move(clipped: bool, times: int) -> None:
    found = clip.clip_floor(ClipCase(10, 1_000_000, clipped), "H100 SXM")
    once = clip.clip_floor(ClipCase(10, 1_000_000, False), "H100 SXM")
    assert found["microseconds"] == pytest.approx(times * once["microseconds"])
