"""torch's modes around a call: tensors without data, make_fx, counters, other classes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from tests.oracle import every_path, forced
from tests.pairs import make_pair

I, H, T, B = 4, 6, 7, 3
LENGTHS = [7, 5, 2]
SIZES = torch.tensor([3, 3, 2, 2, 2, 1, 1])

CONFIGURATIONS = {
    "plain": {},
    "2-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "projection": {"proj_size": 2},
    "recompute": {"memory": "recompute"},
    "reference": {"backend": "reference"},
    "torch": {"backend": "torch"},
}
every_config = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)

# --- tensors without data ------------------------------------------------------------------------

FORMS = {
    "dense": lambda lstm, x: lstm(x),
    "unbatched": lambda lstm, x: lstm(x[:, 0]),
    "list": lambda lstm, x: lstm(x, lengths=LENGTHS),
    "lengths": lambda lstm, x: lstm(x, lengths=torch.tensor(LENGTHS)),
    "mask": lambda lstm, x: lstm(x, mask=torch.ones(T, B, dtype=torch.bool)),
    "resets": lambda lstm, x: lstm(x, resets=torch.ones(T, B, dtype=torch.bool)),
    "cell-states": lambda lstm, x: lstm(x, return_cell_states=True),
    "packed": lambda lstm, x: lstm(PackedSequence(x.flatten(0, 1)[:14], SIZES)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def flat(result):
    output, (h_n, c_n), *cells = result
    output = output.data if isinstance(output, PackedSequence) else output
    return output, h_n, c_n, *cells


def step(form, config):
    """Every output and every gradient of a training step."""
    lstm = fastrnn.LSTM(I, H, **config)
    x = torch.randn(T, B, I, dtype=config.get("dtype"), requires_grad=True)
    outputs = flat(form(lstm, x))
    sum(output.sum() for output in outputs).backward()
    return [*outputs, x.grad, *(p.grad for p in lstm.parameters())]


def described(tensors):
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


@every_form
@every_config
def test_a_training_step_of_fake_tensors(config, form):
    """As those who estimate memory do."""
    sizes_on_host = SIZES.tolist()  # made outside the mode, as pack_padded_sequence makes them
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = step(form, config)
    assert all(isinstance(tensor, FakeTensor) for tensor in found)
    assert described(found) == described(step(form, config))
    assert SIZES.tolist() == sizes_on_host


@every_form
@every_config
def test_a_training_step_on_meta_waits_for_no_value(config, form):
    """A tensor there raises where anybody reads it: no form synchronises with a device."""
    with torch.device("meta"):
        if form is FORMS["packed"]:
            pytest.skip("a PackedSequence keeps its sizes on the CPU")
        found = step(form, config)
    assert all(tensor.is_meta for tensor in found)
    assert described(found) == described(step(form, config))


def test_an_estimate_leaves_nothing_behind():
    torch.manual_seed(0)
    lstm, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    expected = lstm(x, lengths=LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for form in FORMS.values():
            step(form, {})
    found = lstm(x, lengths=LENGTHS)
    assert_close(found, expected, rtol=0, atol=0)


# --- make_fx -------------------------------------------------------------------------------------

PROGRAMS = {
    "dense": lambda lstm, x, lengths: lstm(x)[0],
    "list": lambda lstm, x, lengths: lstm(x, lengths=LENGTHS)[0],
    "lengths": lambda lstm, x, lengths: lstm(x, lengths=lengths)[0],
    "gradient": lambda lstm, x, lengths: torch.autograd.grad(
        lstm(x.requires_grad_(), lengths=lengths)[0].square().sum(), x
    )[0],
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("config", [{}, {"dtype": torch.float64, "proj_size": 2}], ids=["", "f64"])
def test_make_fx(config, mode, program):
    lstm, lengths = fastrnn.LSTM(I, H, **config), torch.tensor(LENGTHS)
    x, again = torch.randn(2, T, B, I, dtype=config.get("dtype")).unbind()
    graph = make_fx(
        lambda x, lengths: program(lstm, x, lengths),
        tracing_mode=mode,
        _allow_non_fake_inputs=mode != "real",
    )(x, lengths)
    others = lengths if program is PROGRAMS["list"] else torch.tensor([1, 7, 0])
    assert_close(graph(again, others), program(lstm, again, others))


# --- weights of a class of their own -------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [7, 7, 2]], ids=["dense", "lengths"])
@pytest.mark.parametrize(
    "config", [{}, {"num_layers": 2, "bidirectional": True}, {"dtype": torch.float64}]
)
def test_gradients_of_each_sample_by_expanded_weights(config, lengths):
    """nn.LSTM refuses a dense batch in float32, for torch has no rule for oneDNN there."""
    lstm = fastrnn.LSTM(I, H, batch_first=True, **config)
    x = torch.randn(B, T, I, dtype=config.get("dtype"))
    output, _ = call_for_per_sample_grads(lstm, batch_size=B)(x, lengths=lengths)
    output.square().sum().backward()
    for index in range(B):
        own = None if lengths is None else lengths[index : index + 1]
        loss = lstm(x[index : index + 1], lengths=own)[0].square().sum()
        expected = torch.autograd.grad(loss, list(lstm.parameters()))
        found = [parameter.grad_sample[index] for parameter in lstm.parameters()]
        assert_close(found, [*expected])


# --- counters, and tensors that are written to after they were saved -----------------------------


def flops(call):
    """Forward's and backward's."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        output = call()
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return [*counts, counter.get_total_flops()]


def products(lstm, rows):
    return 2 * rows * sum(w.numel() for w in lstm.parameters() if w.dim() == 2)


COUNTED = {name: CONFIGURATIONS[name] for name in ("plain", "float64", "projection", "reference")}


@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_every_matrix_product_is_counted(config):
    """The step loop has the bias as one more input feature, and torch no product before step 0."""
    lstm = fastrnn.LSTM(64, 64, num_layers=2, **config)
    x = torch.randn(16, 4, 64, dtype=config.get("dtype"), requires_grad=True)
    exact = products(lstm, 64)
    forward, backward = flops(lambda: lstm(x)[0])
    assert exact <= forward <= 1.03 * exact
    assert 2 * 0.96 * exact <= backward <= 2 * 1.03 * exact


@every_path
def test_every_matrix_product_of_a_ragged_batch_is_counted(path):
    lstm, lengths = fastrnn.LSTM(64, 64), [16, 12, 12, 8]
    x = torch.randn(16, 4, 64, requires_grad=True)
    with forced(path):
        forward, backward = flops(lambda: lstm(x, lengths=lengths)[0])
    least, padded = products(lstm, sum(lengths)), products(lstm, 16 * 4)
    assert least <= forward <= 1.03 * padded
    assert 2 * 0.96 * least <= backward <= 2 * 1.03 * padded


def test_a_module_made_before_anybody_counts():
    """What torch's counter knows is copied when the counter is made."""
    theirs, ours = make_pair()
    x = torch.randn(T, B, I)
    with FlopCounterMode(display=False) as counter:
        fastrnn.convert(theirs)
        theirs(x)
        ours(x)
    assert counter.get_total_flops() == products(ours, T * B) + products(theirs, T * B)


@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("form", ["dense", "list", "packed"])
def test_what_was_saved_may_be_written_to(form, config):
    def run(lstm, x):
        output = FORMS[form](lstm, x)[0]
        output = output.data if isinstance(output, PackedSequence) else output
        with torch.no_grad():
            lstm.weight_hh_l0.mul_(1)
        output.square().sum().backward()
        return [p.grad.clone() for p in lstm.parameters()]

    lstm = fastrnn.LSTM(I, H, **config)
    x = torch.randn(T, B, I, dtype=config.get("dtype"), requires_grad=True)
    with allow_mutation_on_saved_tensors():
        found = run(lstm, x)
    lstm.zero_grad()
    output = FORMS[form](lstm, x)[0]
    output = output.data if isinstance(output, PackedSequence) else output
    output.square().sum().backward()
    assert_close(found, [p.grad for p in lstm.parameters()])
