"""torch.compile takes the module as one graph, forward and backward; so does torch.export."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.cells import lstm as lstm_cell
from tests.oracle import answer, assert_agree, everything, make_state, padded, valid_steps

B, T, I, H = 4, 6, 3, 5
LENGTHS = [3, 6, 0, 5]
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
FULL = {"num_layers": 2, "bidirectional": True}

# Dynamo reads the .grad of every input, and torch warns where the input is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**config):
    return fastrnn.LSTM(I, H, **config)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def problem(lstm, steps=T, batch=B):
    dtype = lstm.weight_ih_l0.dtype
    return torch.randn(steps, batch, I, dtype=dtype), make_state(lstm, batch)


# --- the right answer ----------------------------------------------------------------------------

RAGGED = {
    "dense": {},
    "lengths": {"lengths": torch.tensor(LENGTHS)},
    "mask": {"mask": MASK},
    "resets": {"resets": RESETS},
    "lengths-mask-resets": {"lengths": torch.tensor(LENGTHS), "mask": MASK, "resets": RESETS},
}


def as_oracle(lengths=None, mask=None, resets=None):
    valid = torch.ones(T, B, dtype=torch.bool) if mask is None else mask
    valid = valid if lengths is None else valid & valid_steps(lengths.tolist(), T)
    return {"valid": valid, "resets": resets}


@pytest.mark.parametrize("ragged", RAGGED.values(), ids=RAGGED)
def test_forward_and_backward(ragged):
    lstm = make(**FULL)
    run = compiled(lstm)
    x, hx = problem(lstm)
    found = everything(lambda _, x, hx: padded(run, x, hx, **ragged), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged)))


CONFIGURATIONS = {
    "no-bias": {"bias": False},
    "projection": {"proj_size": 2, "bidirectional": True},
    "batch-first": {"batch_first": True},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_other_configurations(config):
    lstm = make(**config)
    run = compiled(lstm)
    x, hx = problem(lstm)
    ragged = RAGGED["lengths"]
    found = everything(lambda _, x, hx: padded(run, x, hx, **ragged), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged)))


@pytest.mark.parametrize("ragged", [{}, RAGGED["lengths-mask-resets"]], ids=["dense", "ragged"])
def test_cell_states(ragged):
    lstm = make(**FULL)
    run = compiled(lstm)
    x, hx = problem(lstm)

    def call(_, x, hx):
        return padded(run, x, hx, **ragged, return_cell_states=True)

    found = everything(call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged), cells=True))


@pytest.mark.parametrize("given_state", [False, True], ids=["", "given-state"])
@pytest.mark.parametrize("lengths", [[6, 5, 3, 1], [3, 6, 1, 5]], ids=["sorted", "unsorted"])
def test_packed_sequence(lengths, given_state):
    lstm = make(**FULL)
    x, hx = problem(lstm)
    run = compiled(lstm)

    def call(_, x, hx):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=lengths == [6, 5, 3, 1])
        output, states = run(packed, hx if given_state else None)
        return pad_packed_sequence(output, total_length=T)[0], *states

    if not given_state:
        hx = tuple(torch.zeros_like(state) for state in hx)
    found = everything(call, lstm, x, hx)
    expected = answer(lstm, x, hx, valid=valid_steps(lengths, T))
    states = set() if given_state else {"d_h_0", "d_c_0"}
    assert_agree(*({n: v for n, v in r.items() if n not in states} for r in (found, expected)))


def test_lengths_as_a_list():
    lstm = make()
    x, hx = problem(lstm)
    run = compiled(lstm)
    for lengths in (LENGTHS, [6, 6, 1, 2]):
        found = padded(run, x, hx, lengths=lengths)
        for value, right in zip(found, padded(lstm, x, hx, lengths=lengths)):
            torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ragged", [{}, RAGGED["lengths"]], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype, ragged):
    lstm = make(**FULL)
    run = compiled(lstm)
    x, hx = problem(lstm)

    def call(_, x, hx):
        with torch.autocast("cpu", dtype):
            return padded(run, x, hx, **ragged)

    found = everything(call, lstm, x, hx)
    assert {found[name].dtype for name in ("output", "h_n", "c_n")} == {dtype}
    assert found["d_weight_hh_l0"].dtype == torch.float32
    exact = answer(lstm, x, hx, **as_oracle(**ragged))
    assert_agree(found, exact, tolerance=6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("ragged", [{}, RAGGED["lengths-mask-resets"]], ids=["dense", "ragged"])
def test_inference(ragged, mode):
    lstm = make(**FULL).eval()
    x, hx = problem(lstm)
    with mode():
        found = padded(compiled(lstm), x, hx, **ragged)
        expected = padded(lstm, x, hx, **ragged)
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


def test_inference_where_every_sequence_is_far_shorter_than_the_input():
    """The graph allocates for the longest there could be; most steps have no sequence."""
    lstm = fastrnn.LSTM(16, 64).eval()
    x, lengths = torch.randn(300, 8, 16), torch.tensor([5, 4, 4, 3, 2, 2, 1, 1])
    with torch.no_grad():
        found, (h_n, c_n) = compiled(lstm)(x, lengths=lengths)
        expected, states = lstm(x, lengths=lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close((h_n, c_n), states, rtol=0, atol=1e-6)


def test_nan_in_the_padding_changes_no_bit():
    lstm = make(**FULL)
    run = compiled(lstm)
    x, hx = problem(lstm)
    ragged = RAGGED["lengths"]
    clean = everything(lambda _, x, hx: padded(run, x, hx, **ragged), lstm, x, hx)
    x[~valid_steps(LENGTHS, T)] = float("nan")
    dirty = everything(lambda _, x, hx: padded(run, x, hx, **ragged), lstm, x, hx)
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)


@pytest.mark.parametrize("lengths", [None, [2, 5, 0], [0, 0, 0]], ids=["dense", "ragged", "none"])
@pytest.mark.parametrize("config", [{}, {"proj_size": 2, "bidirectional": True}], ids=str)
def test_by_torchs_own_lstm_the_loop_never_runs(config, lengths, monkeypatch):
    """What a GPU without kernels gets: forward and backward by torch's operator, a node a layer."""
    lstm = fastrnn.LSTM(4, 6, num_layers=2, backend="torch", **config)
    x = torch.randn(5, 3, 4)

    def run(module):
        output, states = module(x, lengths=lengths)
        loss = output.square().sum() + sum(state.sum() for state in states)
        return output, *states, *torch.autograd.grad(loss, list(lstm.parameters()))

    expected = run(lstm)
    monkeypatch.setattr(lstm_cell, "lstm_forward", None)
    monkeypatch.setattr(lstm_cell, "lstm_backward", None)
    for found, right in zip(run(compiled(lstm)), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_frozen_weights():
    lstm = make().requires_grad_(False)
    x, _ = problem(lstm)
    x.requires_grad_()
    (d_x,) = torch.autograd.grad(compiled(lstm)(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(lstm(x)[0].square().sum(), x)
    torch.testing.assert_close(d_x, expected, rtol=1e-5, atol=1e-6)


def test_the_state_as_input_and_output_of_a_loop():
    """Truncated back-propagation: chunk after chunk from one graph."""
    lstm = make()
    run = compiled(lstm)
    x, state = problem(lstm)
    expected, last = lstm(x, state)
    outputs = []
    for chunk in x.split(2):
        output, state = run(chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-6)


class Tagger(nn.Module):
    """An LSTM in the midst of other layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, I)
        self.lstm = make(bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, tokens, lengths):
        output, (h_n, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        return self.head(output).relu(), h_n.sum()


def train(model, step):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        tokens, lengths = torch.randint(11, (B, T)), torch.randint(T + 1, (B,))
        scores, extra = step(tokens, lengths)
        loss = scores.square().mean() + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_a_model_around_it():
    torch.manual_seed(7)
    eager = Tagger()
    model = Tagger()
    model.load_state_dict(eager.state_dict())
    torch.testing.assert_close(train(model, compiled(model)), train(eager, eager))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(eager.named_parameters())[name])


# --- functions of torch.func inside a graph ------------------------------------------------------

DERIVATIVES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x, 2 * x])),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
}


FEW = {  # the steps are unrolled, and so is each of their derivatives
    "dense": {},
    "ragged": {"lengths": torch.tensor([3, 1]), "mask": MASK[:3, :2], "resets": RESETS[:3, :2]},
}


@pytest.mark.slow
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("ragged", FEW.values(), ids=FEW)
def test_a_derivative_inside(ragged, derivative):
    lstm = make()
    x, hx = problem(lstm, steps=3, batch=2)

    def program(x):
        return derivative(lambda x: lstm(x, hx, **ragged)[0], x)

    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [CONFIGURATIONS["projection"], {"batch_first": True, "num_layers": 2, "bias": False}]
)
def test_a_forward_derivative_inside_in_other_configurations(config):
    lstm = make(**config)
    x, hx = problem(lstm, steps=3, batch=2)

    def program(x):
        def function(x):
            return padded(lstm, x, hx, **FEW["ragged"], return_cell_states=True)

        return torch.func.jvp(function, (x,), (x.cos(),))

    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-5)


def test_gradients_of_each_sample_inside():
    lstm = make()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x, lengths = torch.randn(3, 3, 2, I), torch.tensor([[3, 1], [1, 1], [0, 2]])

    def loss(weights, x, lengths):
        output, (h_n, c_n) = functional_call(lstm, weights, (x,), {"lengths": lengths})
        return output.square().sum() + h_n.sum() + c_n.sum()

    def program(weights, x, lengths):
        gradients = torch.func.grad(loss)
        return torch.func.vmap(gradients, in_dims=(None, 0, 0))(weights, x, lengths)

    found = compiled(program)(weights, x, lengths)
    torch.testing.assert_close(found, program(weights, x, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, T + 1])
def test_lengths_of_a_sample_that_do_not_fit_raise_inside_too(wrong):
    lstm, x = make(), torch.randn(T, B, I)
    run = compiled(torch.func.vmap(lambda lengths: lstm(x, lengths=lengths)[0]))
    run(torch.tensor([LENGTHS, LENGTHS]))
    with pytest.raises(RuntimeError, match=rf"index {wrong} is out of bounds"):
        run(torch.tensor([LENGTHS, [3, 6, wrong, 5]]))


def test_dual_numbers_made_inside():
    lstm, x = make(), torch.randn(T, B, I)

    def program(x):
        with forward_ad.dual_level():
            output, _ = lstm(forward_ad.make_dual(x, x.cos()))
            return forward_ad.unpack_dual(output).tangent

    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-5)


def test_dual_numbers_from_outside():
    lstm, x = make(), torch.randn(T, B, I)
    run = compiled(lambda x: lstm(x)[0], backend="eager")  # the others have no forward mode
    run(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        found, expected = (
            forward_ad.unpack_dual(f(dual)).tangent for f in (run, lambda x: lstm(x)[0])
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_training_step_is_one_node_a_layer_and_direction_of_differentiation():
    lstm = make(**FULL)
    x, _ = problem(lstm)
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled(lambda x: lstm(x)[0].sum(), backend=backend)(x).backward()
    forward, backward = graphs
    assert sum(name == "fastrnn.lstm_layer.default" for name in forward) == 2
    assert sum(name == "fastrnn.lstm_layer_backward.default" for name in backward) == 2


# --- one graph for all values --------------------------------------------------------------------


@pytest.mark.parametrize("ragged", ["lengths", "mask", "resets"])
def test_other_values_need_no_other_graph(ragged):
    lstm = make(bidirectional=True)
    run = compiled(lstm)
    x, hx = problem(lstm)
    values = {
        "lengths": [[3, 6, 0, 5], [1, 1, 1, 1], [6, 6, 6, 6], [0, 0, 0, 0]],
        "mask": [MASK, ~MASK, MASK & False],
        "resets": [RESETS, ~RESETS, RESETS & False],
    }[ragged]
    run(x, hx, **{ragged: torch.as_tensor(values[0])})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in values:
            value = torch.as_tensor(value)
            output, _ = run(x, hx, **{ragged: value})
            expected, _ = lstm(x, hx, **{ragged: value})
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ragged", ["dense", "lengths", "mask", "resets"])
def test_other_sizes_need_no_other_graph_where_they_are_dynamic(ragged):
    lstm = make(bidirectional=True)
    run = compiled(lstm, dynamic=True)

    def call(run, steps, batch):
        torch.manual_seed(steps)
        x = torch.randn(steps, batch, I, requires_grad=True)
        given = {
            "dense": {},
            "lengths": {"lengths": torch.randint(steps + 1, (batch,))},
            "mask": {"mask": torch.rand(steps, batch) < 0.6},
            "resets": {"resets": torch.rand(steps, batch) < 0.3},
        }
        output, (h_n, c_n) = run(x, **given[ragged])
        loss = output.square().sum() + h_n.sum() + c_n.sum()
        return output, *torch.autograd.grad(loss, [x, *lstm.parameters()])

    call(run, T, B)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((9, 3), (4, 7), (65, 2)):
            for value, right in zip(call(run, steps, batch), call(lstm, steps, batch)):
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[3, 7, 0, 5], [3, -1, 0, 5]], ids=["too-long", "negative"])
def test_lengths_that_do_not_fit_raise_when_the_graph_runs(lengths):
    lstm = make()
    run = compiled(lstm)
    x, _ = problem(lstm)
    run(x, lengths=torch.tensor(LENGTHS))
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, T\]"):
        run(x, lengths=torch.tensor(lengths))


def test_a_mistake_of_shape_is_named_while_tracing():
    lstm = make()
    x, _ = problem(lstm)
    with pytest.raises(Exception, match=r"lengths must have shape \[4\]"):
        compiled(lstm)(x, lengths=torch.tensor([1, 2, 3]))


# --- inductor ------------------------------------------------------------------------------------

with_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")),
    reason="inductor needs a C++ compiler",
)


@pytest.mark.slow
@pytest.mark.timeout(400)  # a compiler runs for twenty seconds, on one core
@with_a_compiler
def test_inductor_training():
    lstm = make()
    run = compiled(lstm, backend="inductor")
    x, hx = problem(lstm)
    ragged = RAGGED["lengths"]
    found = everything(lambda _, x, hx: padded(run, x, hx, **ragged), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged)))


@pytest.mark.slow
@pytest.mark.timeout(400)  # a compiler runs for twenty seconds, on one core
@with_a_compiler
def test_inductor_inference():
    lstm = make().eval()
    x, hx = problem(lstm)
    with torch.no_grad():
        found = padded(compiled(lstm, backend="inductor"), x, hx, **RAGGED["lengths"])
        expected = padded(lstm, x, hx, **RAGGED["lengths"])
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


# --- torch.export --------------------------------------------------------------------------------


def layers_in(program):
    return sum("lstm_layer" in str(node.target) for node in program.graph.nodes)


def test_export_keeps_one_node_a_layer():
    lstm = make(**FULL).eval()
    program = torch.export.export(lstm, (torch.randn(T, B, I),))
    assert layers_in(program) == 2


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_export_with_any_number_of_steps_and_sequences(ragged):
    lstm = make(bidirectional=True).eval()
    steps, batch = torch.export.Dim("T", min=2, max=64), torch.export.Dim("B", min=2, max=64)
    options = {"lengths": torch.tensor(LENGTHS)} if ragged else {}
    dynamic = {"input": {0: steps, 1: batch}}
    if ragged:
        dynamic["lengths"] = {0: batch}
    program = torch.export.export(lstm, (torch.randn(T, B, I),), options, dynamic_shapes=dynamic)
    x = torch.randn(11, 3, I)
    options = {"lengths": torch.tensor([0, 11, 7])} if ragged else {}
    found, states = program.module()(x, **options)
    expected, expected_states = lstm(x, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-6)


# torch 2.11 says so of its own file.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_exported_program_can_be_saved_and_loaded():
    lstm = make().eval()
    x, options = torch.randn(T, B, I), {"lengths": torch.tensor(LENGTHS), "resets": RESETS}
    file = io.BytesIO()
    torch.export.save(torch.export.export(lstm, (x,), options), file)
    file.seek(0)
    found, _ = torch.export.load(file).module()(x, **options)
    torch.testing.assert_close(found, lstm(x, **options)[0], rtol=0, atol=1e-6)
