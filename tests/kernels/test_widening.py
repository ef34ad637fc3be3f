"""Hidden sizes that are no multiple of 8: the kernels get the next one, and nobody notices."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastrnn
from fastrnn import layer
from fastrnn.cells.lstm import LayerWeights
from fastrnn.choosing import backends
from fastrnn.input.forms import Padded
from fastrnn.input.packing import dense_layout, ragged_layout
from fastrnn.layer import lstm_layer
from fastrnn.ways import widening
from fastrnn_kernels import lstm_backward as backward_module
from fastrnn_kernels import lstm_forward as forward_module
from tests.kernels.launches import on_kernels
from tests.oracle import answer, assert_agree, everything, make_state, padded, valid_steps

pytestmark = pytest.mark.interpreter

B, T, I = 3, 3, 2
LENGTHS = [2, 3, 0]
CONFIGURATIONS = {
    "plain": {},
    "recompute": {"memory": "recompute"},
    "bidirectional": {"bidirectional": True},
    "bidirectional-no-bias-recompute": {
        "bidirectional": True,
        "bias": False,
        "memory": "recompute",
    },
}
# In programs of 4 units; 63 and 65 in one of all.
SIZES = [(1, "split"), (5, "split"), (13, "split"), (63, "whole"), (65, "whole")]


def make(H: int, **config: object) -> fastrnn.LSTM:
    torch.manual_seed(0)
    return fastrnn.LSTM(I, H, backend="triton", **config)


def problem(lstm: fastrnn.LSTM) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(T, B, I), make_state(lstm, B)


def with_cells(lstm: fastrnn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return padded(lstm, x, hx, lengths=LENGTHS, return_cell_states=True)


def check(H: int, residency: str = "split", **config: object) -> None:
    """Every output and every gradient, against the oracle in float64."""
    lstm = make(H, **config)
    x, hx = problem(lstm)
    with on_kernels(residency) as launches:
        found = everything(with_cells, lstm, x, hx)
    assert launches.call_count == 2  # forward and backward
    assert {call.args[1] for call in launches.call_args_list} == {-(-H // 8) * 8}
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), cells=True))


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize(("H", "residency"), SIZES, ids=[f"H{H}" for H, _ in SIZES])
def test_outputs_and_gradients(H: int, residency: str, config: dict[str, object]) -> None:
    check(H, residency, **config)


def without_gates(weight: Tensor, units: int, *columns: int) -> Tensor:
    """Rows behind all gates and not behind each."""
    pads = [pad for more in (*columns, 4 * units) for pad in (0, more)]
    return functional.pad(weight, pads)


def columns_first(weight: Tensor, units: int, *columns: int) -> Tensor:
    """Zero columns at the left."""
    pads = [pad for more in columns for pad in (more, 0)] + [0, units]
    return functional.pad(weight.unflatten(0, (4, -1)), pads).flatten(0, 1)


def without_directions(output: Any, hidden_size: int) -> Any:
    """The first columns, as if there were one direction."""
    size, h = output.c_n.shape[0] * hidden_size, output.h[:, : output.c_n.shape[0] * hidden_size]
    return type(output)(
        h, output.h_n[..., :hidden_size], output.c_n[..., :hidden_size], output.c[:, :size]
    )


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (widening, "_widen_gates", without_gates),
        (widening, "_widen_gates", columns_first),
        (layer, "narrow", without_directions),
    ],
    ids=["not-by-gate", "columns-first", "not-by-direction"],
)
def test_a_mutant_is_caught(module: Any, name: str, mutant: Callable[..., Any]) -> None:
    with (
        mock.patch.object(module, name, mutant),
        pytest.raises(AssertionError, match="Tensor-like"),
    ):
        check(5, bidirectional=True)


# --- what the kernels get ------------------------------------------------------------------------


@contextlib.contextmanager
def spied() -> Iterator[list[Any]]:
    """What the launchers return, and the arguments that they are called with."""
    seen: list[Any] = []

    def spy(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*arguments: Any, **keywords: Any) -> Any:
            result = launcher(*arguments, **keywords)
            named = inspect.signature(launcher).bind(*arguments, **keywords).arguments
            seen.append((named, result))
            return result

        return launch

    with (
        mock.patch.object(forward_module, "lstm_forward", spy(forward_module.lstm_forward)),
        mock.patch.object(backward_module, "lstm_backward", spy(backward_module.lstm_backward)),
    ):
        yield seen


def added_units(H: int, seen: list[Any]) -> list[Tensor]:
    """All that the kernels compute for the units behind the first H of each gate."""
    (forward, _), (backward, gradients) = seen
    width = forward["c_0"].shape[2]
    states = (forward["h_0"], forward["c_0"], backward["c"], *gradients)
    return [state.unflatten(-1, (-1, width))[..., H:] for state in states]


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_added_units_stay_exactly_zero_and_so_do_their_gradients(memory: str) -> None:
    lstm = make(5, memory=memory, bidirectional=True)
    x, hx = problem(lstm)
    with on_kernels(), spied() as seen:
        everything(padded, lstm, x, hx)
    found = added_units(5, seen)
    assert [states.shape[-1] for states in found] == [3] * 6  # h_0, c_0, c, d_gates, d_h_0, d_c_0
    assert not any(states.any() for states in found)


def test_a_multiple_of_8_is_not_touched() -> None:
    lstm = make(16, bidirectional=True)
    x, hx = problem(lstm)
    with (
        on_kernels(),
        mock.patch.object(layer, "run", wraps=layer.run) as run,
        mock.patch.object(layer, "narrow", wraps=layer.narrow) as narrow,
        mock.patch.object(widening, "functional", None),
    ):
        padded(lstm, x, hx, lengths=LENGTHS)
    *_, flat = run.call_args.args
    assert [id(weight) for weight in flat] == [id(weight) for weight in lstm.parameters()]
    output, hidden_size = narrow.call_args.args
    assert layer.narrow(output, hidden_size) is output


@pytest.mark.parametrize("steps", [1, 3], ids=["one-row", "rows"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
def test_outputs_are_contiguous_and_nothing_that_is_kept(directions: int, steps: int) -> None:
    """They can be written to before backward, and keep no wider memory alive."""
    lstm = make(5, bidirectional=directions == 2)
    weights = [LayerWeights(*direction) for direction in lstm.all_weights]
    h_0 = c_0 = torch.zeros(directions, 1, 5)
    rows = torch.randn(steps, I)

    def run(change: bool) -> tuple[Tensor, ...]:
        output = lstm_layer(
            *(rows, dense_layout(steps, 1), weights, h_0, c_0), cell_states=True, backend="triton"
        )
        for states in output:
            assert states.is_contiguous()
            assert states.untyped_storage().nbytes() == states.numel() * states.element_size()
            if change:
                with torch.no_grad():
                    states.fill_(7.0)
        return torch.autograd.grad(sum(states.sum() for states in output), lstm.parameters())

    with on_kernels():
        for ours, theirs in zip(run(change=True), run(change=False), strict=True):
            assert torch.equal(ours, theirs)


def test_rows_that_a_bounded_layout_does_not_use_stay_zero() -> None:
    lstm = make(5, bidirectional=True)
    weights = [LayerWeights(*direction) for direction in lstm.all_weights]
    h_0, c_0 = make_state(lstm, B)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        layout = ragged_layout(
            Padded(torch.randn(T, B, I), False), torch.tensor(LENGTHS), None, None
        )
    assert layout.rows == T * B
    rows = torch.randn(layout.rows, I).masked_fill(
        (torch.arange(layout.rows) >= sum(LENGTHS)).unsqueeze(1), 0.0
    )
    with on_kernels():
        output = lstm_layer(rows, layout, weights, h_0, c_0, cell_states=True, backend="triton")
    for states in (output.h, output.c):
        assert states[: sum(LENGTHS)].all()
        assert not states[sum(LENGTHS) :].any()


def test_nothing_is_kept_where_no_gradient_is_needed() -> None:
    lstm = make(5).requires_grad_(False)
    x, hx = problem(lstm)
    with on_kernels(), spied() as seen:
        assert not padded(lstm, x, hx)[0].requires_grad
        padded(lstm, x.requires_grad_(), hx)
    assert [named["save"] for named, _ in seen] == ["nothing", "gates"]


# --- where else a layer runs ---------------------------------------------------------------------


def test_compiled_in_one_graph_of_symbolic_sizes() -> None:
    lstm = make(5, bidirectional=True)
    x, hx = problem(lstm)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager", dynamic=True)
    lengths = torch.tensor(LENGTHS)

    def call(module: Any, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        output, (h_n, c_n), cells = compiled(x, hx, lengths=lengths, return_cell_states=True)
        return output, h_n, c_n, cells

    with on_kernels() as launches:
        found = everything(call, lstm, x, hx)
    assert [call.args[1] for call in launches.call_args_list] == [8, 8]
    assert found["output"].is_contiguous()
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), cells=True))
    torch._dynamo.reset()


def test_function_transforms_need_no_added_units() -> None:
    """They run the differentiable loop, on every device."""
    lstm = make(5)
    x, _ = problem(lstm)
    with on_kernels() as launches, mock.patch.object(layer, "widen", side_effect=AssertionError):
        mapped = torch.func.vmap(lambda x: lstm(x)[0], in_dims=1, out_dims=1)(x.unsqueeze(2))
    assert launches.call_count == 0
    with on_kernels():
        torch.testing.assert_close(mapped.squeeze(2), lstm(x)[0])


@pytest.mark.parametrize(("H", "wide"), [(1, 8), (13, 16), (16, 16)])
def test_whether_the_kernels_can_run_is_asked_of_what_they_get(H: int, wide: int) -> None:
    asked = []

    def choose(S: int, H: int, *_: object) -> None:
        asked.append(H)

    with (
        mock.patch("fastrnn_kernels.tiling.forward_tile", choose),
        mock.patch("fastrnn_kernels.tiling.backward_tile", choose),
    ):
        backends._tile_reason.__wrapped__(torch.device("cpu"), torch.float32, H, 1)
    assert asked == [wide, wide]
