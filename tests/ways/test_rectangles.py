"""Rectangles: cut anywhere, they compute what the step loop does, and carry states exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastrnn.cells.lstm import LayerWeights, lstm_backward, lstm_forward
from fastrnn.choosing.costs import LayerCosts
from fastrnn.input.packing import Rectangle, cut_rows, staircase
from fastrnn.ways.rectangles import MOST_PLACES, least_seconds, plan, run_rectangles
from fastrnn.ways.recurrence import unflatten_weights
from tests.oracle import assert_agree, assert_identical

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)

I, H = 3, 5
staircases = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(
    lambda sizes: tuple(sorted(sizes, reverse=True))
)
cost_models = st.builds(
    LayerCosts,
    layer=st.floats(0, 1),
    call=st.floats(0, 10),
    row=st.floats(0.01, 1),
    step=st.floats(0, 3),
)


def cut_at(sizes, cuts):
    """The rectangles of the staircase cut before these steps."""
    edges = [0, *cuts, len(sizes)]
    return tuple(Rectangle(a, b, sizes[a]) for a, b in itertools.pairwise(edges))


def price(pieces, cost):
    """What the cuts decide: the layer's own cost is the same for all."""
    rows = sum((last - first) * (sequences + cost.step) for first, last, sequences in pieces)
    return cost.call * len(pieces) + cost.row * rows


# --- where to cut --------------------------------------------------------------------------------


@given(sizes=staircases, cost=cost_models)
def test_no_plan_costs_less_than_the_least(sizes, cost):
    assert least_seconds(staircase(sizes), cost) <= plan(sizes, cost).seconds * (1 + 1e-9)


@given(sizes=staircases, cost=cost_models)
def test_a_plan_covers_the_staircase_in_the_order_of_time(sizes, cost):
    pieces = plan(sizes, cost).rectangles
    steps = [step for first, last, _ in pieces for step in range(first, last)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= len(sizes)
    assert all(sequences >= sizes[first] for first, _, sequences in pieces)
    assert all(before[2] >= after[2] for before, after in itertools.pairwise(pieces))
    assert pieces[0].sequences == sizes[0]


@given(sizes=staircases, cost=cost_models)
def test_no_cuts_where_the_batch_becomes_smaller_are_cheaper(sizes, cost):
    """With up to nine sequences and steps every width is to be had, and nearly every length."""
    found = price(plan(sizes, cost).rectangles, cost)
    inner = range(1, len(sizes))
    every = [c for n in range(len(sizes)) for c in itertools.combinations(inner, n)]
    lengths = (1, 2, 3, 4, 6, 8, len(sizes))
    can_be_had = [
        cuts
        for cuts in every
        if all(last - first in lengths for first, last, _ in cut_at(sizes, cuts))
        and (not cuts or len(sizes) - cuts[-1] != len(sizes))
    ]
    cheapest = min(price(cut_at(sizes, cuts), cost) for cuts in can_be_had)
    assert found <= cheapest * (1 + 1e-9)


@given(sizes=staircases, cost=cost_models)
def test_a_plan_says_what_it_costs(sizes, cost):
    found = plan(sizes, cost)
    assert found.seconds == pytest.approx(cost.layer + price(found.rectangles, cost))


def test_a_long_staircase_is_planned_quickly_and_well():
    """Thousands of steps keep a plan within a tenth of the cost of cutting nowhere in vain."""
    sizes = tuple(range(2000, 0, -1))
    cost = LayerCosts(layer=0.0, call=1e-3, row=1e-6)
    found = plan(sizes, cost)
    assert len(found.rectangles) <= MOST_PLACES
    assert found.seconds < 1.1 * cost.row * sum(sizes) + 60 * cost.call


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=str)
def test_where_no_step_is_valid_there_is_no_rectangle(sizes):
    assert plan(sizes, LayerCosts(layer=1.0, call=1.0, row=1.0)).rectangles == ()


def test_equal_lengths_are_one_rectangle():
    assert plan((4,) * 7, LayerCosts(layer=0.0, call=1.0, row=1e-9)).rectangles == (
        Rectangle(0, 7, 4),
    )


def test_one_rectangle_with_padding_has_a_length_that_other_batches_have():
    cost = LayerCosts(layer=0.0, call=1e9, row=1.0)
    found = {plan((8,) * (steps - 1) + (7,), cost).rectangles for steps in range(100, 150)}
    assert all(len(pieces) == 1 for pieces in found)
    assert len(found) == 26
    assert plan((8,) * 101, cost).rectangles == (
        Rectangle(0, 101, 8),
    )  # without padding it is left


def test_many_batches_have_few_shapes():
    """oneDNN compiles code for each."""
    shapes = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        lengths = torch.randint(1, 101, (64,), generator=generator)
        sizes = (lengths > torch.arange(int(lengths.max())).unsqueeze(1)).sum(1)
        pieces = plan(tuple(sizes.tolist()), LayerCosts(0.0, call=2e-4, row=4e-6)).rectangles
        shapes |= {(last - first, sequences) for first, last, sequences in pieces}
    assert 20 < len(shapes) < 250


# --- what they compute ---------------------------------------------------------------------------

SIZES = {
    "staircase": (5, 5, 4, 2, 2, 1),
    "steep": (4, 3, 2, 1),
    "equal": (3, 3, 3, 3),
    "one-step": (4,),
    "one-sequence": (1,) * 9,
    "one-outlives-the-rest": (6, 6, 1, 1, 1, 1, 1),
}
CUTS = {"uncut": lambda falls: [], "cut-everywhere": list, "cut-once": lambda falls: falls[1:2]}
every_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
every_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
every_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
OUTPUTS, WEIGHTS = ("h", "h_n", "c_n"), ("ih", "hh", "bias_ih", "bias_hh")


def pieces_of(sizes, cut):
    return cut_at(sizes, cut([t for t in range(1, len(sizes)) if sizes[t] < sizes[t - 1]]))


class Run:
    """Outputs of one direction over packed rows, and their gradients as often as wanted."""

    def __init__(self, problem, pieces, save):
        layout = cut_rows(problem.sizes, problem.sizes[0] + 2, lambda _: pieces)
        directions = 2 if problem.reverse else 1
        self.sizes, self.valid = problem.sizes, layout.valid_rows
        slots = problem.rows.new_zeros(layout.rows, problem.rows.shape[1])
        slots[layout.valid_rows] = problem.rows
        inputs = [slots]
        for state in (problem.h_0, problem.c_0):
            inputs.append(state.expand(directions, *state.shape).contiguous())
        own = [weight for weight in problem.weights if weight is not None]
        inputs += [weight.clone() for _ in range(directions) for weight in own]
        self.inputs = [tensor.detach().requires_grad_(save) for tensor in inputs]
        rows, h_0, c_0, *flat = self.inputs
        bias = problem.weights.bias_ih is not None
        weights = unflatten_weights(flat, directions, bias=bias, projection=False)
        output = run_rectangles(layout, rows, h_0, c_0, weights)
        self.output, self.own, self.direction = output, len(own), directions - 1
        hidden_size = problem.weights.hidden_size
        columns = slice(self.direction * hidden_size, (self.direction + 1) * hidden_size)
        self.taken = output.h[:, columns], output.h_n[self.direction], output.c_n[self.direction]
        h, self.h_n, self.c_n = (part.detach() for part in self.taken)
        self.h = h[layout.valid_rows]
        assert (h[-1] == 0).all()
        if problem.rows.isfinite().all():  # else a sequence's padding is as spoiled as its states
            assert (h[layout.empty] == 0).all()

    def backward(self, d_h, d_h_n, d_c_n):
        if d_h is not None:
            d_h = d_h.new_zeros(self.taken[0].shape).index_copy(0, self.valid, d_h)
        pairs = [
            (output, gradient)
            for output, gradient in zip(self.taken, (d_h, d_h_n, d_c_n))
            if gradient is not None
        ]
        d_rows, d_h_0, d_c_0, *d_flat = torch.autograd.grad(
            [output for output, _ in pairs],
            self.inputs,
            [gradient for _, gradient in pairs],
            retain_graph=True,
        )
        named = {"rows": d_rows[self.valid]}
        named |= {"h_0": d_h_0[self.direction], "c_0": d_c_0[self.direction]}
        return named | dict(zip(WEIGHTS, d_flat[self.direction * self.own :]))


class Problem:
    """One direction's inputs, two sequences without a step among them, and its gradients."""

    def __init__(self, sizes, *, reverse=False, bias=True, input_size=I, hidden_size=H):
        self.sizes, self.reverse = sizes, reverse
        sequences, gates = sizes[0] + 2, 4 * hidden_size
        self.weights = LayerWeights(
            torch.randn(gates, input_size) * 0.5,
            torch.randn(gates, hidden_size) * 0.5,
            torch.randn(gates) if bias else None,
            torch.randn(gates) if bias else None,
        )
        self.h_0, self.c_0 = torch.randn(2, sequences, hidden_size)
        self.d_h_n, self.d_c_n = torch.randn(2, sequences, hidden_size)
        self.rows = torch.randn(sum(sizes), input_size)
        self.d_h = torch.randn(sum(sizes), hidden_size)

    def gradients(self, leave_out=()):
        named = {"h": self.d_h, "h_n": self.d_h_n, "c_n": self.d_c_n}
        return [None if name in leave_out else d for name, d in named.items()]

    def forward(self, pieces, save=True):
        return Run(self, pieces, save)

    def backward(self, run, leave_out=()):
        return run.backward(*self.gradients(leave_out))

    def expected(self, leave_out=()):
        """The step loop's outputs and gradients, in float64."""
        weights = LayerWeights(*(None if w is None else w.double() for w in self.weights))
        inputs = (self.rows.double(), self.sizes, weights, self.h_0.double(), self.c_0.double())
        run = lstm_forward(*inputs, reverse=self.reverse, save_gates=True, save_cells=True)
        gradients = [None if d is None else d.double() for d in self.gradients(leave_out)]
        found = lstm_backward(
            *gradients,
            None,
            *inputs,
            *(run.h, run.c, run.saved),
            reverse=self.reverse,
            needs_rows=True,
            needs_weights=[weight is not None for weight in weights],
        )
        return named_outputs(run), named_gradients(found)


def saved_by(output):
    """All tensors that the graph behind ``output`` keeps for backward."""
    nodes, seen, found = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found += [value for value in kept if isinstance(value, torch.Tensor)]
    return found


def named_outputs(run):
    return {name: getattr(run, name) for name in OUTPUTS}


def named_gradients(found):
    named = {"rows": found.rows, "h_0": found.h_0, "c_0": found.c_0}
    named |= dict(zip(WEIGHTS, found.weights))
    return {name: gradient for name, gradient in named.items() if gradient is not None}


@every_direction
@every_bias
@every_cut
@every_sizes
def test_outputs_and_gradients_are_the_step_loops(sizes, cut, bias, reverse):
    problem, pieces = Problem(sizes, reverse=reverse, bias=bias), pieces_of(sizes, cut)
    run = problem.forward(pieces)
    outputs, gradients = problem.expected()
    assert_close({n: v.double() for n, v in named_outputs(run).items()}, outputs, rtol=0, atol=1e-6)
    assert_agree(problem.backward(run), gradients)


@every_direction
@pytest.mark.parametrize(
    ("input_size", "hidden_size"), [(1, 1), (63, 65), (65, 63), (1, 64)], ids=lambda n: str(n)
)
def test_odd_sizes(input_size, hidden_size, reverse):
    sizes = (7, 6, 6, 3, 1, 1, 1)
    problem = Problem(sizes, reverse=reverse, input_size=input_size, hidden_size=hidden_size)
    pieces = cut_at(sizes, [3])
    run = problem.forward(pieces)
    outputs, gradients = problem.expected()
    assert_agree(named_outputs(run), outputs)
    assert_agree(problem.backward(run), gradients)


@given(
    sizes=staircases,
    chosen=st.lists(st.booleans(), min_size=8, max_size=8),
    reverse=st.booleans(),
)
def test_any_cuts_of_any_staircase(sizes, chosen, reverse):
    torch.manual_seed(0)
    problem = Problem(sizes, reverse=reverse)
    pieces = pieces_of(sizes, lambda falls: [t for t in falls if chosen[t - 1]])
    run = problem.forward(pieces)
    outputs, gradients = problem.expected()
    assert_agree(named_outputs(run), outputs)
    assert_agree(problem.backward(run), gradients)


ABSENT = [names for n in (1, 2) for names in itertools.combinations(OUTPUTS, n)]


@every_direction
@every_cut
@pytest.mark.parametrize("leave_out", ABSENT, ids="-".join)
@pytest.mark.parametrize("sizes", [SIZES["staircase"], SIZES["equal"]], ids=["ragged", "dense"])
def test_a_gradient_that_is_none_is_zero(sizes, leave_out, cut, reverse):
    problem, pieces = Problem(sizes, reverse=reverse), pieces_of(sizes, cut)
    found = problem.backward(problem.forward(pieces), leave_out)
    assert_agree(found, problem.expected(leave_out)[1])


@every_direction
@every_cut
@every_sizes
def test_inference_computes_what_training_does(sizes, cut, reverse):
    problem, pieces = Problem(sizes, reverse=reverse), pieces_of(sizes, cut)
    training, inference = problem.forward(pieces), problem.forward(pieces, save=False)
    assert_agree(named_outputs(inference), named_outputs(training), tolerance=1e-6)


@every_direction
@every_cut
@every_sizes
def test_backward_writes_to_nothing_it_was_given(sizes, cut, reverse):
    problem, pieces = Problem(sizes, reverse=reverse), pieces_of(sizes, cut)
    run = problem.forward(pieces)
    # oneDNN's workspaces (uint8) hold scratch space too, which the second backward writes anew.
    saved = [tensor for tensor in saved_by(run.output.h) if tensor.dtype != torch.uint8]
    assert len(saved) >= 10 * len(pieces)
    given = [*problem.gradients(), *saved]
    before = [tensor.clone() for tensor in given]
    first = problem.backward(run)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before))
    assert_identical(problem.backward(run), first)


@every_cut
def test_run_twice_is_bit_equal(cut):
    problem = Problem((9, 8, 8, 2), input_size=65, hidden_size=63)
    pieces = pieces_of(problem.sizes, cut)
    runs = [problem.forward(pieces) for _ in range(2)]
    assert_identical(named_outputs(runs[0]), named_outputs(runs[1]))
    assert_identical(*(problem.backward(run) for run in runs))


@every_cut
@every_sizes
def test_final_states_share_memory_with_nothing(sizes, cut):
    problem = Problem(sizes)
    run = problem.forward(pieces_of(sizes, cut))
    saved = saved_by(run.output.h)
    assert len(saved) >= 10
    taken = [*saved, *run.inputs]
    owners = {tensor.untyped_storage().data_ptr() for tensor in taken}
    assert run.h_n.untyped_storage().data_ptr() not in owners
    assert run.c_n.untyped_storage().data_ptr() not in owners


@every_cut
def test_both_biases_gradients_have_memory_of_their_own(cut):
    problem = Problem(SIZES["staircase"])
    pieces = pieces_of(problem.sizes, cut)
    found = problem.backward(problem.forward(pieces))
    found["bias_ih"].zero_()
    assert found["bias_hh"].abs().sum() > 0


# --- the carry -----------------------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("steps", [6, 9, 40, 200])
def test_a_state_is_carried_bit_for_bit_however_far(steps, reverse):
    """The states of sequences of 4 and 2 steps do not depend on the longest one's length."""
    rows = torch.randn(10 + 200, I)

    def run(steps):
        torch.manual_seed(0)
        problem = Problem((3, 3, 2, 2, *[1] * (steps - 4)), reverse=reverse)
        problem.rows = rows[: len(problem.rows)]
        problem.d_h.zero_()  # only what arrives at the final states
        pieces = cut_at(problem.sizes, [])
        forward = problem.forward(pieces)
        gradients = problem.backward(forward)
        states = {"h_n": forward.h_n, "c_n": forward.c_n}
        states |= {"d_h_0": gradients["h_0"], "d_c_0": gradients["c_0"]}
        return {name: value[1:3] for name, value in states.items()}

    assert_identical(run(steps), run(5))


@every_direction
def test_a_carried_state_is_the_one_where_its_sequence_ended(reverse):
    """Cut where the sequence ends, nothing is carried; else the same state is, bit for bit."""
    sizes = (3, 3, 3, 3, 2, 2, 2, 1, 1)
    problem = Problem(sizes, reverse=reverse)
    # The third sequence ends at step 4. Both runs have the carry feature, for the second's sake.
    cut, whole = (problem.forward(cut_at(sizes, cuts)) for cuts in ([4], []))
    assert torch.equal(cut.c_n[2], whole.c_n[2])
    assert torch.equal(cut.h_n[2], whole.h_n[2])


@every_direction
def test_padding_has_no_part_in_any_gradient(reverse):
    """Rows' gradients are those without padding, though the padded steps were computed."""
    problem = Problem(SIZES["one-outlives-the-rest"], reverse=reverse)
    whole, cut = cut_at(problem.sizes, []), cut_at(problem.sizes, [2])
    found = problem.backward(problem.forward(whole))
    assert_agree(found, problem.backward(problem.forward(cut)), tolerance=2e-6)


@every_direction
@every_cut
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_sequence_full_of_nan_spoils_no_other(poison, cut, reverse):
    sizes = SIZES["staircase"]
    problem, pieces = Problem(sizes, reverse=reverse), pieces_of(sizes, cut)
    clean = problem.forward(pieces)
    offsets = [0, *itertools.accumulate(sizes)]
    mine = [offsets[t] + 2 for t in range(len(sizes)) if sizes[t] > 2]  # the third sequence's rows
    problem.rows[mine] = poison
    dirty = problem.forward(pieces)
    others = [row for row in range(len(clean.h)) if row not in mine]
    assert torch.equal(dirty.h[others], clean.h[others])
    sequences = [0, 1, 3, 4, 5, 6]
    assert torch.equal(dirty.c_n[sequences], clean.c_n[sequences])
    assert torch.equal(dirty.h_n[sequences], clean.h_n[sequences])


@every_direction
def test_large_states_and_biases_are_carried_too(reverse):
    """A cell state of thousands and gates biased to their ends leave the carry exact."""
    problem = Problem(SIZES["one-outlives-the-rest"], reverse=reverse)
    problem.c_0 *= 5000
    problem.weights.bias_ih[H : 2 * H] = -500.0  # forget everything
    problem.weights.bias_ih[:H] = 500.0  # take everything in
    whole = problem.forward(cut_at(problem.sizes, []))
    outputs, _ = problem.expected()
    assert_agree(named_outputs(whole), outputs)


# --- what is kept between calls -------------------------------------------------------------------


def test_training_after_inference_mode_has_seen_the_same_lengths():
    """What is kept between calls must not be a tensor made in inference mode."""
    sizes = (6, 5, 5, 5, 2, 1, 1, 1, 1, 1, 1)
    problem, pieces = Problem(sizes), cut_at(sizes, [])
    with torch.inference_mode():
        problem.forward(pieces, save=False)
    run = problem.forward(pieces)
    assert_agree(problem.backward(run), problem.expected()[1])


def test_a_default_device_does_not_spoil_what_is_kept_between_calls():
    sizes = (7, 5, 5, 5, 2, 1, 1, 1, 1, 1, 1)
    problem, pieces = Problem(sizes), cut_at(sizes, [])
    with torch.device("meta"):
        run = problem.forward(pieces)
        found = problem.backward(run)
    outputs, gradients = problem.expected()
    assert_agree(named_outputs(run), outputs)
    assert_agree(found, gradients)
