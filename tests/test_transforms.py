"""What torch.func and torch.autograd make of a call: gradients in batches, lengths of each sample.

tests/test_layer.py has the transforms of one sample's function, tests/test_compile.py those inside
a graph.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fastrnn
from tests.oracle import every_path, forced, make_state, padded, valid_steps

# torch runs oneDNN's backward sample by sample, and copies what it searches.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning"),
]

B, T, I, H, SAMPLES = 3, 5, 2, 3, 4
LENGTHS = [5, 1, 3]
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.4

CONFIGURATIONS = {
    "plain": {},
    "2-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "float64": {"dtype": torch.float64},
    "projection": {"proj_size": 2},
    "recompute": {"memory": "recompute"},
    "reference": {"backend": "reference"},
}
every_config = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)

# --- gradients in batches ------------------------------------------------------------------------


def packed(lstm, x):
    output, states = lstm(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    return output.data, *states


def flat(result):
    output, states, *cells = result
    return output, *states, *cells


CALLS = {
    "dense": lambda lstm, x: flat(lstm(x)),
    "lengths": lambda lstm, x: flat(lstm(x, lengths=LENGTHS)),
    "mask": lambda lstm, x: flat(lstm(x, mask=MASK)),
    "resets": lambda lstm, x: flat(lstm(x, resets=RESETS)),
    "cell-states": lambda lstm, x: flat(lstm(x, return_cell_states=True)),
    "packed": packed,
}


@every_config
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_vectorized_jacobian(call, config):
    lstm = fastrnn.LSTM(I, H, **config)
    x = torch.randn(T, B, I, dtype=config.get("dtype"))
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(lambda x: call(lstm, x), x, vectorize=True)
    assert_close(found, jacobian(lambda x: call(lstm, x), x))


@every_path
@pytest.mark.parametrize("what", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
def test_gradients_of_one_output_in_a_batch(bidirectional, what, path):
    lstm = fastrnn.LSTM(I, H, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(T, B, I, requires_grad=True)
    with forced(path):
        outputs = dict(zip(("output", "h_n", "c_n"), padded(lstm, x, None, lengths=LENGTHS)))
        inputs = [x, *lstm.parameters()]
        cotangents = torch.randn(SAMPLES, *outputs[what].shape)

        def pull(cotangent, **options):
            return torch.autograd.grad(
                outputs[what], inputs, cotangent, retain_graph=True, allow_unused=True, **options
            )

        expected = [torch.stack(each) for each in zip(*map(pull, cotangents))]
        assert_close(pull(cotangents, is_grads_batched=True), tuple(expected))
        assert_close(vmap(pull)(cotangents), tuple(expected))


@every_config
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "dense"])
def test_a_vectorized_hessian(lengths, config):
    lstm = fastrnn.LSTM(I, H, **config)
    x = torch.randn(2, B, I, dtype=config.get("dtype"))
    lengths = None if lengths is None else [min(length, 2) for length in lengths]
    hessian = torch.autograd.functional.hessian

    def function(x):
        return lstm(x, lengths=lengths)[0].square().sum()

    assert_close(hessian(function, x, vectorize=True), hessian(function, x))


# --- lengths, masks and resets of each sample ----------------------------------------------------

OF_SAMPLES = {
    "lengths": {"lengths": torch.tensor([LENGTHS, [0, 2, 4], [5, 5, 5], [0, 0, 0]])},
    "mask": {"mask": torch.stack([MASK, ~MASK, MASK & False, MASK | True])},
    "resets": {"resets": torch.stack([RESETS, ~RESETS, RESETS & False, RESETS | True])},
}
OF_SAMPLES["all"] = {name: value for each in OF_SAMPLES.values() for name, value in each.items()}
of_samples = pytest.mark.parametrize("ragged", OF_SAMPLES.values(), ids=OF_SAMPLES)


def of_sample(ragged, index):
    return {name: value[index] for name, value in ragged.items()}


@of_samples
@every_config
def test_vmap_over_what_is_valid(config, ragged):
    lstm = fastrnn.LSTM(I, H, **config)
    x = torch.randn(SAMPLES, T, B, I, dtype=config.get("dtype"))
    hx = make_state(lstm, B)

    def call(x, ragged):
        return padded(lstm, x, hx, **ragged, return_cell_states=True)

    found = vmap(call)(x, ragged)
    expected = [call(x[index], of_sample(ragged, index)) for index in range(SAMPLES)]
    assert_close(found, tuple(map(torch.stack, zip(*expected))))


@of_samples
def test_gradients_of_each_sample_with_lengths_of_its_own(ragged):
    lstm = fastrnn.LSTM(I, H, num_layers=2, bidirectional=True)
    x = torch.randn(SAMPLES, T, B, I)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def loss(parameters, x, ragged):
        output, (h_n, c_n) = functional_call(lstm, parameters, (x,), ragged)
        return output.square().sum() + h_n.sum() + c_n.square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, ragged)
    for index in range(SAMPLES):
        expected = grad(loss)(parameters, x[index], of_sample(ragged, index))
        assert_close({name: value[index] for name, value in found.items()}, expected)


def test_nan_where_a_sample_is_not_valid_changes_nothing():
    lstm = fastrnn.LSTM(I, H, bidirectional=True)
    x, lengths = torch.randn(SAMPLES, T, B, I), OF_SAMPLES["lengths"]["lengths"]
    dirty = x.clone()
    for index, each in enumerate(lengths.tolist()):
        dirty[index][~valid_steps(each, T)] = math.nan
    dirty[0, 0, 0] = math.nan  # spoils one sequence of the first sample

    def derivative(x, lengths):
        return grad(lambda x: lstm(x, lengths=lengths)[0][:, 1:].square().sum())(x)

    found, expected = vmap(derivative)(dirty, lengths), vmap(derivative)(x, lengths)
    assert_close(found[:, :, 1:], expected[:, :, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, T + 1])
def test_lengths_that_do_not_fit_are_refused_in_every_sample(wrong):
    lstm, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    lengths = torch.tensor([LENGTHS, [0, wrong, 4]])
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, T\]"):
        vmap(lambda lengths: lstm(x, lengths=lengths)[0])(lengths)
