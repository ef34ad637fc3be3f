"""The step loop: its hand-derived backward is autograd's, whatever is asked for, block by block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.cells import lstm as lstm_cell
from fastrnn.cells.lstm import LayerWeights, lstm_backward, lstm_composite, lstm_forward
from tests.oracle import assert_agree, assert_identical

I, H = 3, 4
SIZES = {
    "staircase": (5, 5, 4, 2, 2, 1),
    "equal": (3, 3, 3, 3),
    "one-step": (4,),
    "one-sequence": (1,) * 9,
    "ends-in-empty-steps": (3, 2, 0, 0),
    "only-empty-steps": (0, 0),
    "no-steps": (),
}
every_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
every_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
CELLS = {
    "plain": {},
    "no-bias": {"bias": False},
    "projection": {"proj_size": 2},
    "odd": {"input_size": 65, "hidden_size": 63},
    "tiny": {"input_size": 1, "hidden_size": 1},
}
every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
NAMES = ("ih", "hh", "bias_ih", "bias_hh", "hr")


class Problem:
    """One direction's inputs in float64, two sequences without a step among them, and gradients."""

    def __init__(
        self, sizes, *, input_size=I, hidden_size=H, proj_size=0, bias=True, reverse=False
    ):
        self.sizes, self.reverse = sizes, reverse
        size_h, sequences = proj_size or hidden_size, (sizes[0] if sizes else 0) + 2
        gates = 4 * hidden_size
        count = sum(sizes)
        self.rows = self.draw(count, input_size)
        self.weights = LayerWeights(
            self.draw(gates, input_size),
            self.draw(gates, size_h),
            self.draw(gates) if bias else None,
            self.draw(gates) if bias else None,
            self.draw(proj_size, hidden_size) if proj_size else None,
        )
        self.h_0, self.c_0 = self.draw(sequences, size_h), self.draw(sequences, hidden_size)
        self.d_outputs = {
            "h": self.draw(count, size_h),
            "h_n": self.draw(sequences, size_h),
            "c_n": self.draw(sequences, hidden_size),
            "c": self.draw(count, hidden_size),
        }

    @staticmethod
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64) * 0.5

    def inputs(self):
        return (self.rows, self.sizes, self.weights, self.h_0, self.c_0)

    def forward(self, *, gates=True, cells=True):
        return lstm_forward(
            *self.inputs(), reverse=self.reverse, save_gates=gates, save_cells=cells
        )

    def backward(self, run, *, leave_out=(), needs_rows=True, needs_weights=None):
        gradients = [None if n in leave_out else d for n, d in self.d_outputs.items()]
        needs = [w is not None for w in self.weights] if needs_weights is None else needs_weights
        found = lstm_backward(
            *gradients,
            *self.inputs(),
            *(run.h, run.c, run.saved),
            reverse=self.reverse,
            needs_rows=needs_rows,
            needs_weights=needs,
        )
        named = {"rows": found.rows, "h_0": found.h_0, "c_0": found.c_0}
        named |= dict(zip(NAMES, found.weights))
        return {name: gradient for name, gradient in named.items() if gradient is not None}

    def by_autograd(self, leave_out=()):
        """Outputs of the differentiable loop and autograd's gradients of it."""
        leaves = {"rows": self.rows, "h_0": self.h_0, "c_0": self.c_0}
        leaves |= {n: w for n, w in zip(NAMES, self.weights) if w is not None}
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        weights = LayerWeights(*(leaves.get(name) for name in NAMES))
        run = lstm_composite(
            leaves["rows"], self.sizes, weights, leaves["h_0"], leaves["c_0"], reverse=self.reverse
        )
        kept = [
            name
            for name, value in outputs(run).items()
            if name not in leave_out and value.requires_grad  # not h and c without a row
        ]
        gradients = torch.autograd.grad(
            [outputs(run)[name] for name in kept],
            list(leaves.values()),
            [self.d_outputs[name] for name in kept],
            materialize_grads=True,
        )
        detached = {name: value.detach() for name, value in outputs(run).items()}
        return detached, dict(zip(leaves, gradients))


def outputs(run):
    values = {"h": run.h, "h_n": run.h_n, "c_n": run.c_n, "c": run.c}
    return {name: value for name, value in values.items() if value is not None}


# --- forward -------------------------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("sizes", list(SIZES.values())[:4], ids=list(SIZES)[:4])
@every_cell
@pytest.mark.parametrize("run", [lstm_forward, lstm_composite], ids=["by-hand", "composite"])
def test_it_computes_what_nn_lstm_does(run, cell, sizes, reverse):
    problem = Problem(sizes, reverse=reverse, **cell)
    weights = problem.weights
    size_h = problem.h_0.shape[1]
    theirs = nn.LSTM(
        weights.ih.shape[1],
        weights.hidden_size,
        bias=weights.bias_ih is not None,
        bidirectional=True,
        proj_size=0 if weights.hr is None else size_h,
        dtype=torch.float64,
    )
    with torch.no_grad():
        given = [w for w in weights if w is not None]
        for parameter, weight in zip(theirs.all_weights[reverse], given, strict=True):
            parameter.copy_(weight)
        active = sizes[0]
        packed = PackedSequence(problem.rows, torch.tensor(sizes))
        hx = [state[:active].expand(2, -1, -1).contiguous() for state in (problem.h_0, problem.c_0)]
        output, (h_n, c_n) = theirs(packed, hx)
    options = {"save_gates": False, "save_cells": False} if run is lstm_forward else {}
    found = run(*problem.inputs(), reverse=reverse, **options)
    columns = slice(size_h, None) if reverse else slice(size_h)
    expected = {
        "h": output.data[:, columns],
        "h_n": torch.cat([h_n[int(reverse)], problem.h_0[active:]]),
        "c_n": torch.cat([c_n[int(reverse)], problem.c_0[active:]]),
    }
    actual = {name: value for name, value in outputs(found).items() if name != "c"}
    assert_agree(actual, expected)


@every_direction
@every_sizes
@every_cell
def test_forward_is_the_differentiable_loops(cell, sizes, reverse):
    problem = Problem(sizes, reverse=reverse, **cell)
    assert_agree(outputs(problem.forward()), problem.by_autograd()[0])


@every_direction
@every_sizes
@pytest.mark.parametrize("cells", [False, True], ids=["", "cell-states"])
def test_what_is_saved_changes_no_output(sizes, cells, reverse):
    problem = Problem(sizes, reverse=reverse)
    saving = problem.forward()
    lean = problem.forward(gates=False, cells=cells)
    assert lean.saved == ()
    assert (lean.c is not None) == cells
    expected = outputs(saving)
    assert_identical(outputs(lean), {name: expected[name] for name in outputs(lean)})


@every_direction
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
def test_final_states_share_memory_with_nothing(save, reverse):
    for sizes in SIZES.values():
        problem = Problem(sizes, reverse=reverse)
        run = problem.forward(gates=save)
        others = [run.h, run.c, problem.h_0, problem.c_0, *run.saved]
        taken = {tensor.untyped_storage().data_ptr() for tensor in others if tensor.numel()}
        assert run.h_n.untyped_storage().data_ptr() not in taken
        assert run.c_n.untyped_storage().data_ptr() not in taken
        assert run.h_n.untyped_storage().data_ptr() != run.c_n.untyped_storage().data_ptr()


@every_direction
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@every_cell
def test_forward_writes_to_nothing_it_was_given(cell, save, reverse):
    problem = Problem(SIZES["staircase"], reverse=reverse, **cell)
    given = [problem.rows, *problem.weights, problem.h_0, problem.c_0]
    given = [tensor for tensor in given if tensor is not None]
    before = [tensor.clone() for tensor in given]
    problem.forward(gates=save, cells=save)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before))


# --- backward ------------------------------------------------------------------------------------


@every_direction
@every_sizes
@every_cell
def test_backward_is_autograds(cell, sizes, reverse):
    problem = Problem(sizes, reverse=reverse, **cell)
    assert_agree(problem.backward(problem.forward()), problem.by_autograd()[1])


ABSENT = [
    names
    for count in range(1, 4)
    for names in itertools.combinations(("h", "h_n", "c_n", "c"), count)
]


@every_direction
@pytest.mark.parametrize("leave_out", ABSENT, ids="-".join)
@pytest.mark.parametrize("cell", [{}, {"proj_size": 2}], ids=["plain", "projection"])
def test_a_gradient_that_is_none_is_zero(cell, leave_out, reverse):
    problem = Problem(SIZES["staircase"], reverse=reverse, **cell)
    found = problem.backward(problem.forward(), leave_out=leave_out)
    assert_agree(found, problem.by_autograd(leave_out)[1])


@pytest.mark.parametrize("cell", [{}, {"proj_size": 2}], ids=["plain", "projection"])
def test_only_what_is_asked_for_is_computed_and_it_is_the_same(cell):
    problem = Problem(SIZES["staircase"], **cell)
    run = problem.forward()
    everything = problem.backward(run)
    names = [name for name in NAMES if name in everything]
    for asked in itertools.product([False, True], repeat=1 + len(names)):
        wanted = {name for name, wants in zip(["rows", *names], asked) if wants}
        found = problem.backward(
            run,
            needs_rows="rows" in wanted,
            needs_weights=[name in wanted for name in NAMES],
        )
        assert_identical(
            found, {n: everything[n] for n in everything if n in wanted | {"h_0", "c_0"}}
        )


def test_both_biases_gradients_have_memory_of_their_own():
    problem = Problem(SIZES["staircase"])
    found = problem.backward(problem.forward())
    found["bias_ih"].zero_()
    assert found["bias_hh"].abs().sum() > 0


@every_direction
@every_cell
def test_backward_writes_to_nothing_it_was_given(cell, reverse):
    problem = Problem(SIZES["staircase"], reverse=reverse, **cell)
    run = problem.forward()
    given = [problem.rows, *problem.weights, problem.h_0, problem.c_0, *problem.d_outputs.values()]
    given = [tensor for tensor in (*given, run.h, run.c, *run.saved) if tensor is not None]
    before = [tensor.clone() for tensor in given]
    first = problem.backward(run)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before))
    assert_identical(problem.backward(run), first)


@every_direction
def test_run_twice_is_bit_equal(reverse):
    problem = Problem((7, 7, 5, 1), reverse=reverse, input_size=65, hidden_size=63)
    runs = [problem.forward() for _ in range(2)]
    assert_identical(outputs(runs[0]), outputs(runs[1]))
    assert_identical(problem.backward(runs[0]), problem.backward(runs[1]))


# --- blocks --------------------------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("sizes", [*SIZES.values(), (9, 1, 1, 1, 1)], ids=[*SIZES, "one-wide-step"])
@pytest.mark.parametrize("most_rows", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize(
    "cell", [{}, {"proj_size": 2}, {"bias": False}], ids=["", "proj", "no-bias"]
)
def test_where_time_is_cut_into_blocks_changes_nothing(
    cell, most_rows, sizes, reverse, monkeypatch
):
    problem = Problem(sizes, reverse=reverse, **cell)
    monkeypatch.setattr(lstm_cell, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(lstm_cell, "BLOCK_MIN_ROWS", most_rows)
    run = problem.forward()
    expected, gradients = problem.by_autograd()
    assert_agree(outputs(run), expected)
    assert_agree(outputs(problem.forward(gates=False)), expected)
    assert_agree(problem.backward(run), gradients)
    assert_agree(problem.backward(problem.forward(gates=False)), gradients)


@pytest.mark.parametrize("most_rows", [1, 3, 6, 100])
@every_sizes
def test_blocks_hold_every_row_once_and_no_more_than_fits(sizes, most_rows, monkeypatch):
    monkeypatch.setattr(lstm_cell, "BLOCK_ELEMENTS", 4 * H * most_rows)
    monkeypatch.setattr(lstm_cell, "BLOCK_MIN_ROWS", 1)
    blocks = lstm_cell._blocks(sizes, H)
    rows = [row for block in blocks for row in range(block.begin, block.end)]
    assert rows == list(range(sum(sizes)))
    for block in blocks:
        assert block.end - block.begin == sum(sizes[block.first : block.last])
        assert block.end - block.begin <= most_rows or block.last - block.first == 1
    steps = [step for block in blocks for step in range(block.first, block.last)]
    assert [step for step in range(len(sizes)) if sizes[step] and step not in steps] == []
