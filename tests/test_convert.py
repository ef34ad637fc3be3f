"""fastrnn.convert: a model of somebody else gets fastrnn in place, and loses it again."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from fastrnn.convert import from_torch, to_torch

TORCH_LSTM = nn.LSTM
TORCH_CLIP = nn.utils.clip_grad_norm_
PATCHED_NAMES = [
    (torch.nn, "LSTM"),
    (torch.nn.modules, "LSTM"),
    (torch.nn.modules.rnn, "LSTM"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils.clip_grad, "clip_grad_norm_"),
]
CONFIGURATIONS = {
    "plain": {},
    "2-layers-dropout": {"num_layers": 2, "dropout": 0.3},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "no-bias-batch-first": {"bias": False, "batch_first": True},
    "float64": {"dtype": torch.float64},
}


class Tagger(nn.Module):
    def __init__(self, **lstm):
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.lstm = nn.LSTM(3, 5, **lstm)
        self.head = nn.Linear(5, 4)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


@pytest.fixture
def tokens():
    return torch.randint(9, (6, 2))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# --- what convert does ---------------------------------------------------------------------------


def test_every_lstm_of_a_model_is_converted_and_counted():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 3))})
    assert fastrnn.convert(model) == 2
    assert type(model["a"]) is fastrnn.LSTM
    assert type(model["b"][1]) is fastrnn.LSTM


def test_a_second_convert_finds_nothing():
    model = Tagger()
    fastrnn.convert(model)
    assert fastrnn.convert(model) == 0


def test_other_recurrent_modules_are_left_alone():
    model = nn.ModuleList([nn.GRU(2, 3), nn.RNN(2, 3), nn.LSTMCell(2, 3)])
    assert fastrnn.convert(model) == 0
    assert [type(m) for m in model] == [nn.GRU, nn.RNN, nn.LSTMCell]


def test_a_converted_model_computes_the_same(tokens):
    model = Tagger(num_layers=2)
    expected = model(tokens)
    fastrnn.convert(model)
    close(model(tokens), expected)


def test_a_converted_model_has_the_same_gradients(tokens):
    model = Tagger()
    reference = copy.deepcopy(model)
    fastrnn.convert(model)
    model(tokens).square().sum().backward()
    reference(tokens).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_converted_module_is_like_one_made_by_the_constructor(config):
    """Catches attributes that fastrnn.LSTM has and convert does not know of."""
    model = nn.Sequential(nn.LSTM(3, 5, **config))
    fastrnn.convert(model)
    made = fastrnn.LSTM(3, 5, **config)
    assert vars(model[0]).keys() == vars(made).keys()
    assert model[0].backend == made.backend
    assert repr(model[0]) == repr(made)


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_reverted_module_is_like_one_made_by_the_constructor(config):
    model = nn.Sequential(fastrnn.LSTM(3, 5, **config))
    assert fastrnn.revert(model) == 1
    assert type(model[0]) is nn.LSTM
    assert vars(model[0]).keys() == vars(nn.LSTM(3, 5, **config)).keys()


def test_revert_undoes_convert(tokens):
    model = Tagger()
    expected = model(tokens)
    fastrnn.convert(model)
    assert fastrnn.revert(model) == 1
    assert type(model.lstm) is nn.LSTM
    assert torch.equal(model(tokens), expected)


def test_parameters_stay_the_same_objects():
    model = Tagger()
    before = dict(model.named_parameters())
    fastrnn.convert(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_an_optimizer_made_before_goes_on_training(tokens):
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.lstm.weight_hh_l0.detach().clone()
    fastrnn.convert(model)
    expected = model(tokens)
    expected.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.lstm.weight_hh_l0, before)
    assert not torch.equal(model(tokens), expected)


def test_converting_draws_no_random_numbers():
    model = Tagger()
    state = torch.get_rng_state()
    fastrnn.convert(model)
    assert torch.equal(torch.get_rng_state(), state)


# --- where the module sits -----------------------------------------------------------------------


def quantized_lstms(model):
    kind = torch.ao.nn.quantized.dynamic.LSTM
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*quantiz.* deprecated")
def test_a_converted_lstm_is_no_nn_lstm_so_quantisation_needs_revert_first(tokens):
    """The recipe of convert's docstring."""
    model = Tagger().eval()
    expected = model(tokens)
    fastrnn.convert(model)
    assert not isinstance(model.lstm, nn.LSTM)
    assert isinstance(model.lstm, nn.RNNBase)
    assert model.lstm.mode == "LSTM"
    passed_by = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert quantized_lstms(passed_by) == 0
    fastrnn.revert(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert quantized_lstms(quantized) == 1
    torch.testing.assert_close(quantized(tokens), expected, rtol=0, atol=0.05)


def test_a_module_under_two_names_is_converted_once():
    shared = nn.LSTM(3, 3)
    model = nn.Sequential(shared, nn.Identity(), shared)
    assert fastrnn.convert(model) == 1
    assert model[0] is model[2]
    assert type(model[2]) is fastrnn.LSTM


def test_a_module_under_two_parents_stays_shared():
    shared = nn.LSTM(3, 3)
    model = nn.ModuleDict({"encoder": nn.Sequential(shared), "decoder": nn.Sequential(shared)})
    assert fastrnn.convert(model) == 1
    assert model["encoder"][0] is model["decoder"][0]
    assert type(model["encoder"][0]) is fastrnn.LSTM


def test_a_reference_outside_the_module_tree_sees_the_conversion():
    model = Tagger()
    held = [model.lstm]
    fastrnn.convert(model)
    assert held[0] is model.lstm
    assert type(held[0]) is fastrnn.LSTM


def test_the_model_itself_may_be_the_lstm():
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    assert fastrnn.convert(lstm) == 1
    assert type(lstm) is fastrnn.LSTM
    close(lstm(x)[0], expected)


def test_a_model_wrapped_in_data_parallel_is_converted_within():
    model = nn.DataParallel(Tagger())
    assert fastrnn.convert(model) == 1
    assert type(model.module.lstm) is fastrnn.LSTM


@pytest.mark.parametrize("function", [fastrnn.convert, fastrnn.revert])
@pytest.mark.parametrize("thing", [[nn.LSTM(2, 2)], nn.LSTM, None], ids=["list", "class", "None"])
def test_what_is_not_a_module_is_refused(function, thing):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got builtins\."):
        function(thing)


# --- what the module carries ---------------------------------------------------------------------


def test_the_training_flag_is_kept():
    model = nn.Sequential(nn.LSTM(3, 4), nn.LSTM(4, 4).eval())
    fastrnn.convert(model)
    assert [m.training for m in model] == [True, False]


def test_frozen_parameters_stay_frozen():
    model = Tagger()
    model.lstm.weight_hh_l0.requires_grad_(False)
    fastrnn.convert(model)
    frozen = [name for name, p in model.lstm.named_parameters() if not p.requires_grad]
    assert frozen == ["weight_hh_l0"]


def test_attributes_and_buffers_of_the_user_are_kept():
    model = Tagger()
    model.lstm.language = "de"
    model.lstm.register_buffer("mean", torch.ones(3))
    fastrnn.convert(model)
    assert model.lstm.language == "de"
    assert torch.equal(model.state_dict()["lstm.mean"], torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_the_dtype_is_kept(dtype):
    model = Tagger().to(dtype)
    fastrnn.convert(model)
    assert {p.dtype for p in model.lstm.parameters()} == {dtype}
    assert model(torch.randint(9, (4, 2))).dtype == dtype


def test_a_model_on_meta_stays_on_meta():
    with torch.device("meta"):
        model = Tagger()
    assert fastrnn.convert(model) == 1
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_weight_that_is_not_a_parameter_is_kept_and_used():
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    weight = lstm.weight_hh_l0.detach() * 2
    del lstm.weight_hh_l0
    lstm.weight_hh_l0 = weight
    expected = lstm(x)[0]
    fastrnn.convert(lstm)
    assert lstm.weight_hh_l0 is weight
    close(lstm(x)[0], expected)


def test_a_weight_with_a_history_survives_convert_and_revert():
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    raw = lstm.weight_hh_l0
    del lstm.weight_hh_l0
    lstm.weight_hh_l0 = raw * 2
    expected = lstm(x)[0]
    fastrnn.convert(lstm)
    close(lstm(x)[0], expected)
    fastrnn.revert(lstm)
    close(lstm(x)[0], expected)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "state_dict": lambda m, seen: m.register_state_dict_post_hook(lambda *_: seen.append(1)),
    "load_state_dict": lambda m, seen: m.register_load_state_dict_post_hook(
        lambda *_: seen.append(1)
    ),
}


def use_every_hook(model):
    model(torch.randint(9, (4, 2))).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_still_fire_and_can_be_removed(register):
    model, seen = Tagger(), []
    handle = register(model.lstm, seen)
    fastrnn.convert(model)
    use_every_hook(model)
    assert seen == [1]
    handle.remove()
    use_every_hook(model)
    assert seen == [1]


def test_a_forward_overwritten_on_the_object_is_left_alone():
    model = Tagger()
    model.lstm.forward = lambda x: (x, None)
    assert fastrnn.convert(model) == 0
    assert type(model.lstm) is nn.LSTM


def test_a_subclass_is_left_alone():
    class Bounded(nn.LSTM):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1))

    model = nn.Sequential(Bounded(3, 4))
    assert fastrnn.convert(model) == 0
    assert type(model[0]) is Bounded


def test_a_subclass_of_ours_is_not_reverted():
    class Mine(fastrnn.LSTM):
        pass

    model = nn.Sequential(Mine(3, 4))
    assert fastrnn.revert(model) == 0
    assert type(model[0]) is Mine


# --- parametrizations and their like -------------------------------------------------------------


def parametrized():
    lstm = nn.LSTM(3, 4)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    return lstm


def test_a_parametrized_lstm_is_converted_with_its_parametrization():
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    assert fastrnn.convert(lstm) == 1
    assert isinstance(lstm, fastrnn.LSTM)
    assert parametrize.is_parametrized(lstm, "weight_hh_l0")
    close(lstm(x)[0], expected)


def test_a_parametrized_lstm_is_reverted_with_its_parametrization():
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    fastrnn.convert(lstm)
    assert fastrnn.revert(lstm) == 1
    assert isinstance(lstm, nn.LSTM)
    assert torch.equal(lstm(x)[0], expected)


def test_gradients_reach_a_parametrization_after_convert():
    lstm = parametrized()
    fastrnn.convert(lstm)
    lstm(torch.randn(5, 2, 3))[0].sum().backward()
    originals = lstm.parametrizations["weight_hh_l0"]
    assert originals.original0.grad.abs().sum() > 0
    assert originals.original1.grad.abs().sum() > 0


def test_removing_a_parametrization_after_convert_leaves_a_fastrnn_lstm():
    lstm = parametrized()
    fastrnn.convert(lstm)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert type(lstm) is fastrnn.LSTM
    assert isinstance(lstm.weight_hh_l0, nn.Parameter)


def test_a_second_tensor_can_be_parametrized_after_convert():
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    fastrnn.convert(lstm)
    parametrizations.weight_norm(lstm, "weight_ih_l0")
    assert lstm(x)[0].shape == (5, 2, 4)
    assert parametrize.is_parametrized(lstm, "weight_ih_l0")


@pytest.mark.parametrize("back", [False, True], ids=["converted", "reverted"])
def test_a_parametrized_lstm_can_be_deep_copied(back):
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    fastrnn.convert(lstm)
    if back:
        fastrnn.revert(lstm)
    twin = copy.deepcopy(lstm)
    assert torch.equal(twin(x)[0], lstm(x)[0])
    assert twin.parametrizations is not lstm.parametrizations


def test_a_parametrized_lstm_that_was_called_before_convert_can_be_deep_copied():
    """nn.LSTM keeps the computed weight, which cannot be copied; fastrnn must not inherit it."""
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    lstm(x)
    fastrnn.convert(lstm)
    assert torch.equal(copy.deepcopy(lstm)(x)[0], lstm(x)[0])


def test_converting_one_parametrized_lstm_leaves_another_alone():
    one, other = parametrized(), parametrized()
    fastrnn.convert(one)
    assert not isinstance(other, fastrnn.LSTM)


def test_pruning_is_kept():
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    expected = lstm(x)[0]
    fastrnn.convert(lstm)
    close(lstm(x)[0], expected)
    prune.remove(lstm, "weight_hh_l0")
    close(lstm(x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_by_hook_is_kept():
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    nn.utils.weight_norm(lstm, "weight_hh_l0")
    fastrnn.convert(lstm)
    before = lstm(x)[0]
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(2)
    after = lstm(x)[0]
    assert not torch.equal(before, after)
    fastrnn.revert(lstm)
    close(lstm(x)[0], after)


# --- one module at a time ------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize(
    ("made", "twin_of", "expected"),
    [(TORCH_LSTM, from_torch, fastrnn.LSTM), (fastrnn.LSTM, to_torch, TORCH_LSTM)],
    ids=["from_torch", "to_torch"],
)
def test_a_twin_has_the_other_class_and_the_same_parameters(made, twin_of, expected, config):
    lstm = made(3, 5, **config)
    twin = twin_of(lstm)
    assert type(lstm) is made
    assert type(twin) is expected
    assert list(twin._parameters) == list(lstm._parameters)
    assert all(a is b for a, b in zip(twin.parameters(), lstm.parameters()))


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_twin_computes_the_same(config):
    lstm = nn.LSTM(3, 5, **config).eval()
    twin = from_torch(lstm)
    x = torch.randn(4, 2, 3, dtype=config.get("dtype"))
    close(twin(x)[0], lstm(x)[0])


def test_a_twin_has_registries_of_its_own():
    lstm = nn.LSTM(3, 4)
    twin = from_torch(lstm)
    twin.register_buffer("mean", torch.ones(3))
    twin.register_forward_hook(lambda *_: None)
    del twin.weight_hh_l0
    assert not hasattr(lstm, "mean")
    assert not lstm._forward_hooks
    assert hasattr(lstm, "weight_hh_l0")


def test_a_twin_of_a_parametrized_lstm_shares_the_parametrization():
    lstm, x = parametrized(), torch.randn(5, 2, 3)
    twin = from_torch(lstm)
    assert isinstance(twin, fastrnn.LSTM)
    assert not isinstance(lstm, fastrnn.LSTM)
    assert twin.parametrizations is lstm.parametrizations
    close(twin(x)[0], lstm(x)[0])


@pytest.mark.parametrize(
    "thing", [nn.GRU(2, 3), nn.Sequential(nn.LSTM(2, 3)), None], ids=["GRU", "model", "None"]
)
def test_from_torch_refuses_what_is_not_an_lstm(thing):
    with pytest.raises(TypeError, match=r"from_torch expects an nn\.LSTM .*, got "):
        from_torch(thing)


def test_to_torch_refuses_an_nn_lstm():
    with pytest.raises(TypeError, match=r"to_torch expects a fastrnn\.LSTM .*, got torch\."):
        to_torch(nn.LSTM(2, 3))


# --- patched -------------------------------------------------------------------------------------


def current_names():
    return [getattr(owner, name) for owner, name in PATCHED_NAMES]


ORIGINALS = current_names()


def test_importing_fastrnn_patches_nothing():
    code = (
        "import torch\n"
        "before = torch.nn.LSTM, torch.nn.utils.clip_grad_norm_, torch.nn.modules.rnn.LSTM\n"
        "import fastrnn, fastrnn.convert\n"
        "assert before == "
        "(torch.nn.LSTM, torch.nn.utils.clip_grad_norm_, torch.nn.modules.rnn.LSTM)\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("index", range(5), ids=[f"{o.__name__}.{n}" for o, n in PATCHED_NAMES])
def test_each_name_is_ours_inside_and_torchs_after(index):
    owner, name = PATCHED_NAMES[index]
    with fastrnn.patched():
        assert getattr(owner, name) is getattr(fastrnn, name)
    assert getattr(owner, name) is ORIGINALS[index]


def test_a_model_built_inside_keeps_fastrnn(tokens):
    with fastrnn.patched():
        model = Tagger()
    assert type(model.lstm) is fastrnn.LSTM
    assert model(tokens).shape == (6, 2, 4)


def test_a_model_built_inside_draws_the_same_weights():
    torch.manual_seed(3)
    expected = Tagger().state_dict()
    torch.manual_seed(3)
    with fastrnn.patched():
        actual = Tagger().state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_an_exception_inside_restores_torch():
    with pytest.raises(ZeroDivisionError), fastrnn.patched():
        1 / 0  # noqa: B018
    assert current_names() == ORIGINALS


def test_blocks_can_be_nested():
    with fastrnn.patched():
        with fastrnn.patched():
            pass
        assert nn.LSTM is fastrnn.LSTM
    assert current_names() == ORIGINALS


def test_it_can_decorate_a_function():
    @fastrnn.patched()
    def build():
        return nn.LSTM(2, 3)

    assert type(build()) is fastrnn.LSTM
    assert type(build()) is fastrnn.LSTM
    assert current_names() == ORIGINALS


def test_overlapping_blocks_of_two_threads_restore_torch():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with fastrnn.patched():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fastrnn.patched():
        thread.start()
        assert inside.wait(10)
    assert nn.LSTM is fastrnn.LSTM, "the other thread's block has not ended"
    leave.set()
    thread.join()
    assert current_names() == ORIGINALS


# fastrnn's clip may take torch's own path where it has none, and must not come back to itself then.
@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["float32", "complex64"])
def test_clipping_inside_gives_torchs_result(norm_type, dtype):
    gradients = [torch.randn(3, 4, dtype=dtype), torch.randn(5, 7, dtype=dtype)[:, ::2]]

    def parameters():
        made = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for parameter, gradient in zip(made, gradients):
            parameter.grad = gradient.clone()
        return made

    ours, theirs = parameters(), parameters()
    expected = TORCH_CLIP(theirs, 0.1, norm_type)
    with fastrnn.patched():
        actual = nn.utils.clip_grad_norm_(ours, 0.1, norm_type)
    close(actual, expected)
    for mine, other in zip(ours, theirs):
        close(mine.grad, other.grad)


def test_clipping_sparse_gradients_inside_does_what_torch_does():
    """Which is an error up to 2.13."""

    def outcome(clip):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=True)
        model(torch.tensor([1, 3, 1])).square().sum().backward()
        try:
            return clip(model.parameters(), 0.1), model.weight.grad.to_dense()
        except NotImplementedError as error:
            return str(error)

    expected = outcome(TORCH_CLIP)
    with fastrnn.patched():
        found = outcome(nn.utils.clip_grad_norm_)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert all(map(torch.equal, found, expected))


def test_convert_and_revert_work_inside():
    lstm = TORCH_LSTM(3, 4)
    with fastrnn.patched():
        assert fastrnn.convert(lstm) == 1
        assert fastrnn.revert(lstm) == 1
    assert type(lstm) is TORCH_LSTM


def test_a_forward_inside_computes_as_outside():
    lstm, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    with fastrnn.patched():
        actual = lstm(x)[0]
    assert torch.equal(actual, expected)
