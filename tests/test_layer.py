"""One layer: torch's transformations see a function, a bounded layout's spare rows do nothing."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.testing import assert_close

import fastrnn
from fastrnn.cells.lstm import LayerWeights
from fastrnn.input.forms import Padded
from fastrnn.input.packing import ragged_layout
from fastrnn.layer import lstm_layer
from tests.oracle import (
    as_function,
    assert_agree,
    every_configuration,
    every_path,
    forced,
    make_state,
)

B, T, I, H = 4, 6, 3, 5
LENGTHS = [3, 6, 0, 5]


def make(dtype=torch.float32, **config):
    return fastrnn.LSTM(I, H, dtype=dtype, **config)


# --- forward-mode derivatives and function transforms --------------------------------------------


@every_configuration
def test_forward_mode_is_the_transpose_of_backward(config):
    lstm = make(torch.float64, **{**config, "batch_first": False})
    function = as_function(lstm, LENGTHS)
    x, hx = torch.randn(T, B, I, dtype=torch.float64), make_state(lstm, B)
    leaves = tuple(leaf.detach() for leaf in (x, *hx, *lstm.parameters()))
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    outputs, d_outputs = torch.func.jvp(function, leaves, tangents)
    plain = function(*leaves)
    assert_agree(dict(enumerate(outputs)), dict(enumerate(plain)))
    cotangents = tuple(torch.randn_like(output) for output in outputs)
    _, pull = torch.func.vjp(function, *leaves)
    pulled = pull(cotangents)
    forward = sum((d * c).sum() for d, c in zip(d_outputs, cotangents, strict=True))
    backward = sum((t * p).sum() for t, p in zip(tangents, pulled, strict=True))
    assert_close(forward, backward, rtol=1e-10, atol=0)


def test_dual_numbers():
    lstm = make(torch.float64)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda x: lstm(x, lengths=LENGTHS)[0], (x,), (tangent,))
    with forward_ad.dual_level():
        output, _ = lstm(forward_ad.make_dual(x, tangent), lengths=LENGTHS)
        assert torch.equal(forward_ad.unpack_dual(output).tangent, expected)


def test_a_dual_level_with_no_dual_number_changes_nothing():
    lstm, x = make(), torch.randn(T, B, I)
    expected = lstm(x)[0]
    with forward_ad.dual_level():
        assert torch.equal(lstm(x)[0], expected)


@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "dense"])
def test_vmap_over_the_input(lengths):
    lstm = make(torch.float64, num_layers=2, bidirectional=True)
    x = torch.randn(3, T, B, I, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: lstm(x, lengths=lengths)[0])(x)
    one_by_one = torch.stack([lstm(each, lengths=lengths)[0] for each in x])
    assert_close(mapped, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "dense"])
def test_vmap_over_an_ensemble_of_weights(lengths):
    models = [make(torch.float64) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = torch.randn(T, B, I, dtype=torch.float64)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters):
        return functional_call(base, parameters, (x,), {"lengths": lengths})[0]

    mapped = torch.func.vmap(call)(parameters)
    one_by_one = torch.stack([model(x, lengths=lengths)[0] for model in models])
    assert_close(mapped, one_by_one, rtol=1e-12, atol=1e-12)


def test_gradients_by_functional_call_and_grad():
    lstm = make(torch.float64, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def loss(parameters):
        return functional_call(lstm, parameters, (x,), {"lengths": LENGTHS})[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    lstm(x, lengths=LENGTHS)[0].square().sum().backward()
    assert_agree(found, {name: p.grad for name, p in lstm.named_parameters()})


def test_gradients_of_each_sample():
    lstm = make(torch.float64)
    x = torch.randn(B, T, I, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def loss(parameters, x):
        return functional_call(lstm, parameters, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(B):
        expected = torch.func.grad(loss)(parameters, x[b])
        assert_agree({name: found[name][b] for name in found}, expected)


def test_jacobians_both_ways():
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def function(x):
        return lstm(x, lengths=[3, 1])[0]

    by_autograd = torch.autograd.functional.jacobian(function, x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(function)(x), by_autograd, rtol=1e-12, atol=1e-12)


def test_hessian():
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def function(x):
        return lstm(x, lengths=[3, 1])[0].square().sum()

    expected = torch.autograd.functional.hessian(function, x)
    assert_close(torch.func.hessian(function)(x), expected, rtol=1e-9, atol=1e-10)


# --- a bounded layout outside a graph ------------------------------------------------------------


@every_path
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cell_states", [False, True], ids=["", "cell-states"])
def test_rows_past_the_valid_ones_are_not_read_and_come_out_zero(cell_states, train, path):
    """What lengths on an accelerator lead to, on the CPU."""
    lengths = [2, 0, 3, 1]
    form = Padded(torch.randn(T, B, I), False)
    exact = ragged_layout(form, lengths)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        bounded = ragged_layout(form, lengths)
    lstm = make(bidirectional=True)
    weights = [LayerWeights(*each) for each in lstm.all_weights]
    h_0, c_0 = make_state(lstm, B)
    rows = form.rows(exact).requires_grad_(train)
    spoiled = torch.full((bounded.rows, I), math.nan)
    spoiled[:6] = rows.detach()
    spoiled.requires_grad_(train)

    def run(layout, rows):
        enter = (layout.enter(h_0, 2), layout.enter(c_0, 2))
        return lstm_layer(rows, layout, weights, *enter, cell_states=cell_states)

    with torch.set_grad_enabled(train), forced(path):
        expected, found = run(exact, rows), run(bounded, spoiled)
    assert_close(found.h[:6], expected.h, rtol=0, atol=1e-6)
    assert (found.h[6:] == 0).all()
    if cell_states:
        assert_close(found.c[:6], expected.c, rtol=0, atol=1e-6)
        assert (found.c[6:] == 0).all()
    for name in ("h_n", "c_n"):
        states = (
            bounded.leave(getattr(found, name), 2),
            exact.leave(getattr(expected, name), 2),
        )
        assert_close(*states, rtol=0, atol=1e-6)
    if train:
        expected.h.square().sum().backward()
        found.h.square().sum().backward()
        assert_close(spoiled.grad[:6], rows.grad, rtol=0, atol=1e-6)
        assert (spoiled.grad[6:] == 0).all()
