"""The padded batch as it stands gives the answer, and derivatives of derivatives too."""

from __future__ import annotations

import math

import pytest
import torch

import fastrnn
from fastrnn import compute, layer
from tests.oracle import (
    answer,
    as_function,
    assert_agree,
    assert_identical,
    everything,
    forced,
    make_state,
    padded,
    valid_steps,
)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)

B, T, I, H = 4, 6, 3, 5
LENGTHS = [3, 6, 1, 5]
CONFIGURATIONS = {
    "plain": {},
    "2-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "3-layers-bidirectional": {"num_layers": 3, "bidirectional": True},
}
every_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
every_lengths = pytest.mark.parametrize(
    "lengths",
    [LENGTHS, [6, 6, 6, 6], [1, 1, 1, 1], [2, 2, 2, 2], None],
    ids=["ragged", "full", "one-step", "all-padded", "dense"],
)


@pytest.fixture(autouse=True)
def run_padded(monkeypatch):
    """Every test runs this path, and the test fails if it did not."""
    calls = []

    def counted(function):
        return lambda *args, **options: calls.append(1) or function(*args, **options)

    for module, name in (
        (compute, "run_padded"),
        (compute, "run_dense"),
        (layer, "run_dense_rows"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    with forced("padded"):
        yield
    assert calls, "another path ran"


def make(**config):
    return fastrnn.LSTM(I, H, **config)


def call(lengths):
    """With the given states, but not where both directions have padding: those are packed."""

    def run(lstm, x, hx):
        state = None if lstm.bidirectional and lengths is not None else hx
        return padded(lstm, x, state, lengths=lengths)

    return run


def problem(lstm, lengths=LENGTHS):
    x, hx = torch.randn(T, B, I), make_state(lstm, B)
    if lstm.bidirectional and lengths is not None:
        hx = tuple(torch.zeros_like(state) for state in hx)
    return x, hx


def without_states(lstm, lengths, *results):
    """Where no state was given there is no gradient of one."""
    left_out = {"d_h_0", "d_c_0"} if lstm.bidirectional and lengths is not None else set()
    return [{n: v for n, v in result.items() if n not in left_out} for result in results]


@every_lengths
@every_configuration
def test_it_gives_the_answer(config, lengths):
    lstm = make(**config)
    x, hx = problem(lstm, lengths)
    valid = None if lengths is None else valid_steps(lengths, T)
    found = everything(call(lengths), lstm, x, hx)
    expected = answer(lstm, x, hx, valid=valid)
    assert_agree(*without_states(lstm, lengths, found, expected))


@every_configuration
@pytest.mark.parametrize("kept", ["output", "h_n", "c_n"])
def test_one_output_alone_in_the_loss(kept, config):
    lstm = make(**config)
    x, hx = problem(lstm)
    skip = {"output", "h_n", "c_n"} - {kept}
    found = everything(call(LENGTHS), lstm, x, hx, skip=skip)
    expected = answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), skip=skip)
    assert_agree(*without_states(lstm, LENGTHS, found, expected))


@every_configuration
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_what_stands_in_the_padding_changes_no_bit(poison, config):
    lstm = make(**config)
    x, hx = problem(lstm)
    clean = everything(call(LENGTHS), lstm, x, hx)
    invalid = ~valid_steps(LENGTHS, T)
    x[invalid] = poison
    dirty = everything(call(LENGTHS), lstm, x, hx)
    assert_identical(dirty, clean)
    assert (dirty["d_x"][invalid] == 0).all()


@pytest.mark.parametrize("steps", [6, 9, 40, 200])
def test_a_cell_state_is_carried_bit_for_bit_however_far(steps):
    lstm, rows = make(), torch.randn(200, 3, I)
    states = [lstm(rows[:t], lengths=[t, 4, 2])[1][1][:, 1:] for t in (5, steps)]
    assert torch.equal(*states)


def test_large_states_and_saturated_gates_are_carried_too():
    lstm = make()
    x, (h_0, c_0) = problem(lstm)
    with torch.no_grad():
        lstm.bias_ih_l0[:H] = 500.0
        lstm.bias_ih_l0[H : 2 * H] = -500.0
    hx = h_0, c_0 * 5000
    found = everything(call(LENGTHS), lstm, x, hx)
    expected = answer(lstm, x, hx, valid=valid_steps(LENGTHS, T))
    del found["d_c_0"], expected["d_c_0"]  # 1e-217, which float32 has not
    assert_agree(found, expected)


@every_lengths
def test_run_twice_and_backward_twice_are_bit_equal(lengths):
    lstm = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    inputs = [x, *lstm.parameters()]
    results = []
    for _ in range(2):
        output, (h_n, c_n) = lstm(x, lengths=lengths)
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        results.append([output, *torch.autograd.grad(loss, inputs, retain_graph=True)])
        results.append([output, *torch.autograd.grad(loss, inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_lengths
def test_gradients_are_the_same_with_and_without_a_graph_of_them(lengths):
    lstm = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    output, (h_n, c_n) = lstm(x, lengths=lengths)
    loss = output.square().sum() + h_n.square().sum() + c_n.square().sum()
    inputs = {"x": x, **dict(lstm.named_parameters())}
    plain, graphed = (
        torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    assert all(gradient.requires_grad for gradient in graphed)
    assert_agree(dict(zip(inputs, graphed)), dict(zip(inputs, plain)))


@every_lengths
def test_a_weight_that_is_made_of_another_gets_its_gradient_once(lengths):
    lstm = fastrnn.LSTM(H, H, bias=False)
    x, weight = torch.randn(T, B, H), torch.randn(4 * H, H, requires_grad=True)
    weights = {"weight_ih_l0": weight, "weight_hh_l0": weight * 0.5}
    output, _ = torch.func.functional_call(lstm, weights, (x,), {"lengths": lengths})
    loss = output.square().sum()
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (graphed,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert_agree({"weight": graphed}, {"weight": plain})


@every_lengths
@every_configuration
def test_second_derivatives_are_the_answers_of_float64(config, lengths):
    """A gradient penalty in float32; that of the step loop in float64 passes gradgradcheck."""
    lstm = make(**{**config, "batch_first": False})
    x, hx = problem(lstm, lengths)
    exact = make(**{**config, "batch_first": False, "dtype": torch.float64})
    exact.load_state_dict(lstm.state_dict())

    def penalty(lstm, x):
        x = x.clone().requires_grad_()
        state = tuple(state.to(x.dtype) for state in hx)
        outputs = call(lengths)(lstm, x, state)
        loss = sum(output.square().sum() for output in outputs)
        (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
        names = ["x", *(name for name, _ in lstm.named_parameters())]
        inputs = [x, *lstm.parameters()]
        return dict(zip(names, torch.autograd.grad(d_x.square().sum(), inputs)))

    assert_agree(penalty(lstm, x), penalty(exact, x.double()), tolerance=2e-5)


@every_lengths
def test_frozen_weights(lengths):
    lstm = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    (expected,) = torch.autograd.grad(lstm(x, lengths=lengths)[0].square().sum(), x)
    lstm.requires_grad_(False)
    (d_x,) = torch.autograd.grad(lstm(x, lengths=lengths)[0].square().sum(), x)
    assert torch.equal(d_x, expected)


@every_lengths
def test_final_states_zeroed_in_place_before_backward(lengths):
    lstm = make(bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    expected = torch.autograd.grad(lstm(x, lengths=lengths)[0].square().sum(), x)
    output, (h_n, c_n) = lstm(x, lengths=lengths)
    h_n.zero_()
    c_n.zero_()
    assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], expected[0])


@every_lengths
def test_the_output_can_be_changed_in_place(lengths):
    lstm, x = make(), torch.randn(T, B, I)
    expected = lstm(x, lengths=lengths)[0] * 2
    output, _ = lstm(x, lengths=lengths)
    output.mul_(2)
    assert torch.equal(output, expected)


def test_functions_of_the_derivatives_take_another_path():
    """oneDNN's node has no forward-mode derivative and no rule for vmap."""
    lstm, x = make(), torch.randn(T, B, I)
    function = as_function(lstm, LENGTHS)
    leaves = (x, *make_state(lstm, B), *(p.detach() for p in lstm.parameters()))
    expected = function(*leaves)
    outputs, tangents = torch.func.jvp(function, leaves, leaves)
    for output, tangent, right in zip(outputs, tangents, expected):
        torch.testing.assert_close(output, right, rtol=0, atol=1e-6)
        assert tangent.isfinite().all()
