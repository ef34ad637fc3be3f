"""``python -m bench lstm`` at toy size on the CPU, and what of it only a GPU would reach."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

from bench import devices, floors, footprint, lstm, markdown, plots, providers, report, rivals
from bench.__main__ import main
from bench.gpu_workloads import WORKLOADS, lstm_cases
from bench.providers import Provider
from bench.results_file import load, save
from bench.sections import LSTM_SECTIONS
from bench.workloads import PADDING, Batches, Case, Shape, draw_lengths

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# One of every section, and every kind of workload.
SOME = "speech-512.*bfloat16-3.*training|rl-rollout.*bfloat16-training|padding-50|open-field.*-H23"
SOME += "|open-field.*-H2[0-2]-|hard-ground.*-H17|large.*-H2[34]|batch-and-time.*-H55"
TOY = ("--device", "cpu", "--toy")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "lstm-toy.json"
    assert main(["lstm", *TOY, "--cases", SOME, "--out", str(path)]) == 0
    return load(path)


def with_gpu_figures(record: dict[str, Any]) -> dict[str, Any]:
    """The same as a GPU's result: invented figures in the places that a CPU leaves empty."""
    record = json.loads(json.dumps(record)) | {"complete": True}
    record["environment"]["gpu"] = {
        "name": "NVIDIA H100 80GB HBM3",
        "cuda": "13.0",
        "cudnn": 91900,
        "triton": "3.6.0",
        "tf32": {"rnn": "tf32", "matmul": "none"},
    }
    for case in record["cases"]:
        case["device"] = "cuda"
        for index, provider in enumerate(case["providers"].values()):
            provider |= {"peak_bytes": (index + 1) << 20, "launches": 7}
        case["cudnn"] = {"padded": {"forward": "PERSIST_STATIC", "backward": "STANDARD"}}
        floors.add(case, {"gpu": "H100 SXM", "microseconds": 1.0, "limits": ["forward: barrier"]})
    return record


def test_results_follow_their_schema(measured: dict[str, Any]) -> None:
    documented = (ROOT / "bench/results/README.md").read_text()
    assert {case["section"] for case in measured["cases"]} == set(LSTM_SECTIONS)
    assert measured["kind"] == "lstm"
    assert measured["complete"] is False
    assert measured["environment"]["gpu"] is None
    assert set(measured["workloads"]) == set(WORKLOADS)
    assert measured["not_installed"] == [
        providers.LABELS[name] for name in rivals.PACKAGES if not rivals.installed(name)
    ]
    for case in with_gpu_figures(measured)["cases"]:
        assert case["status"] == "ok"
        assert all(f"`{key}`" in documented for key in case)
        for provider in case["providers"].values():
            assert all(f"`{key}`" in documented for key in provider)
            assert 0 < provider["seconds"]["p20"] <= provider["seconds"]["p80"]
        assert set(case["ratios"]) == set(case["providers"]) - {"fastrnn"}
        verdict = case["verification"]["errors"]["fastrnn"]
        assert verdict["error"] <= verdict["budget"]


def test_ragged_dense_and_reset_cases_have_the_baselines_that_users_have(
    measured: dict[str, Any],
) -> None:
    found = {case["id"]: list(case["providers"]) for case in measured["cases"]}

    def of(text: str) -> list[str]:
        return next(names for name, names in found.items() if text in name)

    assert of("speech-512") == ["fastrnn", "packed", "padded"]
    assert of("rl-rollout") == ["fastrnn", "lstm-loop", "cell-loop"]
    assert of("open-field") == ["fastrnn", "padded"]


def test_report_writes_gpu_tables_and_plot(measured: dict[str, Any], tmp_path: Path) -> None:
    record = with_gpu_figures(measured)
    loss = next(case for case in record["cases"] if case["section"] == "open-field")
    loss["ratios"]["padded"]["median"] = 0.125
    save(record, tmp_path / "lstm-toy.json")
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    begin, end = report.markers("gpu")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    readme.write_text("\n".join(report.markers("summary")))
    arguments = ["report", "--results", str(tmp_path)]
    arguments += ["--page", str(page), "--readme", str(readme)]
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "0.12×" in text  # rows where we lose stay in
    assert "**missed**" in text
    assert "NVIDIA H100 80GB HBM3, CUDA 13.0, cuDNN 91900, Triton 3.6.0, TF32 on in RNNs" in text
    assert "PERSIST_STATIC / STANDARD" in text
    assert "(plots/lstm-toy.png)" in text
    assert (tmp_path / "plots/lstm-toy.png").stat().st_size > 10_000
    assert "|  | NVIDIA H100 80GB HBM3 |" in readme.read_text()


def test_gpu_results_need_their_markers(measured: dict[str, Any], tmp_path: Path) -> None:
    save(with_gpu_figures(measured), tmp_path / "lstm-toy.json")
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.markers("cpu")))
    with pytest.raises(ValueError, match="must hold the lines <!-- bench:gpu:begin -->"):
        report.write(tmp_path, page, tmp_path / "README.md")


def test_page_shows_incomplete_results_and_says_so(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    record = with_gpu_figures(measured) | {"complete": False, "left_out": ["a", "b"]}
    record["cases"][0] = {
        key: value
        for key, value in record["cases"][0].items()
        if key not in ("providers", "ratios")
    } | {"status": "failed", "error": "no such luck"}
    save(record, tmp_path / "lstm-toy.json")
    assert report.page(tmp_path) == [f"{tmp_path / 'report.md'}: tables"]
    text = (tmp_path / "report.md").read_text()
    assert "**Not the whole run:** 2 cases left out, 1 failed." in text
    assert "no such luck" in text


def test_plot_needs_no_case_of_any_kind(measured: dict[str, Any], tmp_path: Path) -> None:
    plots.plot_lstm(measured | {"cases": []}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1_000


def test_text_of_a_result_without_gpu_figures(measured: dict[str, Any]) -> None:
    assert "1 thread" in markdown.lstm_text(measured, None)


def test_standard_cases_are_distinct_and_most_telling_first() -> None:
    cases = lstm_cases()
    assert len({case.id for case in cases}) == len(cases)
    assert {case.section for case in cases} == set(LSTM_SECTIONS)
    assert [case.workload for case in cases[: len(WORKLOADS)]] == list(WORKLOADS)
    assert {case.dtype for case in cases[: len(WORKLOADS)]} == {torch.bfloat16}
    sizes = {c.shape.hidden_size for c in cases if c.section == "open-field"}
    assert sizes == {256, 512, 768, 1024}
    assert all(
        c.shape.hidden_size <= 128 or c.dtype == torch.float16
        for c in cases
        if c.section == "hard-ground"
    )


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_what_its_name_says_in_the_mean(name: str) -> None:
    shape = Shape(20_000, 1000, 1, 1)
    lengths = draw_lengths(shape, name, torch.Generator().manual_seed(0))
    assert lengths.min() >= 1
    padding = 1.0 - float(lengths.double().mean()) / shape.steps
    assert padding == pytest.approx(PADDING[name], abs=0.01)


def test_sizes_for_a_gpu_are_refused_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="sized for a GPU and none is here"):
        main(["lstm", "--device", "cpu"])


def test_memory_on_the_cpu_is_its_section_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *TOY, "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 2
    assert all(name.startswith("memory/B3-T6-I4-H8") for name in names)


def test_kernels_are_compiled_in_parts_and_what_cannot_run_is_passed_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case("life", Shape(3, 6, 4, 8)), Case("life", Shape(3, 6, 4, 9))]
    ran, right = [], providers.FORWARDS["fastrnn"]

    def forward(module: Any, batch: Any) -> providers.Outputs:
        ran.append(module.hidden_size)
        if module.hidden_size == 8:
            raise RuntimeError("no such tile")
        return right(module, batch)

    monkeypatch.setitem(providers.FORWARDS, "fastrnn", forward)
    assert lstm.compile_kernels(cases, CPU) == 0
    assert ran == [8, 9]
    assert "no such tile" in capsys.readouterr().out


# --- other projects' LSTMs, played by nn.LSTM ----------------------------------------------------


def test_what_is_not_installed_is_no_error() -> None:
    case = Case("life", Shape(3, 6, 4, 8), "full")
    for name in rivals.PACKAGES:
        if not rivals.installed(name):
            assert providers.cannot_run(name, case, CPU) == "not installed"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flashrnn", {"resets": True}, "has no resets"),
        ("flashrnn", {"bidirectional": True}, "has one direction only"),
        ("torchrl", {"resets": True}, None),
        ("torchrl", {}, None),
    ],
)
def test_rivals_are_asked_only_for_what_they_have(
    name: str, changes: dict[str, Any], reason: str | None
) -> None:
    case = Case("life", Shape(3, 6, 4, 8), "full", **changes)
    assert rivals.cannot_run(name, case, torch.device("cuda")) == reason
    assert rivals.cannot_run(name, case, CPU) == "runs on CUDA only"


def test_compiled_nn_lstm_is_measured_where_it_unrolls_few_steps() -> None:
    gpu = torch.device("cuda")
    short, long = (Case("life", Shape(3, steps, 4, 8), "full") for steps in (64, 65))
    assert providers.cannot_run("compiled", short, gpu) is None
    assert "unrolls 65 steps" in str(providers.cannot_run("compiled", long, gpu))
    assert "minutes" in str(providers.cannot_run("compiled", short, CPU))


def _lstm_triton(
    x: Any,
    hidden: Any,
    cell: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    is_init: Any,
    compute_dtype: torch.dtype,
) -> tuple[Any, ...]:
    """TorchRL's meaning: hidden and cell are read where an episode starts."""
    assert compute_dtype == x.dtype
    h, c = hidden[:, 0], cell[:, 0]
    steps = []
    for step in range(x.shape[1]):
        start = is_init[:, step].unsqueeze(1)
        h, c = torch.where(start, hidden[:, step], h), torch.where(start, cell[:, step], c)
        h, c = torch.lstm_cell(x[:, step], (h, c), w_ih, w_hh, b_ih, b_hh)
        steps.append(h)
    return torch.stack(steps, 1), None, h, c


def _flashrnn(Wx: Any, R: Any, b: Any, function: str, backend: str, dtype: str) -> tuple[Any, Any]:
    """FlashRNN's meaning: ``Wx [B, T, G, N, D]``, ``R [G, N, D, P]``, ``b [G, N, D]``."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    h = c = Wx.new_zeros(Wx.shape[0], *Wx.shape[3:])
    steps = []
    for gates_x in Wx.unbind(1):
        i, f, g, o = (gates_x + torch.einsum("gndp,bnp->bgnd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(torch.stack([h, c]))
    return torch.stack(steps, 2), steps[-1].unsqueeze(2)


@pytest.mark.parametrize(
    ("name", "resets"), [("flashrnn", False), ("torchrl", False), ("torchrl", True)]
)
def test_rivals_are_given_the_same_weights_in_their_own_layout(
    name: str, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("life", Shape(3, 6, 4, 8), "full", resets=resets, num_layers=1 if resets else 2)
    rival = types.ModuleType("rival")
    rival.lstm_triton, rival.flashrnn = _lstm_triton, _flashrnn  # type: ignore[attr-defined]
    for module in (
        "flashrnn",
        "flashrnn.flashrnn",
        "torchrl",
        "torchrl.modules",
        "torchrl.modules.tensordict_module",
        "torchrl.modules.tensordict_module._rnn_triton",
    ):
        monkeypatch.setitem(__import__("sys").modules, module, rival)
    batch = Batches(case)[0]
    reference = "lstm-loop" if resets else "padded"
    expected = Provider(reference, case).results(batch)
    found = Provider(name, case).results(batch)
    assert set(found) == set(expected)
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-4, atol=1e-5)


def test_the_step_loop_is_a_provider_of_its_own() -> None:
    case = Case("life", Shape(3, 6, 4, 8), "uniform")
    assert Provider("reference", case).module.backend == "reference"
    assert Provider("fastrnn", case).module.backend == "auto"
    options = lstm.Options(CPU, toy=True, reference=True, compiled=True)
    assert options.providers(case) == [
        "fastrnn",
        "packed",
        "padded",
        *(name for name in rivals.PACKAGES if rivals.installed(name)),
        "compiled",
        "reference",
    ]


# --- what a GPU adds -----------------------------------------------------------------------------


def test_kernels_are_counted_and_copies_are_not() -> None:
    def event(name: str, device: DeviceType) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=name, device_type=device)

    events = [
        event("lstm_forward_kernel", DeviceType.CUDA),
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
        event("Memset (Device)", DeviceType.CUDA),
        event("sgemm", DeviceType.CUDA),
        event("cudaLaunchKernel", DeviceType.CPU),
    ]
    assert footprint.count_kernels(events) == 2


def test_smi_is_read_by_field_and_anything_else_is_nothing() -> None:
    found = devices.parse_smi("580.1, 1980, 1980, 2619, 700.00, 31\n")
    assert found is not None
    assert (found["driver"], found["sm_mhz"], found["temperature_c"]) == ("580.1", "1980", "31")
    assert devices.parse_smi("No devices were found") is None


@pytest.mark.parametrize(
    ("name", "modelled"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_are_modelled_by_name_or_not_at_all(name: str, modelled: str | None) -> None:
    from bench.roofline import GPUS

    assert floors.modelled(name) == modelled
    assert modelled is None or modelled in GPUS


def test_floor_of_layers_is_the_sum_of_the_layers() -> None:
    def floor(num_layers: int, training: bool = True) -> float:
        case = Case(
            "life", Shape(4, 16, 64, 64), "full", training, torch.bfloat16, num_layers=num_layers
        )
        found = floors.floor(case, Batches(case), "H100 SXM")
        assert found is not None
        return float(found["microseconds"])

    assert floor(2) == pytest.approx(2 * floor(1))  # both have 64 features in
    assert 0 < floor(1, training=False) < floor(1)


def test_a_reset_begins_a_sequence_in_the_floor() -> None:
    case = Case("life", Shape(2, 5, 1, 1), "full")
    batch = Batches(case)[0]
    batch.resets = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert floors.sequence_lengths(batch) == [3, 2, 5]
    batch.resets = None
    assert floors.sequence_lengths(batch) == [5, 5]


def test_roofline_command_prints_a_line_for_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "16,64,256,512", "--gpu", "H200"]) == 0
    forward, backward = capsys.readouterr().out.splitlines()
    assert forward.startswith("H200 forward: at least")
    assert backward.startswith("H200 backward: at least")
    assert main(["roofline", "16,64,256,512", "--inference"]) == 0
    assert capsys.readouterr().out.startswith("H100 SXM forward")
    with pytest.raises(SystemExit, match="gpu must be one of"):
        main(["roofline", "16,64,256,512", "--gpu", "abacus"])


def test_part_of_the_floor_is_the_floor_over_the_median() -> None:
    record: dict[str, Any] = {
        "providers": {"fastrnn": {"seconds": {"median": 4e-6}}, "packed": {"unsupported": "x"}}
    }
    floors.add(record, {"microseconds": 1.0})
    assert record["providers"]["fastrnn"]["of_floor"] == pytest.approx(0.25)
    assert "of_floor" not in record["providers"]["packed"]


def test_tables_show_a_gpu(measured: dict[str, Any]) -> None:
    from bench import tables

    record = with_gpu_figures(measured)
    text = io.StringIO()
    console = Console(file=text, width=160)
    console.print(tables.heading(record))
    console.print(tables.section_table(record["cases"][:1], 160))
    console.print(tables.summary(record["cases"]))
    assert "NVIDIA H100 80GB HBM3" in text.getvalue()
    assert "of floor" in text.getvalue()
    assert "Targets · GPU" in text.getvalue()
