"""A fastrnn.LSTM takes an nn.LSTM's place: made, written, copied, saved and reshaped like one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from tests.pairs import (
    PARAMETRIZATIONS,
    B,
    H,
    I,
    T,
    assert_close,
    assert_same,
    every_configuration,
    gradients,
    make_input,
    make_pair,
    tensors_of,
)

# --- the class -----------------------------------------------------------------------------------


def test_it_is_an_rnn_base_and_not_an_nn_lstm():
    assert issubclass(fastrnn.LSTM, nn.RNNBase)
    assert not issubclass(fastrnn.LSTM, nn.LSTM), "Dynamo refuses every subclass of nn.LSTM"


def test_every_public_attribute_of_nn_lstm_is_there():
    theirs, ours = make_pair()
    missing = {name for name in dir(theirs) if not name.startswith("_")} - set(dir(ours))
    assert missing == set()


def test_the_constructors_signature_begins_with_nn_lstms():
    ours = list(inspect.signature(fastrnn.LSTM.__init__).parameters.values())
    theirs = list(inspect.signature(nn.RNNBase.__init__).parameters.values())
    del theirs[1]  # mode
    for mine, other in zip(ours, theirs):
        assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


BAD_ARGUMENTS = {
    "dropout-2": ((I, H), {"dropout": 2}),
    "dropout-True": ((I, H), {"dropout": True}),
    "input-0": ((0, H), {}),
    "input-float": ((1.0, H), {}),
    "hidden-0": ((I, 0), {}),
    "hidden-str": ((I, "5"), {}),
    "layers-0": ((I, H, 0), {}),
    "bias-int": ((I, H), {"bias": 1}),
    "batch_first-None": ((I, H), {"batch_first": None}),
    "proj-negative": ((I, H), {"proj_size": -1}),
    "proj-too-large": ((I, H), {"proj_size": H}),
}


@pytest.mark.parametrize(("args", "kwargs"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_gets_torchs_error(args, kwargs):
    with pytest.raises((ValueError, TypeError)) as theirs:
        nn.LSTM(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        fastrnn.LSTM(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_dropout_of_one_layer_gets_torchs_warning_at_the_callers_line():
    with pytest.warns(UserWarning) as theirs:
        nn.LSTM(I, H, dropout=0.5)
    with pytest.warns(UserWarning) as ours:
        fastrnn.LSTM(I, H, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]


# --- construction, copies, files -----------------------------------------------------------------


@every_configuration
def test_the_same_seed_draws_the_same_weights(config):
    torch.manual_seed(5)
    theirs = nn.LSTM(I, H, **config)
    after_theirs = torch.get_rng_state()
    torch.manual_seed(5)
    ours = fastrnn.LSTM(I, H, **config)
    assert torch.equal(torch.get_rng_state(), after_theirs)
    assert [name for name, _ in ours.named_parameters()] == [
        n for n, _ in theirs.named_parameters()
    ]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(mine, other), name


def test_reset_parameters_draws_the_same_weights():
    def program(lstm):
        lstm.reset_parameters()
        return dict(lstm.named_parameters())

    assert_same(program, num_layers=2)


@every_configuration
@pytest.mark.parametrize("ours_first", [True, False], ids=["from-torch", "to-torch"])
def test_a_state_dict_goes_both_ways(config, ours_first):
    theirs, ours = nn.LSTM(I, H, **config), fastrnn.LSTM(I, H, **config)
    target, source = (ours, theirs) if ours_first else (theirs, ours)
    assert list(target.state_dict()) == list(source.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)
    x = make_input(ours)
    assert_close(ours(x), theirs(x))


def test_loading_a_state_dict_with_assign():
    def program(lstm):
        lstm(make_input(lstm))
        state = {name: torch.randn_like(p) for name, p in lstm.state_dict().items()}
        lstm.load_state_dict(state, assign=True)
        assert all(p.data_ptr() == state[name].data_ptr() for name, p in lstm.named_parameters())
        return lstm(make_input(lstm))

    assert_same(program)


def test_made_on_meta_then_loaded_with_assign():
    theirs, _ = make_pair(num_layers=2)
    ours = fastrnn.LSTM(I, H, num_layers=2, device="meta")
    assert all(p.is_meta for p in ours.parameters())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = make_input(ours)
    assert_close(ours(x), theirs(x))


def test_made_on_meta_then_to_empty_and_reset():
    def program(lstm):
        lstm = type(lstm)(I, H, device="meta").to_empty(device="cpu")
        lstm.reset_parameters()
        return lstm(make_input(lstm))

    assert_same(program)


def test_made_within_a_device_context():
    with torch.device("meta"):
        lstm = fastrnn.LSTM(I, H)
    assert all(p.is_meta for p in lstm.parameters())


def test_a_call_on_meta_gives_shapes():
    theirs, ours = make_pair(bidirectional=True, proj_size=2)
    x = torch.empty(T, B, I, device="meta")
    actual, expected = (tensors_of(lstm.to("meta")(x)) for lstm in (ours, theirs))
    assert [(t.shape, t.device.type) for t in actual] == [(t.shape, "meta") for t in expected]


def test_skip_init():
    lstm = nn.utils.skip_init(fastrnn.LSTM, I, H, num_layers=2, batch_first=True)
    assert type(lstm) is fastrnn.LSTM
    assert (lstm.num_layers, lstm.batch_first) == (2, True)
    theirs, _ = make_pair(num_layers=2, batch_first=True)
    lstm.load_state_dict(theirs.state_dict())
    x = make_input(lstm)
    assert_close(lstm(x), theirs(x))


@every_configuration
def test_repr_is_nn_lstms(config):
    theirs, ours = make_pair(**config)
    assert repr(ours) == repr(theirs)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("called_before", [False, True], ids=["fresh", "called-before"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same(copied, called_before):
    lstm = fastrnn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
    x = make_input(lstm)
    if called_before:
        lstm(x)[0].sum().backward()
    twin = copied(lstm)
    assert type(twin) is fastrnn.LSTM
    assert twin.backend == lstm.backend
    assert torch.equal(twin(x)[0], lstm(x)[0])


@pytest.mark.parametrize("copied", list(COPIES.values())[1:], ids=list(COPIES)[1:])
def test_a_copy_has_weights_of_its_own(copied):
    lstm = fastrnn.LSTM(I, H)
    x = make_input(lstm)
    twin = copied(lstm)
    before = twin(x)[0].detach()
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(5)
    assert torch.equal(twin(x)[0], before)
    assert not torch.equal(lstm(x)[0], before)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_deep_copy_of_a_parametrized_lstm_after_a_forward(parametrization):
    """nn.LSTM cannot: it keeps the computed weight, and torch copies no tensor with a history."""
    lstm = fastrnn.LSTM(I, H).eval()
    x = make_input(lstm)
    parametrization(lstm, "weight_hh_l0")
    output, _ = lstm(x)
    twin = copy.deepcopy(lstm)
    again, _ = twin(x)
    assert torch.equal(again, output)
    assert_close(gradients(again.sum(), twin), gradients(output.sum(), lstm))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_deep_copy_of_a_parametrized_lstm_after_a_change_of_dtype(parametrization):
    lstm = fastrnn.LSTM(I, H).eval()
    parametrization(lstm, "weight_hh_l0")
    lstm.double()
    x = make_input(lstm, torch.float64)
    assert torch.equal(copy.deepcopy(lstm)(x)[0], lstm(x)[0])


def test_a_deep_copy_with_a_plain_tensor_for_a_weight():
    lstm = fastrnn.LSTM(I, H)
    raw = lstm.weight_hh_l0
    del lstm.weight_hh_l0
    lstm.weight_hh_l0 = raw.detach() * 2
    x = make_input(lstm)
    output, _ = lstm(x)
    assert torch.equal(copy.deepcopy(lstm)(x)[0], output)


def test_pickling_a_parametrized_lstm_is_refused_as_torch_does():
    lstm = fastrnn.LSTM(I, H)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(lstm)


def test_loading_with_weights_only_needs_the_class_allowed_and_nothing_more_than_nn_lstm_does():
    theirs, ours = make_pair()
    files = {}
    for lstm in (theirs, ours):
        files[lstm] = io.BytesIO()
        torch.save(lstm, files[lstm])
    needed = {}
    for lstm, file in files.items():
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        needed[lstm] = {name for name in names if not name.endswith(".LSTM")}
    assert needed[ours] == needed[theirs]

    files[ours].seek(0)
    with torch.serialization.safe_globals([fastrnn.LSTM, set]):
        loaded = torch.load(files[ours], weights_only=True)
    x = make_input(ours)
    assert torch.equal(loaded(x)[0], ours(x)[0])


# --- torch's tools for weights -------------------------------------------------------------------


def test_functional_call():
    def program(lstm):
        weights = {n: (p.detach() * 2).requires_grad_() for n, p in lstm.named_parameters()}
        x = make_input(lstm)
        output, _ = torch.func.functional_call(lstm, weights, (x,))
        return output, torch.autograd.grad(output.sum(), list(weights.values())), lstm(x)

    assert_same(program)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_parametrization(parametrization):
    def program(lstm):
        lstm(make_input(lstm))
        parametrization(lstm, "weight_hh_l0")
        output, _ = lstm(make_input(lstm))
        d_weights = gradients(output.square().sum(), lstm)
        lstm.eval()
        parametrize.remove_parametrizations(lstm, "weight_hh_l0")
        return output, d_weights, lstm(make_input(lstm))

    assert_same(program)


def test_cached_parametrizations():
    def program(lstm):
        parametrizations.weight_norm(lstm, "weight_hh_l0")
        with parametrize.cached():
            return lstm(make_input(lstm))[0], lstm(make_input(lstm))[0]

    assert_same(program)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_by_hook():
    def program(lstm):
        nn.utils.weight_norm(lstm, "weight_hh_l0")
        output, _ = lstm(make_input(lstm))
        d_weights = gradients(output.square().sum(), lstm)
        with torch.no_grad():
            lstm.weight_hh_l0_g.mul_(2)
        again, _ = lstm(make_input(lstm))
        nn.utils.remove_weight_norm(lstm, "weight_hh_l0")
        return output, d_weights, again, lstm(make_input(lstm))

    assert_same(program)


def test_pruning():
    def program(lstm):
        prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
        output, _ = lstm(make_input(lstm))
        d_weights = gradients(output.square().sum(), lstm)
        prune.remove(lstm, "weight_hh_l0")
        return output, d_weights, lstm(make_input(lstm))

    assert_same(program)
