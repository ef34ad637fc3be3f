"""The budget rule of the benchmarks, and cuDNN's algorithms as torch's rule selects them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench import measure, providers, verify
from bench.providers import is_checked, reference_of
from bench.workloads import Batches, Case, Shape
from fastrnn.choosing import cudnn

H100, A40, A30, V100, T4 = (
    cudnn.Gpu((9, 0), 132),
    cudnn.Gpu((8, 6), 84),
    cudnn.Gpu((8, 0), 56),
    cudnn.Gpu((7, 0), 80),
    cudnn.Gpu((7, 5), 40),
)
SMALL = "PERSIST_STATIC_SMALL_H"
FLAT = Case("life", Shape(64, 256, 512, 512), "full", dtype=torch.float16)


def with_(case: Case, **changes: Any) -> Case:
    shape = {name: changes.pop(name) for name in Shape._fields if name in changes}
    return Case(**{**vars(case), **changes, "shape": case.shape._replace(**shape)})


@pytest.mark.parametrize(
    ("changes", "gpu", "packed", "forward", "backward"),
    [
        ({}, H100, False, "PERSIST_STATIC", "PERSIST_STATIC"),
        ({}, H100, True, "STANDARD", "STANDARD"),
        ({"dtype": torch.bfloat16}, H100, False, "STANDARD", "STANDARD"),
        ({"dtype": torch.float32}, H100, False, "STANDARD", "STANDARD"),
        ({"num_layers": 2}, H100, False, "STANDARD", "STANDARD"),
        ({"bidirectional": True}, H100, False, "STANDARD", "STANDARD"),
        ({"hidden_size": 1152}, H100, False, "STANDARD", "STANDARD"),
        ({"hidden_size": 520}, H100, False, "STANDARD", "STANDARD"),
        ({"input_size": 80}, H100, False, "STANDARD", "STANDARD"),
        ({"batch": 60}, H100, False, "STANDARD", "STANDARD"),
        ({"batch": 136}, H100, False, "STANDARD", "STANDARD"),
        ({"batch": 128}, H100, False, "PERSIST_STATIC", "PERSIST_STATIC"),
        ({"hidden_size": 192}, H100, False, SMALL, "STANDARD"),
        ({"hidden_size": 193}, H100, False, "STANDARD", "STANDARD"),
        ({"hidden_size": 128}, H100, False, SMALL, SMALL),
        (
            {"hidden_size": 128, "dtype": torch.bfloat16},
            H100,
            False,
            *["PERSIST_STATIC_SMALL_H"] * 2,
        ),
        ({"hidden_size": 128, "dtype": torch.float64}, H100, False, "STANDARD", "STANDARD"),
        ({"hidden_size": 128}, H100, True, "STANDARD", "STANDARD"),
        ({}, A40, False, "STANDARD", "STANDARD"),
        ({}, A30, False, "STANDARD", "STANDARD"),
        ({}, T4, False, "STANDARD", "STANDARD"),
        ({}, V100, False, "PERSIST_STATIC", "PERSIST_STATIC"),
        ({"batch": 80}, V100, False, "STANDARD", "STANDARD"),
        ({"batch": 128, "steps": 39}, V100, False, "STANDARD", "STANDARD"),
        ({"batch": 96, "steps": 20}, V100, False, "PERSIST_STATIC", "PERSIST_STATIC"),
    ],
)
def test_algorithm_is_the_one_of_torchs_rule(
    changes: dict[str, Any], gpu: cudnn.Gpu, packed: bool, forward: str, backward: str
) -> None:
    case = with_(FLAT, **changes)
    layers = case.layers(packed=packed)
    assert cudnn.algorithm(layers, gpu, forward=True) == forward
    assert cudnn.algorithm(layers, gpu, forward=False) == backward
    assert cudnn.algorithm(layers._replace(proj_size=64), gpu, forward=True) == "STANDARD"


def test_budget_is_twice_the_references_worst_error_of_a_kind() -> None:
    truth = {name: torch.tensor([1.0, -4.0], dtype=torch.float64) for name in ("y", "d_a", "d_b")}
    reference = {
        "y": torch.tensor([1.0, -4.04]),
        "d_a": torch.tensor([1.0, -4.4]),
        "d_b": torch.tensor([1.0, -4.0]),
    }
    allowed = verify.budgets(reference, truth, rounding=0.5)
    assert allowed == {
        "y": pytest.approx(2 * (0.01 + 0.5)),
        "d_a": pytest.approx(2 * (0.1 + 0.5)),
        "d_b": pytest.approx(2 * (0.1 + 0.5)),
    }


def test_verdict_is_the_tensor_that_exceeds_its_budget_most() -> None:
    truth = {"y": torch.ones(2), "d_x": torch.full((2,), 2.0)}
    results = {"y": torch.tensor([1.0, 1.25]), "d_x": torch.tensor([2.0, 3.0])}
    assert verify.judge(results, truth, {"y": 0.5, "d_x": 0.25}) == ("d_x", 0.5, 0.25)
    assert verify.judge(results, truth, {"y": 0.125, "d_x": 1.0}) == ("y", 0.25, 0.125)


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_nan_and_another_shape_are_beyond_every_budget(wrong: torch.Tensor) -> None:
    verdict = verify.judge({"y": wrong}, {"y": torch.ones(2)}, {"y": 1e9})
    assert not verdict.within


def test_reference_without_finite_results_judges_nothing() -> None:
    with pytest.raises(ValueError, match="not finite"):
        verify.budgets({"y": torch.tensor([math.inf])}, {"y": torch.ones(1)}, 1.0)


@pytest.mark.parametrize(
    ("case", "reference", "padded"),
    [
        (Case("life", Shape(3, 6, 4, 8), "uniform"), "packed", False),
        (Case("life", Shape(3, 6, 4, 8), "full"), "padded", True),
        (Case("life", Shape(3, 6, 4, 8), "full", resets=True), "lstm-loop", True),
    ],
    ids=["ragged", "dense", "resets"],
)
def test_padded_nn_lstm_is_checked_only_where_it_computes_no_padding(
    case: Case, reference: str, padded: bool
) -> None:
    assert reference_of(case) == reference
    assert is_checked("padded", case) is padded
    assert is_checked("fastrnn", case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_fastrnn_is_within_the_budget_and_a_fifth_more_is_not(
    dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("life", Shape(3, 6, 4, 8), "uniform", training, dtype)
    batch, cpu = Batches(case)[0], torch.device("cpu")
    record: dict[str, Any] = {}
    found, without = measure.verified(record, case, ["fastrnn", "packed"], batch, cpu)
    assert list(found) == ["fastrnn", "packed"]
    assert not without
    verdict = record["verification"]["errors"]["fastrnn"]
    assert verdict["error"] <= verdict["budget"]
    right = providers.FORWARDS["fastrnn"]

    def wrong(module: torch.nn.Module, batch: Any) -> providers.Outputs:
        output, h_n = right(module, batch)
        return output, h_n * 1.2

    monkeypatch.setitem(providers.FORWARDS, "fastrnn", wrong)
    with pytest.raises(measure.Failed, match="h_n of fastrnn differs from nn"):
        measure.verified({}, case, ["fastrnn", "packed"], batch, cpu)


def test_another_providers_wrong_results_cost_its_own_figures_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = providers.FORWARDS["cell-loop"]

    def wrong(module: torch.nn.Module, batch: Any) -> providers.Outputs:
        output, h_n = right(module, batch)
        return output * 0.5, h_n

    monkeypatch.setitem(providers.FORWARDS, "cell-loop", wrong)
    case = Case("life", Shape(3, 6, 4, 8), "full", resets=True)
    names = ["fastrnn", "lstm-loop", "cell-loop"]
    batch, cpu = Batches(case)[0], torch.device("cpu")
    found, without = measure.verified({}, case, names, batch, cpu)
    assert list(found) == ["fastrnn", "lstm-loop"]
    assert "nn.LSTMCell step by step differs from" in without["cell-loop"]["unsupported"]
