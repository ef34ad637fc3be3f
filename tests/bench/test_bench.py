"""The benchmark at toy size: it measures what it says, refuses what is wrong, and cannot rot."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import cpu, memory, providers, report, results_file, verify
from bench.__main__ import main
from bench.results_file import Record
from bench.sections import CPU_SECTIONS, LOOPS, SECTIONS, Target, verdicts
from bench.timing import geometric_mean, interleave, quantile, rotated, speedup
from bench.workloads import Batches, Case, Shape

ROOT = Path(__file__).parents[2]
TOY = Shape(3, 6, 4, 8)
TRAINING = Case("ragged-training", TOY)

CASE_KEYS = {
    "id",
    "section",
    "batch",
    "steps",
    "input_size",
    "hidden_size",
    "lengths",
    "variant",
    "dtype",
    "num_layers",
    "bidirectional",
    "mode",
    "threads",
    "status",
}


def measure(path: Path, **options: Any) -> tuple[int, dict[str, Any], str]:
    """Run the CPU benchmark on the toy shape: exit status, results, what was printed."""
    text = io.StringIO()
    chosen = {"threads": (1,), "budget": 0.0, "min_rounds": 2, "shapes": (TOY,)} | options
    status = cpu.run(cpu.Options(**chosen), path, Console(file=text, width=120))
    return status, json.loads(path.read_text()), text.getvalue()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the command writes and prints, every section included."""
    path = tmp_path_factory.mktemp("bench") / "cpu-toy.json"
    shape = ",".join(map(str, TOY))
    arguments = ["--shape", shape, "--budget", "0", "--rounds", "1", "--threads", "1"]
    arguments += ["--cases", "^(?!memory.*lognormal)", "--out", str(path)]
    run = subprocess.run(
        [sys.executable, "-m", "bench", "cpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return path, run.stdout


def test_command_prints_every_section_and_the_targets(command: tuple[Path, str]) -> None:
    _, printed = command
    for section in CPU_SECTIONS.values():
        assert section.title in printed
    assert "Targets" in printed
    assert "ragged training ÷ packed" in printed


def test_results_follow_their_schema(command: tuple[Path, str]) -> None:
    record = results_file.load(command[0])
    assert set(record) == {
        "schema",
        "kind",
        "complete",
        "environment",
        "flags",
        "distributions",
        "memory_method",
        "cases",
        "left_out",
    }
    assert record["complete"] is False  # not the standard shapes
    assert record["environment"]["torch"] == torch.__version__
    documented = (ROOT / "bench/results/README.md").read_text()
    assert len({case["id"] for case in record["cases"]}) == len(record["cases"]) == 17
    for case in record["cases"]:
        measured = (
            {"rounds", "valid_steps", "verification"} if case["section"] != "memory" else set()
        )
        assert set(case) == CASE_KEYS | measured | {"providers", "ratios"}
        assert all(f"`{key}`" in documented for key in case)
        assert case["status"] == "ok"
        assert set(case["providers"]) == set(SECTIONS[case["section"]].providers)
        assert set(case["ratios"]) == set(case["providers"]) - {"fastrnn"}
        if case["section"] == "memory":
            continue
        assert case["rounds"] == SECTIONS[case["section"]].rounds
        for name, provider in case["providers"].items():
            assert set(provider) == {"seconds", "valid_steps_per_second"}
            seconds = provider["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            if name != "fastrnn":
                ours = case["providers"]["fastrnn"]["seconds"]["median"]
                assert case["ratios"][name]["median"] == pytest.approx(seconds["median"] / ours)
        verdict = case["verification"]["errors"]["fastrnn"]
        assert 0 <= verdict["error"] <= verdict["budget"] < 0.1


def pages(folder: Path, *parts: str) -> tuple[Path, Path]:
    """A page and a README with an old text between all the markers that they need."""
    found = folder / "page.md", folder / "README.md"
    for path, names in zip(found, (parts, ("summary", "random")), strict=True):
        olds = "\n".join("\nold\n".join(report.markers(name)) for name in names)
        path.write_text(f"before\n{olds}\nafter\n")
    return found


def test_report_writes_tables_and_plot_between_markers(
    command: tuple[Path, str], tmp_path: Path
) -> None:
    record = results_file.load(command[0])
    record["complete"] = True
    loss = next(case for case in record["cases"] if case["section"] == "ragged-training")
    loss["ratios"]["packed"]["median"] = 0.125
    results_file.save(record, tmp_path / "cpu-toy.json")
    page, readme = pages(tmp_path, "cpu")
    arguments = ["report", "--results", str(tmp_path)]
    arguments += ["--page", str(page), "--readme", str(readme)]
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "0.12×" in text  # rows where we lose stay in
    assert "**missed**" in text
    assert "(plots/cpu-toy.png)" in text
    assert (tmp_path / "plots/cpu-toy.png").stat().st_size > 10_000
    summary = readme.read_text()
    assert "old" not in summary.partition("<!-- bench:random")[0]
    assert f"{record['environment']['cpu']}, 1 thread" in summary
    assert "(0.12×) |" in summary  # the worst of its kind
    assert main(arguments) == 0
    assert page.read_text() == text
    assert readme.read_text() == summary


def test_the_pages_hold_what_the_results_say(tmp_path: Path) -> None:
    names = ("docs/benchmarks.md", "README.md")
    texts = [(ROOT / name).read_text() for name in names]
    copies = [tmp_path / Path(name).name for name in names]
    for copy, text in zip(copies, texts, strict=True):
        copy.write_text(text)
    report.write(results_file.RESULTS, *copies)
    assert [copy.read_text() for copy in copies] == texts


def test_report_refuses_an_incomplete_result(command: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "cpu-toy.json").write_text(command[0].read_text())
    with pytest.raises(ValueError, match="holds no complete result"):
        report.write(tmp_path, *pages(tmp_path, "cpu"))


@pytest.mark.parametrize("lacking", [0, 1], ids=["page", "readme"])
def test_report_refuses_texts_without_markers(
    lacking: int, command: tuple[Path, str], tmp_path: Path
) -> None:
    record = results_file.load(command[0]) | {"complete": True}
    results_file.save(record, tmp_path / "cpu-toy.json")
    texts = pages(tmp_path, "cpu")
    texts[lacking].write_text("nothing here\n")
    before = [path.read_text() for path in texts]
    with pytest.raises(ValueError, match="must hold the lines"):
        report.write(tmp_path, *texts)
    assert [path.read_text() for path in texts] == before


def test_report_writes_random_calls(tmp_path: Path) -> None:
    def case(form: str, ratio: float) -> Record:
        ratios = {"nn.LSTM": {"median": ratio}}
        name = f"{form}-{ratio}"
        return {"id": name, "section": form, "threads": 1, "status": "ok", "ratios": ratios}

    record = results_file.new_record("sweep", {}, torch.device("cpu"))
    record["cases"] = [case("dense", 1.0), case("packed", 4.0), case("lengths", 2.0)]
    record["cases"].append(case("step", 0.5))
    for threads in (1, 2):
        cases = [each | {"threads": threads} for each in record["cases"]]
        complete = record | {"complete": True, "cases": cases}
        results_file.save(complete, tmp_path / f"sweep-toy-{threads}.json")
    page, readme = pages(tmp_path, "sweep")
    report.write(tmp_path, page, readme)
    words = "in 4 random calls fastrnn is 1.41× as fast as nn.LSTM in the geometric mean and 0.50×"
    assert readme.read_text().count(words) == 2  # a sentence for each number of threads
    assert "25% of the calls are below 0.90×" in readme.read_text()
    assert "| step | 1 | 0.50× | 0.50× | 100% | `step-0.5` |" in page.read_text()


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_failed_verification_prints_no_speed(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = providers.FORWARDS["fastrnn"]

    def wrong(module: torch.nn.Module, batch: Any) -> providers.Outputs:
        output, h_n = right(module, batch)
        return output, h_n * 1.01

    monkeypatch.setitem(providers.FORWARDS, "fastrnn", wrong)
    status, record, printed = measure(tmp_path / "x.json", cases=f"^ragged-{mode}")
    assert status == 1
    assert "h_n of fastrnn differs" in printed
    assert " ms" not in printed
    assert "÷ packed, 1 thread" not in printed
    for case in record["cases"]:
        assert case["status"] == "failed"
        assert "providers" not in case
        assert "ratios" not in case


@pytest.mark.parametrize("wrong", ["d_x", "d_weight_hh_l0", "NaN"])
def test_verification_sees_every_gradient(wrong: str) -> None:
    batch = Batches(TRAINING)[0]
    reference = providers.Provider("packed", TRAINING).results(batch)
    results = providers.Provider("fastrnn", TRAINING).results(batch)
    assert set(results) == set(reference)
    allowed = dict.fromkeys(reference, 1e-5)
    assert verify.judge(results, reference, allowed).within
    if wrong == "NaN":
        results["output"][0, 0, 0] = float("nan")
        assert verify.judge(results, reference, allowed) == ("output", float("inf"), 1e-5)
    else:
        results[wrong] = results[wrong] * 1.01
        verdict = verify.judge(results, reference, allowed)
        assert (verdict.tensor, verdict.within) == (wrong, False)


def test_provider_that_cannot_run_is_reported_in_torchs_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: torch.nn.Module, batch: Any) -> providers.Outputs:
        raise RuntimeError("no such instruction here\nand a stack trace")

    monkeypatch.setitem(providers.FORWARDS, "padded", refuse)
    status, record, printed = measure(tmp_path / "x.json", cases="variants.*bfloat16-training")
    assert status == 0
    (case,) = record["cases"]
    assert case["providers"]["padded"] == {"unsupported": "no such instruction here"}
    assert set(case["ratios"]) == {"packed"}
    assert "not supp." in printed
    assert "no such instruction here" in printed


def test_stopping_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_case, calls = cpu.fill_times, []

    def stop_at_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one_case(*arguments)

    monkeypatch.setattr(cpu, "fill_times", stop_at_second)
    status, record, printed = measure(tmp_path / "x.json", cases="ragged-training")
    assert status == 130
    assert len(record["cases"]) == 1
    assert record["complete"] is False
    assert "stopped" in printed


def test_memory_of_a_step_is_that_of_its_tensors() -> None:
    shape = Shape(16, 100, 32, 64)
    case = Case("memory", shape, "full", training=False)
    output = 4 * shape.batch * shape.steps * shape.hidden_size
    with memory.Servers(1) as servers:
        assert output < servers.peak_bytes("padded", case, 1) < 40 * output


def test_threads_setting_is_left_as_found(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    measure(tmp_path / "x.json", threads=(before + 1,), cases="^dense.*inference")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("text", ["0", "two", "1,,2", "-1"])
def test_threads_must_be_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="threads must be positive integers or 'all'"):
        cpu.threads_from(text)


def test_threads_are_measured_once_each() -> None:
    assert cpu.threads_from(f"1,{torch.get_num_threads()},all,1") in {
        (1,),
        (1, torch.get_num_threads()),
    }


def test_standard_cases_are_those_of_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names)) == 10 + 10 + 10 + 8 + 4 + 10
    assert "ragged-training/B16-T400-I256-H512-lognormal-training" in names


@pytest.mark.parametrize("lengths", ["uniform", "lognormal", "full"])
def test_batches_are_drawn_anew_and_can_be_drawn_again(lengths: str) -> None:
    case = Case("ragged-training", Shape(16, 50, 2, 3), lengths)
    first, second = (Batches(case)[index] for index in (0, 1))
    again = Batches(case)[0]
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.lengths, again.lengths)
    assert torch.equal(first.lengths, second.lengths) == (lengths == "full")
    assert int(first.lengths.max()) == 50
    assert int(first.lengths.min()) >= (5 if lengths == "uniform" else 1)
    padding = torch.arange(50) >= first.lengths.unsqueeze(1)
    assert not first.x[padding].any()
    assert not first.d_output[padding].any()
    repeated = Batches(case, repeat=2)
    assert torch.equal(repeated[0].lengths, repeated[2].lengths)


def test_interleaving_times_only_the_run_and_stops_within_the_budget() -> None:
    now, order = 0.0, []
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def run(name: str) -> None:
        order.append(name)
        spend(costs[name])

    def measured(**limits: Any) -> dict[str, list[float]]:
        order.clear()
        samples = interleave(
            {name: lambda _, name=name: run(name) for name in costs},
            lambda index: spend(0.5) or index,
            lambda _: spend(0.5),
            clock=lambda: now,
            **limits,
        )
        return {name: sample.seconds for name, sample in samples.items()}

    # A round takes 9: three runs, their preparation and the batch.
    samples = measured(budget=60.0, min_rounds=1, max_rounds=100)
    assert samples == {name: [cost] * 6 for name, cost in costs.items()}
    rounds = [tuple(order[begin : begin + 3]) for begin in range(0, 18, 3)]
    assert len(set(rounds)) == 6  # every order once
    assert len(measured(budget=0.0, min_rounds=4, max_rounds=100)["a"]) == 4
    assert len(measured(budget=1e9, min_rounds=4, max_rounds=5)["a"]) == 5


def test_a_device_is_waited_for_before_and_after_each_run() -> None:
    """Work is queued in no time and done while it is waited for."""
    now = queued = 0.0

    def queue(seconds: float) -> None:
        nonlocal now, queued
        queued += seconds
        now += 0.125  # the call itself

    def wait() -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    samples = interleave(
        {"a": lambda _: queue(2.0), "b": lambda _: queue(4.0)},
        lambda index: index,
        lambda _: queue(100.0),  # preparing is done before the clock is read
        budget=0.0,
        min_rounds=3,
        max_rounds=3,
        clock=lambda: now,
        wait=wait,
    )
    assert samples["a"] == ([2.125] * 3, [0.125] * 3)
    assert samples["b"] == ([4.125] * 3, [0.125] * 3)


def test_each_provider_is_first_as_often_as_the_others() -> None:
    firsts = [rotated(["a", "b", "c"], index)[0] for index in range(12)]
    assert {name: firsts.count(name) for name in "abc"} == {"a": 4, "b": 4, "c": 4}


def test_speedup_is_the_ratio_of_medians() -> None:
    found = speedup([8.0, 10.0, 90.0], [2.0, 5.0, 4.0])
    assert found.median == 10.0 / 4.0
    assert found.p20 == pytest.approx(2.8)  # of the ratios 2, 4, 22.5 in each round
    assert found.p80 == pytest.approx(15.1)
    assert quantile([3.0, 1.0], 0.5) == 2.0
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def _case(section: str, ratios: dict[str, float], mode: str = "training") -> dict[str, Any]:
    ratios = {name: {"median": ratio} for name, ratio in ratios.items()}
    case = Case(section, TOY, training=mode == "training")
    size = TOY._asdict() | {"variant": "", "lengths": "uniform", "id": case.id}
    return size | {
        "section": section,
        "mode": mode,
        "threads": 1,
        "status": "ok",
        "ratios": ratios,
    }


def test_target_is_missed_by_one_case_below_the_worst() -> None:
    cases = [_case("ragged-training", {"packed": ratio, "padded": 1.0}) for ratio in (9.0, 1.9)]
    cases[1]["lengths"] = "lognormal"
    packed, padded = verdicts(cases)
    assert packed.mean == pytest.approx((9.0 * 1.9) ** 0.5)
    assert (packed.worst, packed.met) == (1.9, False)
    assert packed.worst_case.endswith("lognormal")
    assert padded.met is True
    cases[1]["status"] = "failed"
    assert verdicts(cases)[0].worst == 9.0


def test_resets_are_compared_with_the_faster_loop_and_the_usual_one() -> None:
    training, usual, inference, _ = verdicts(
        [
            _case("resets", {"lstm-loop": 9.0, "cell-loop": 4.0}),
            _case("resets", {"lstm-loop": 2.0, "cell-loop": 3.0}, "inference"),
        ]
    )
    assert training.target == Target(LOOPS, worst=5.0, mode="training")
    assert (training.worst, training.met) == (4.0, False)
    assert (usual.worst, usual.met) == (9.0, None)
    assert (inference.worst, inference.met) == (2.0, None)


@pytest.mark.parametrize(("ours", "met"), [(10, True), (11, True), (12, False)])
def test_memory_is_equal_within_a_mebibyte(ours: int, met: bool) -> None:
    peaks = {"fastrnn": ours << 20, "packed": 10 << 20, "padded": 10 << 20}
    case = _case("memory", dict.fromkeys(("packed", "padded"), 10 / ours))
    case["providers"] = {name: {"peak_bytes": peak} for name, peak in peaks.items()}
    assert verdicts([case])[0].met is met


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu-x.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="must be a result file of schema 1"):
        results_file.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        results_file.load(path)


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results_file.save({"schema": 1}, path)
    with pytest.raises(TypeError):
        results_file.save({"schema": object()}, path)
    assert json.loads(path.read_text()) == {"schema": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", ["1,2,3", "a,2,3,4", "0,1,1,1"])
def test_shape_must_be_four_numbers(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cpu", "--shape", shape])
    assert "expected four positive integers B,T,I,H" in capsys.readouterr().err


def test_regex_without_a_case_is_an_error(tmp_path: Path) -> None:
    text = io.StringIO()
    options = cpu.Options(threads=(1,), cases="nothing-like-this")
    assert cpu.run(options, tmp_path / "x.json", Console(file=text)) == 2
    assert "no case matches" in text.getvalue()
