"""The recipe `gaps`, from its command line to its files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.recipes import gaps
from fastrnn.recipes.command_line import main
from fastrnn.recipes.compare import CompactedLSTM
from fastrnn.recipes.gaps_data import RECORD, Record, load_record
from fastrnn.recipes.side import Side
from fastrnn.recipes.text_files import read_text
from tests.recipe_runs import checkpoint, flat


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 600 hours of the record."""
    path = tmp_path_factory.mktemp("data") / "record.csv"
    path.write_text("\n".join(read_text(RECORD).splitlines()[:601]))
    return path


@pytest.fixture
def small(data: Path) -> list[str]:
    """A command line for a run of less than a second, but for --out."""
    options = "--hidden 5 --batch-size 4 --window 30 --epochs 3"
    return ["gaps", "--data", str(data), *options.split()]


def test_losses_fall_on_the_real_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gaps", "--out", str(tmp_path), "--epochs", "3", "--lr", "0.01"]) == 0
    for side in checkpoint(tmp_path)["sides"]:
        losses = side["losses"]
        assert len(losses) == 15
        assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    out = capsys.readouterr().out
    shown = r"validation errors: mask 0\.\d{3}, forward fill 0\.\d{3}"
    assert re.search(shown, " ".join(out.split()))
    assert "9,357 hours from 10 March 2004 to 04 April 2005" in out
    assert "2,416 of them (26%) not fully reported, in 349 holes of up to 173 hours" in out
    for words in ("forward fill", "as now", "as a day before", "CO, mg/m³", "NO₂, µg/m³"):
        assert words in " ".join(out.split())


@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["alone", "compare"])
def test_resumed_run_equals_the_uninterrupted_one(
    small: list[str], tmp_path: Path, compare: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, *compare, "--out", str(whole)]) == 0
    assert main([*small, *compare, "--out", str(parts), "--epochs", "1"]) == 0
    torch.manual_seed(99)  # whatever the process drew in the meantime
    assert main(["gaps", "--resume", "--out", str(parts), "--epochs", "3"]) == 0
    assert flat(checkpoint(whole)) == flat(checkpoint(parts))


def test_compare_trains_the_masked_sides_alike(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--out", str(tmp_path), "--compare"]) == 0
    ours, filled, theirs = checkpoint(tmp_path)["sides"]
    names = [side["name"] for side in (ours, filled, theirs)]
    assert names == ["mask", "forward fill", "nn.LSTM, compacted"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["losses"][1:] != pytest.approx(filled["losses"][1:], abs=1e-5)
    assert "test error" in capsys.readouterr().out


def test_compacted_nn_lstm_is_fastrnn_with_a_mask() -> None:
    ours = fastrnn.LSTM(3, 4, batch_first=True)
    theirs = CompactedLSTM(3, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(5, 9, 3), torch.rand(5, 9) < 0.6
    mask[0] = True
    torch.testing.assert_close(theirs(x, mask=mask), ours(x, mask=mask))


def test_the_test_period_is_read_once_at_the_end(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[int, int]]] = []
    measure = gaps.mean_error

    def spy(
        side: Side, series: gaps.Series, period: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        read.append((side.name, period))
        return measure(side, series, period, device)

    monkeypatch.setattr(gaps, "mean_error", spy)
    assert main([*small, "--out", str(tmp_path)]) == 0
    sides = ("mask", "forward fill")
    valid, test = (420, 477), (480, 597)  # three hours ahead, so three less
    assert read == [(side, valid) for _ in range(3) for side in sides] + [
        (side, test) for side in sides
    ]


def test_no_validation_figure_depends_on_the_test_period(data: Path) -> None:
    record, series = small_series(data)
    record.values[480:] = math.nan
    torch.manual_seed(0)
    model = gaps.Forecaster(fastrnn.LSTM, series.x.shape[1], 3, 5)
    nn.init.ones_(model.change.weight)
    side = Side("mask", model, torch.optim.SGD(model.parameters()), nn.utils.clip_grad_norm_)
    errors = [
        gaps.mean_error(side, some, (420, 477), torch.device("cpu"))
        for some in (series, gaps.make_series(record, 420, 3))
    ]
    assert torch.equal(errors[0], errors[1])
    assert not errors[0].isnan().any()


def small_series(data: Path) -> tuple[Record, gaps.Series]:
    record = load_record(data)
    return record, gaps.make_series(record, 420, 3)


def test_a_masked_hour_changes_no_forecast_of_mask_and_those_of_forward_fill(data: Path) -> None:
    _, series = small_series(data)
    assert 0 < int((~series.mask).sum()) < len(series.mask)
    series.x.requires_grad_()
    model = gaps.Forecaster(fastrnn.LSTM, series.x.shape[1], 3, 5)
    nn.init.ones_(model.change.weight)
    valid = series.mask
    for name, reads in (("mask", False), ("forward fill", True)):
        series.x.grad = None
        side = Side(name, model, torch.optim.SGD(model.parameters()), nn.utils.clip_grad_norm_)
        mask = gaps.mask_of(side, valid)
        model(series.x[None], mask[None], series.now.detach()[None])[0, valid].sum().backward()
        assert series.x.grad is not None
        assert bool(series.x.grad[~valid].any()) == reads
        assert bool(series.x.grad[valid].any())


def test_targets_are_the_reports_of_later_made_in_reported_hours(data: Path) -> None:
    record, series = small_series(data)
    pollutants = record.values[:, :3]
    for t in (0, 17, 101, 500):
        here = bool(series.mask[t]) & ~pollutants[t + 3].isnan()
        assert torch.equal(~series.targets[t].isnan(), here)
        change = (series.targets[t] - series.now[t]) * series.units
        expected = pollutants[t + 3] - pollutants[t]
        torch.testing.assert_close(change[here], expected[here], rtol=1e-4, atol=1e-3)
    assert series.targets[-3:].isnan().all()


def test_a_day_before_is_the_hour_that_is_forecast(data: Path) -> None:
    _, series = small_series(data)
    guess = gaps.guesses(series, 3)["as a day before"]
    assert torch.equal(guess[100], series.now[100 + 3 - 24])
    assert torch.equal(gaps.guesses(series, 24)["as a day before"][100], series.now[100])
    assert torch.equal(gaps.guesses(series, 30)["as a day before"][100], series.now[100 + 30 - 48])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--window 500", "at least 500 hours to learn from, some of them fully reported, got 417"),
        ("--ahead 500", "got 0: give a longer record"),
        ("--ahead 60", "forecasts of CO(GT) to be told by, made in hours 420 to 420 of the record"),
        ("--data nowhere", "got nowhere, which does not exist"),
    ],
)
def test_errors_leave_with_status_1(
    small: list[str],
    tmp_path: Path,
    options: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main([*small, "--out", str(out), *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()
