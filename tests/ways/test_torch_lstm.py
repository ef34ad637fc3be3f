"""torch's own LSTM as a way: nn.LSTM's numbers, ragged forms too, and derivatives everywhere."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import torch_private
from fastrnn.choosing import choose
from fastrnn.ways import torch_lstm
from tests.oracle import (
    FORMS,
    answer,
    as_function,
    assert_agree,
    assert_identical,
    every_configuration,
    every_lengths,
    everything,
    make_state,
    padded,
    valid_steps,
)

B, T, I, H = 4, 6, 3, 5
RAGGED = [3, 6, 0, 5]
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.7
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3


def make(dtype=torch.float64, **config):
    return fastrnn.LSTM(I, H, dtype=dtype, backend="torch", **{**config, "batch_first": False})


def problem(lstm):
    return torch.randn(T, B, I, dtype=lstm.weight_ih_l0.dtype), make_state(lstm, B)


@pytest.fixture(params=["torch's derivative", "a node of ours"], autouse=True)
def on_device(request):
    """The CPU as it is, and as if it were a device whose backward torch cannot differentiate."""
    if request.param == "torch's derivative":
        yield
    else:
        with mock.patch.object(torch_lstm, "CPU", torch.device("meta")):
            yield


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@every_lengths
def test_every_form_gives_the_answer(lengths_of, form):
    lengths = lengths_of(B, T)
    if form in ("packed", "jagged") and not all(lengths):
        lengths = [max(1, length) for length in lengths]
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)
    found = everything(lambda lstm, x, hx: FORMS[form](lstm, x, hx, lengths), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(lengths, T)))


@every_configuration
def test_every_configuration_gives_the_answer(config):
    lstm = make(**config)
    x, hx = problem(lstm)
    found = everything(lambda *given: padded(*given, lengths=RAGGED), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(RAGGED, T)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_holes_and_resets(bidirectional):
    lstm = make(num_layers=2, bidirectional=bidirectional)
    x, hx = problem(lstm)
    ragged = {"mask": MASK, "resets": RESETS}
    found = everything(lambda *given: padded(*given, **ragged), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=MASK, resets=RESETS))


def test_nan_in_the_padding_changes_no_bit():
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)

    def run(padding):
        given = torch.where(valid_steps(RAGGED, T).unsqueeze(2), x, padding)
        return everything(lambda *given: padded(*given, lengths=RAGGED), lstm, given, hx)

    assert_identical(run(float("nan")), run(0.0))


def test_no_valid_step_at_all():
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    found = everything(lambda *given: padded(*given, lengths=[0] * B), lstm, x, hx)
    assert torch.equal(found["h_n"], hx[0]) and torch.equal(found["c_n"], hx[1])
    assert not found["output"].any() and not found["d_weight_hh_l0"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_nn_lstm_bit_for_bit(packed, dtype):
    ours = make(dtype, num_layers=2)
    theirs = nn.LSTM(I, H, 2, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=dtype)

    def run(lstm):
        given = pack_padded_sequence(x, [6, 5, 5, 2]) if packed else x
        output, states = lstm(given)
        output = pad_packed_sequence(output)[0] if packed else output
        loss = output.abs().square().sum()
        return output, *states, *torch.autograd.grad(loss, list(lstm.parameters()))

    for found, right in zip(run(ours), run(theirs), strict=True):
        assert torch.equal(found, right)


def test_autocast_decides_the_dtype():
    lstm, x = make(torch.float32), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, _) = lstm(x, lengths=RAGGED)
    assert output.dtype == h_n.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), lstm(x, lengths=RAGGED)[0], atol=0.02, rtol=0.02)


# --- derivatives ---------------------------------------------------------------------------------


def test_gradients_in_evaluation_mode_are_those_of_training():
    lstm = make(num_layers=2)
    x, hx = problem(lstm)
    training = everything(padded, lstm, x, hx)
    assert_identical(everything(padded, lstm.eval(), x, hx), training)


def test_frozen_weights_get_no_gradient_and_change_no_other():
    lstm = make()
    x, hx = problem(lstm)
    right = everything(padded, lstm, x, hx)
    lstm.weight_ih_l0.requires_grad_(False)
    padded(lstm, x, hx)[0].sum().backward()
    assert lstm.weight_ih_l0.grad is None
    lstm.weight_ih_l0.requires_grad_(True)
    assert_identical(everything(padded, lstm, x, hx), right)


def test_a_second_backward_gives_the_same():
    lstm = make()
    x, hx = problem(lstm)
    loss = padded(lstm, x, hx, lengths=RAGGED)[0].square().sum()
    weights = list(lstm.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    for found, right in zip(torch.autograd.grad(loss, weights), first, strict=True):
        assert torch.equal(found, right)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


@every_configuration
@pytest.mark.parametrize("lengths", [None, [1, 0]], ids=["dense", "ragged"])
def test_double_backward(lengths, config):
    lstm = fastrnn.LSTM(2, 3, dtype=torch.float64, backend="torch", **config)
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    given = x, *make_state(lstm, 2), *lstm.parameters()
    inputs = [tensor.detach().requires_grad_() for tensor in given]
    function = as_function(lstm, lengths)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_dropout_draws_as_nn_lstm_does():
    ours, theirs = (
        make(num_layers=3, dropout=0.5),
        nn.LSTM(I, H, 3, dropout=0.5, dtype=torch.float64),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.random.fork_rng():
        expected = theirs(x)[0]
    assert torch.equal(ours(x)[0], expected)
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x)[0])


def test_an_output_changed_in_place_is_noticed_or_harmless():
    """As torch has it: a gradient is never silently wrong."""
    lstm = make()
    x, hx = problem(lstm)

    def twice(*given):
        return [tensor * 2 for tensor in padded(*given, lengths=RAGGED)]

    def doubled(*given):
        output, *states = padded(*given, lengths=RAGGED)
        return output.mul_(2), *(state * 2 for state in states)

    assert_identical(everything(doubled, lstm, x, hx), everything(twice, lstm, x, hx))


# --- what only a device has ----------------------------------------------------------------------


def test_dropout_has_no_double_backward_off_the_cpu(on_device):
    lstm = make(num_layers=2, dropout=0.5)
    x, hx = problem(lstm)
    with mock.patch.object(torch_lstm, "CPU", torch.device("meta")):
        loss = padded(lstm, x, hx)[0].sum()
        with pytest.raises(RuntimeError, match='backend="reference" for it, or dropout=0'):
            torch.autograd.grad(loss, list(lstm.parameters()), create_graph=True)


def test_backward_lets_torchs_graph_go():
    """A loss that is kept for a log keeps no activations."""
    lstm = make()
    x, hx = problem(lstm)
    kept = []
    with (
        mock.patch.object(torch_lstm, "CPU", torch.device("meta")),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(weakref.ref(t)), t)[1] if t.dim() == 3 else t, lambda t: t
        ),
    ):
        loss = padded(lstm, x, hx)[0].sum()
    del x, hx
    alive = sum(ref() is not None for ref in kept)
    loss.backward()
    gc.collect()
    assert alive and not any(ref() is not None for ref in kept)


def flattened(weights, *settings):
    """What cuDNN does with weights: one chunk of memory."""
    chunk = torch.cat([weight.flatten() for weight in weights])
    for weight, part in zip(weights, chunk.split([w.numel() for w in weights]), strict=True):
        weight.set_(part.view_as(weight))
    flattened.settings = settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as-they-are", "cast"])
def test_scattered_weights_are_put_in_one_chunk_for_cudnn(dtype):
    """Else torch warns at every call; the parameters stay where they are."""
    lstm = make(torch.float32, num_layers=2, bidirectional=True, proj_size=2)
    x, hx = torch.randn(T, B, I), make_state(lstm, B)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        right = everything(padded, lstm, x, hx)
        places = [weight.data_ptr() for weight in lstm.parameters()]
        seen = []
        found = torch.lstm
        with (
            mock.patch.object(torch_lstm, "CPU", torch.device("meta")),
            mock.patch.object(torch_lstm, "_wants_one_chunk", lambda _: True),
            mock.patch.object(torch_private, "cudnn_to_one_chunk", flattened),
            mock.patch.object(torch, "lstm", lambda *a: seen.append(a[2]) or found(*a)),
        ):
            assert_agree(everything(padded, lstm, x, hx), right, tolerance=1e-2)
    assert flattened.settings == (5, I, 2, H, 2, 2, False, True)
    assert {weight.untyped_storage().data_ptr() for weight in seen[0]} not in places
    assert len({weight.untyped_storage().data_ptr() for weight in seen[0]}) == 1
    assert [weight.data_ptr() for weight in lstm.parameters()] == places


# --- what it cannot do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ({}, {"return_cell_states": True}, "does not return the cell states"),
        ({"memory": "recompute"}, {}, "knows no memory='recompute'"),
    ],
    ids=["cell-states", "recompute"],
)
def test_the_step_loop_does_what_torch_cannot_and_the_log_says_so(config, options, reason, caplog):
    caplog.set_level("INFO", logger="fastrnn")
    choose._log_once.cache_clear()
    lstm = make(**config)
    x, _ = problem(lstm)
    output, _, *cells = lstm(x, lengths=RAGGED, **options)
    assert len(cells) == len(options)
    assert_agree(
        {"output": output},
        {"output": answer(lstm, x, make_zeros(lstm), valid=valid_steps(RAGGED, T))["output"]},
    )
    assert reason in caplog.text


def make_zeros(lstm):
    return tuple(torch.zeros_like(state) for state in make_state(lstm, B))


def test_complex_numbers_are_torchs():
    lstm = fastrnn.LSTM(I, H, dtype=torch.complex128)
    theirs = nn.LSTM(I, H, dtype=torch.complex128)
    theirs.load_state_dict(lstm.state_dict())
    x = torch.randn(T, B, I, dtype=torch.complex128)
    assert torch.equal(lstm(x)[0], theirs(x)[0])
    lstm.backend = "reference"
    with pytest.raises(TypeError, match=r"computes real numbers, got torch\.complex128"):
        lstm(x)
