"""The operators that a compiled graph holds keep every promise that torch makes of an operator."""

from __future__ import annotations

import pytest
import torch

import fastrnn
from fastrnn.operators import lstm_layer_backward_op, lstm_layer_op
from fastrnn.ways import onednn
from tests.oracle import every_path, forced, make_state, opchecks

I, H = 3, 5


def operands(*, sizes=(4, 3, 2), spare=0, dtype=torch.float32, grad=True, **config):
    """Arguments of the operator: some rows are not valid where `spare`."""
    lstm = fastrnn.LSTM(I, H, dtype=dtype, **config)
    h_0, c_0 = make_state(lstm, sizes[0] + 1)
    rows = torch.randn(sum(sizes) + spare, I, dtype=dtype)
    first = lstm.all_weights[: 2 if lstm.bidirectional else 1]
    weights = [weight.detach() for direction in first for weight in direction]
    tensors = [rows, h_0, c_0, *weights]
    rows, h_0, c_0, *weights = (tensor.requires_grad_(grad) for tensor in tensors)
    return rows, torch.tensor(sizes), h_0, c_0, weights, lstm.bias, bool(lstm.proj_size)


OPERATOR_CASES = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "no-bias": {"bias": False},
    "projection": {"proj_size": 2, "bidirectional": True},
    "spare-rows": {"sizes": (3, 2, 0, 0), "spare": 7},
    "no-valid-row": {"sizes": (0, 0, 0), "spare": 7},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


with_cell_states = pytest.mark.parametrize(
    ("case", "cell_states"),
    [(case, False) for case in OPERATOR_CASES.values()]
    + [(OPERATOR_CASES[name], True) for name in ("bidirectional", "spare-rows")],
    ids=[*OPERATOR_CASES, "bidirectional-cell-states", "spare-rows-cell-states"],
)


every_memory = pytest.mark.parametrize("memory", ["save", "recompute"])


@opchecks
@with_cell_states
@every_memory
def test_opcheck_forward_for_training(case, cell_states, memory):
    arguments = (*operands(**case), cell_states, True, "auto", memory)
    torch.library.opcheck(lstm_layer_op, arguments)


@opchecks
@with_cell_states
def test_opcheck_forward_for_inference(case, cell_states):
    arguments = (*operands(grad=False, **case), cell_states, False, "auto", "save")
    torch.library.opcheck(lstm_layer_op, arguments)


@opchecks
@with_cell_states
@every_memory
def test_opcheck_backward(case, cell_states, memory):
    rows, sizes, h_0, c_0, weights, bias, projection = operands(grad=False, **case)
    forward = (rows, sizes, h_0, c_0, weights, bias, projection, cell_states, True, "auto", memory)
    h, h_n, c_n, c, gates, tanh_c = lstm_layer_op(*forward)
    d_c = torch.randn_like(c) if cell_states else None
    gradients = (torch.randn_like(h), torch.randn_like(h_n), torch.randn_like(c_n), d_c)
    inputs = (rows, sizes, h_0, c_0, weights, h, c, gates, tanh_c, bias, projection, "auto", memory)
    torch.library.opcheck(lstm_layer_backward_op, (*gradients, *inputs))


@every_path
@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_inference_computes_what_training_does(case, path):
    """Inference may run rectangles, also where the layout ends in empty steps and spare rows.

    In bfloat16 oneDNN may round what the step loop of training does not, once a step.
    """
    arguments = operands(grad=False, **case)
    training = lstm_layer_op(*arguments, False, True, "auto", "save")
    with forced(path):
        inference = lstm_layer_op(*arguments, False, False, "auto", "save")
    rounded = onednn.compute_dtype(arguments[0].dtype) == torch.bfloat16 and path != "loop"
    tolerance = torch.finfo(torch.bfloat16).eps if rounded else 1e-6
    for found, expected in zip(inference[:3], training[:3]):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_spare_rows_are_not_read():
    rows, sizes, *others = operands(grad=False, sizes=(3, 2, 0, 0), spare=7)
    clean = lstm_layer_op(rows, sizes, *others, False, True, "auto", "save")
    rows[5:] = float("nan")
    for found, expected in zip(
        lstm_layer_op(rows, sizes, *others, False, True, "auto", "save"), clean
    ):
        assert torch.equal(found, expected)
