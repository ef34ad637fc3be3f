"""What programs in the wild do to an nn.LSTM works on a fastrnn.LSTM, with the same result."""

from __future__ import annotations

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fastrnn
from tests.pairs import (
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
    make_state,
    rows,
)

# --- how it is called ----------------------------------------------------------------------------


def test_input_by_keyword():
    assert_same(lambda lstm: lstm(input=make_input(lstm)))


def test_state_by_keyword():
    assert_same(lambda lstm: lstm(make_input(lstm), hx=make_state(lstm)))


def test_state_none_by_position():
    assert_same(lambda lstm: lstm(make_input(lstm), None))


def test_state_as_a_list():
    def program(lstm):
        _, (h_n, c_n) = lstm(make_input(lstm))
        return lstm(make_input(lstm), [h_n, c_n])

    assert_same(program)


@every_configuration
def test_forward_and_gradients_from_a_given_state(config):
    def program(lstm):
        x, (h_0, c_0) = make_input(lstm).requires_grad_(), make_state(lstm)
        h_0.requires_grad_()
        c_0.requires_grad_()
        output, (h_n, c_n) = lstm(x, (h_0, c_0))
        loss = output.square().sum() + h_n.sum() + (c_n * 2).sum()
        d_x, d_h_0, d_c_0 = torch.autograd.grad(loss, [x, h_0, c_0], retain_graph=True)
        return output, h_n, c_n, d_x, d_h_0, d_c_0, gradients(loss, lstm)

    assert_same(program, **config)


@every_configuration
def test_unsorted_packed_sequence_with_state(config):
    def program(lstm):
        x, (h_0, c_0) = make_input(lstm), make_state(lstm)
        h_0.requires_grad_()
        packed = pack_padded_sequence(x, [2, 6, 4], lstm.batch_first, enforce_sorted=False)
        output, (h_n, c_n) = lstm(packed, (h_0, c_0))
        loss = output.data.square().sum() + h_n.sum() + c_n.square().sum()
        (d_h_0,) = torch.autograd.grad(loss, [h_0], retain_graph=True)
        return output.data, h_n, c_n, d_h_0, gradients(loss, lstm)

    assert_same(program, **config)


def test_packed_output_has_the_inputs_order():
    packed = pack_sequence([torch.randn(n, I) for n in (2, 5, 3)], enforce_sorted=False)
    output = fastrnn.LSTM(I, H)(packed)[0]
    assert type(output) is PackedSequence
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., ::2],
        lambda x: torch.cat([x, x], 0)[::2],
        lambda x: x[:, :1].expand(-1, B, -1),
        lambda x: x.flip(0).as_strided(x.shape, (I * B, I, 1)),
    ],
    ids=["transposed", "every-2nd-feature", "every-2nd-step", "expanded", "as-strided"],
)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_non_contiguous_input(view, batch_first):
    def program(lstm):
        x = view(torch.randn(T, B, I)).requires_grad_()
        output, state = lstm(x)
        return output, state, torch.autograd.grad(output.square().sum(), x)

    assert_same(program, batch_first=batch_first)


def test_a_packed_sequence_of_non_contiguous_rows():
    def program(lstm):
        packed = pack_padded_sequence(make_input(lstm), [6, 4, 2])
        wide = torch.cat([packed.data, packed.data], 1)
        output, state = lstm(PackedSequence(wide[:, ::2], packed.batch_sizes))
        return output.data, state, gradients(output.data.square().sum(), lstm)

    assert_same(program)


def test_non_contiguous_states():
    def program(lstm):
        state = [torch.cat([s, s], -1)[..., ::2].requires_grad_() for s in make_state(lstm)]
        output, _ = lstm(make_input(lstm), state)
        return output, torch.autograd.grad(output.square().sum(), state)

    assert_same(program, num_layers=2)


def test_non_contiguous_weights():
    def program(lstm):
        for name, parameter in list(lstm.named_parameters()):
            wide = torch.stack([parameter.detach(), torch.randn_like(parameter)], -1)
            setattr(lstm, name, nn.Parameter(wide[..., 0]))
        output, _ = lstm(make_input(lstm))
        return output, gradients(output.square().sum(), lstm)

    assert_same(program, num_layers=2)


def test_one_initial_state_expanded_over_the_batch():
    """A learned initial state: one row, expanded with stride 0."""

    def program(lstm):
        h_0, c_0 = make_state(lstm, batch=1)
        h_0.requires_grad_()
        output, state = lstm(make_input(lstm), (h_0.expand(-1, B, -1), c_0.expand(-1, B, -1)))
        return output, state, torch.autograd.grad(output.sum(), h_0)

    assert_same(program)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inference_mode(packed):
    @torch.inference_mode()
    def program(lstm):
        x = make_input(lstm)
        if packed:
            x = pack_padded_sequence(x, [6, 4, 2])
        output, state = lstm(x, make_state(lstm))
        return rows(output), state

    assert_same(program, num_layers=2)


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        theirs, ours = make_pair()
        x = make_input(ours)
        assert_close(ours(x), theirs(x))


def test_training_after_a_call_in_inference_mode():
    def program(lstm):
        with torch.inference_mode():
            lstm(make_input(lstm))
        return gradients(lstm(make_input(lstm))[0].square().sum(), lstm)

    assert_same(program)


@every_configuration
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_float64_throughout(config, packed):
    def program(lstm):
        x, state = make_input(lstm, torch.float64), make_state(lstm, dtype=torch.float64)
        if packed:
            x = pack_padded_sequence(x, [6, 4, 2], lstm.batch_first)
        output, (h_n, c_n) = lstm(x, state)
        loss = rows(output).square().sum() + h_n.sum() + c_n.sum()
        return rows(output), h_n, c_n, gradients(loss, lstm)

    assert_same(program, dtype=torch.float64, **config)


def test_activation_checkpointing():
    def program(lstm):
        x = make_input(lstm).requires_grad_()
        output, _ = torch.utils.checkpoint.checkpoint(lstm, x, use_reentrant=False)
        return torch.autograd.grad(output.square().sum(), [x, *lstm.parameters()])

    assert_same(program, num_layers=2)


# --- what is done to the result ------------------------------------------------------------------

FORMS = {
    "padded": lambda x: x,
    "one-step": lambda x: x[:1],
    "one-sequence": lambda x: x[:, :1],
    "packed": lambda x: pack_padded_sequence(x, [6, 4, 2]),
    "packed-full": lambda x: pack_padded_sequence(x, [6, 6, 6]),
}


@every_configuration
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_zeroing_the_returned_state_in_place_changes_nothing_else(config, form):
    """Reinforcement learning zeroes the state of episodes that ended, with autograd on."""

    def program(lstm):
        output, (h_n, c_n) = lstm(form(make_input(lstm)))
        output = rows(output)
        before = output.detach().clone()
        h_n.zero_()
        c_n.zero_()
        return before, output, gradients(output.square().sum(), lstm)

    assert_same(program, **{**config, "batch_first": False})


@every_configuration
def test_zeroing_part_of_the_state_between_two_calls(config):
    def program(lstm):
        output, (h_n, c_n) = lstm(make_input(lstm))
        h_n[:, 1] = 0
        c_n[:, 1] = 0
        again, state = lstm(make_input(lstm), (h_n, c_n))
        loss = output.sum() + again.square().sum() + state[1].sum()
        return output, again, state, gradients(loss, lstm)

    assert_same(program, **config)


@every_configuration
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_returned_tensors_share_no_memory(config, form):
    lstm = fastrnn.LSTM(I, H, **{**config, "batch_first": False})
    state = make_state(lstm, batch=1 if form is FORMS["one-sequence"] else B)
    x = form(make_input(lstm))
    output, (h_n, c_n) = lstm(x, state)
    named = {"x": rows(x), "h_0": state[0], "c_0": state[1]}
    named |= {"output": rows(output), "h_n": h_n, "c_n": c_n}
    owners = {}
    for name, tensor in named.items():
        owners.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    assert [names for names in owners.values() if len(names) > 1] == []


def test_the_given_state_is_not_changed():
    lstm = fastrnn.LSTM(I, H)
    h_0, c_0 = make_state(lstm)
    before = h_0.clone(), c_0.clone()
    lstm(make_input(lstm), (h_0, c_0))
    assert torch.equal(h_0, before[0])
    assert torch.equal(c_0, before[1])


def test_detaching_the_state_in_place():
    """Truncated back-propagation as PyTorch's examples write it."""

    def program(lstm):
        _, state = lstm(make_input(lstm))
        for tensor in state:
            tensor.detach_()
        again, _ = lstm(make_input(lstm), state)
        return again, gradients(again.sum(), lstm)

    assert_same(program)


# --- what is done to the module ------------------------------------------------------------------


def test_flatten_parameters_before_each_forward():
    def program(lstm):
        results = []
        for _ in range(2):
            lstm.flatten_parameters()
            results.append(lstm(make_input(lstm))[0])
        return results

    assert_same(program)


def test_flatten_parameters_overwritten_on_the_object():
    def program(lstm):
        lstm.flatten_parameters = lambda *_: None
        return lstm.double().float()(make_input(lstm))

    assert_same(program)


def test_weight_drop():
    """AWD-LSTM: the recurrent weight is deleted, and a dropped-out one set before each call."""

    def program(lstm):
        raw = lstm.weight_hh_l0
        del lstm.weight_hh_l0
        results = []
        for _ in range(2):
            lstm.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
            output, _ = lstm(make_input(lstm))
            results.append((output, torch.autograd.grad(output.square().sum(), raw)))
        return results

    assert_same(program)


def test_weight_drop_through_the_parameter_dictionary():
    """fastai's: the parameter leaves `_parameters`, and setattr brings plain tensors."""

    def program(lstm):
        raw = lstm._parameters.pop("weight_hh_l0")
        lstm.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.detach()))
        lstm.weight_hh_l0 = raw.detach().clone()
        lstm(make_input(lstm))
        lstm.weight_hh_l0 = lstm.weight_hh_l0_raw * 0.5
        output, _ = lstm(make_input(lstm))
        return output, torch.autograd.grad(output.square().sum(), lstm.weight_hh_l0_raw)

    assert_same(program)


def test_writing_the_forget_bias_through_data():
    def program(lstm):
        before = lstm(make_input(lstm))
        lstm.bias_hh_l0.data[H : 2 * H].fill_(1)
        return before, lstm(make_input(lstm))

    assert_same(program)


def test_weights_written_under_no_grad():
    def program(lstm):
        before = lstm(make_input(lstm))
        with torch.no_grad():
            for name, parameter in lstm.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(parameter)
        return before, lstm(make_input(lstm))

    assert_same(program)


def test_weights_written_through_all_weights():
    def program(lstm):
        for weights in lstm.all_weights:
            for weight in weights:
                weight.data.mul_(2)
        return lstm(make_input(lstm))

    assert_same(program, num_layers=2)


def test_assigning_a_parameter():
    def program(lstm):
        lstm(make_input(lstm))
        lstm.weight_ih_l0 = nn.Parameter(torch.randn(4 * H, I))
        output, _ = lstm(make_input(lstm))
        return output, torch.autograd.grad(output.sum(), lstm.weight_ih_l0)

    assert_same(program)


def test_tied_weights_of_two_layers():
    def program(lstm):
        lstm.weight_hh_l1 = lstm.weight_hh_l0
        output, _ = lstm(make_input(lstm))
        return output, gradients(output.square().sum(), lstm)

    assert_same(program, num_layers=2)


def test_frozen_weights_with_input_that_needs_a_gradient():
    def program(lstm):
        lstm.requires_grad_(False)
        x = make_input(lstm).requires_grad_()
        return torch.autograd.grad(lstm(x)[0].square().sum(), x)

    assert_same(program, num_layers=2)


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0)], ids=["on", "off"])
def test_setting_dropout_after_construction(before, after):
    """With probability 1 the second layer sees zeros only, so nothing is left to chance."""

    def program(lstm):
        lstm.dropout = after
        output, state = lstm(make_input(lstm))
        return output, state, gradients(output.sum() + state[1].sum(), lstm)

    assert_same(program, num_layers=2, dropout=before)


def test_dropout_is_off_in_eval_mode():
    assert_same(lambda lstm: lstm.eval()(make_input(lstm)), num_layers=2, dropout=0.9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_changing_the_dtype_between_two_calls(dtype):
    theirs, ours = make_pair()
    x = make_input(ours)
    ours(x)
    actual = ours.to(dtype)(x.to(dtype))[0]
    assert actual.dtype == dtype
    expected = theirs.to(dtype)(x.to(dtype))[0]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_share_memory():
    lstm = fastrnn.LSTM(I, H).share_memory()
    assert all(p.is_shared() for p in lstm.parameters())
    assert lstm(make_input(lstm))[0].shape == (T, B, H)


def test_parameters_to_a_vector_and_back():
    def program(lstm):
        vector = nn.utils.parameters_to_vector(lstm.parameters())
        nn.utils.vector_to_parameters(vector * 2, lstm.parameters())
        return vector, lstm(make_input(lstm))

    assert_same(program)


def test_averaged_model():
    def program(lstm):
        averaged = torch.optim.swa_utils.AveragedModel(lstm)
        averaged.update_parameters(lstm)
        with torch.no_grad():
            lstm.weight_hh_l0.mul_(3)
        averaged.update_parameters(lstm)
        return averaged(make_input(lstm))

    assert_same(program)


def test_training_with_an_optimizer():
    def program(lstm):
        optimizer = torch.optim.Adam(lstm.parameters(), lr=0.01)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = lstm(make_input(lstm))[0].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, dict(lstm.named_parameters())

    assert_same(program)


def test_hooks_see_the_call():
    def program(lstm):
        seen = []
        lstm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        lstm.register_forward_hook(lambda m, args, result: seen.append(result[0].detach()))
        lstm.register_full_backward_hook(lambda m, d_in, d_out: seen.append(d_in[0]))
        lstm(make_input(lstm).requires_grad_())[0].square().sum().backward()
        assert len(seen) == 3
        return [tensor.detach() for tensor in seen]

    assert_same(program)


# --- what is done to the class -------------------------------------------------------------------


class DoublesInput:
    """A mixin that knows only that there is a forward above it."""

    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


def test_a_mixin_before_the_class():
    def program(lstm):
        mixed = type("Mixed", (DoublesInput, type(lstm)), {})(I, H)
        mixed.load_state_dict(lstm.state_dict())
        return mixed(make_input(lstm))

    assert_same(program)


def test_a_mixin_over_rnn_base():
    """allennlp and others write classes against nn.RNNBase."""

    class Described:
        def describe(self):
            assert isinstance(self, nn.RNNBase)
            return f"{self.mode} {self.input_size} {self.hidden_size} {self.num_layers}"

    mixed = type("Mixed", (fastrnn.LSTM, Described), {})(I, H, 2)
    assert mixed.describe() == f"LSTM {I} {H} 2"


def test_a_subclass_that_passes_arguments_on():
    def program(lstm):
        cls = type(lstm)

        class Stacked(cls):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.norm = nn.LayerNorm(H)

            def forward(self, input, hx=None):
                output, state = super().forward(input, hx)
                return self.norm(output), state

        stacked = Stacked(I, H, 1, True, batch_first=True)
        stacked.load_state_dict(lstm.state_dict(), strict=False)
        return stacked(torch.randn(B, T, I))

    assert_same(program)


def test_a_class_made_from_a_copy_of_the_classs_dictionary():
    """Zero-argument super() would fail in a copied method; nn.LSTM's own does."""
    namespace = {
        k: v for k, v in vars(fastrnn.LSTM).items() if k not in ("__dict__", "__weakref__")
    }
    copied = type("Copied", (nn.RNNBase,), namespace)(I, H, num_layers=2, bidirectional=True)
    theirs, ours = make_pair(num_layers=2, bidirectional=True)
    copied.load_state_dict(ours.state_dict())
    x = make_input(ours)
    packed = pack_padded_sequence(x, [6, 4, 2])
    assert_close(copied(x), theirs(x))
    assert_close(copied(packed)[0].data, theirs(packed)[0].data)
    assert "Copied(4, 5" in repr(copied)
    copy.deepcopy(copied)(x)


# --- several devices, processes, threads ---------------------------------------------------------


def test_a_data_parallel_replica():
    """What nn.DataParallel makes for each device: no parameters, only tensors with a history."""

    def program(lstm):
        replica = lstm._replicate_for_data_parallel()
        for name, parameter in lstm.named_parameters():
            setattr(replica, name, parameter * 1)
        assert not list(replica.parameters())
        output, _ = replica(make_input(lstm))
        return output, gradients(output.square().sum(), lstm), lstm(make_input(lstm))

    assert_same(program, num_layers=2)


def test_data_parallel():
    assert_same(lambda lstm: nn.DataParallel(lstm)(make_input(lstm)))


def train_on_one_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    pair = make_pair(num_layers=2, bidirectional=True)
    torch.manual_seed(rank)
    lengths = [6, 4, 2] if rank else [5, 5, 1]
    x = pack_padded_sequence(torch.randn(T, B, I), lengths)
    theirs, ours = (nn.parallel.DistributedDataParallel(lstm) for lstm in pair)
    for lstm in (theirs, ours):
        output, (h_n, _) = lstm(x)
        (output.data.square().sum() + h_n.sum()).backward()
    d_ours, d_theirs = ({n: p.grad for n, p in lstm.named_parameters()} for lstm in (ours, theirs))
    assert_close(d_ours, d_theirs)
    of_all_ranks = [torch.empty_like(d_ours["module.weight_hh_l0"]) for _ in range(2)]
    torch.distributed.all_gather(of_all_ranks, d_ours["module.weight_hh_l0"])
    assert torch.equal(*of_all_ranks), "the ranks disagree, so nothing was averaged"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # About one run in thirty aborted ("terminate called without an active exception"), most likely
    # where a thread of gloo's meets Python's shutdown. So leave without one.
    os._exit(0)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(train_on_one_rank, args=(tmp_path / "store",), nprocs=2)


class RunsInWorker(torch.utils.data.Dataset):
    """A data set whose items are made by an LSTM: a frozen encoder, for instance."""

    def __init__(self, lstm, x):
        self.lstm, self.x = lstm, x

    def __len__(self):
        return 2

    @torch.no_grad()
    def __getitem__(self, index):
        return self.lstm(self.x[index])[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_loader_whose_forked_workers_run_it(workers):
    lstm = fastrnn.LSTM(I, H, batch_first=True)
    x = torch.randn(2, B, T, I)
    expected = torch.stack([lstm(x[i])[0].detach() for i in range(2)])
    lstm(x[0])[0].sum().backward()  # whatever threads and caches that makes, the fork sees them
    loader = torch.utils.data.DataLoader(
        RunsInWorker(lstm, x),
        batch_size=2,
        num_workers=workers,
        multiprocessing_context="fork",
        timeout=60,
    )
    (batch,) = loader
    assert_close(batch, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_module_in_many_threads(packed):
    lstm = fastrnn.LSTM(I, H, num_layers=2)
    inputs = [torch.randn(T + i, B, I) for i in range(8)]

    def train(x):
        lengths = [len(x), len(x) - 2, 1]
        output, (h_n, _) = lstm(pack_padded_sequence(x, lengths) if packed else x)
        loss = rows(output).square().sum() + h_n.sum()
        return rows(output).detach(), gradients(loss, lstm)

    expected = [train(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(train, inputs * 4))
    for result, reference in zip(actual, expected * 4):
        assert_close(result, reference)


# --- TorchScript ---------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.lstm = fastrnn.LSTM(I, H, **config)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("config", [{}, {"num_layers": 2}, {"dtype": torch.float64}])
def test_scripting(config):
    model, x = Encoder(**config), torch.randn(T, B, I, dtype=config.get("dtype"))
    expected = model(x)
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_close(scripted(x), expected)
    assert_close(torch.jit.load(file)(x), expected)


def test_a_scripted_model_shares_the_parameters():
    model, x = Encoder(), torch.randn(T, B, I)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        model.lstm.weight_hh_l0.mul_(3)
    assert_close(scripted(x), model(x))


def test_converting_again_undoes_what_scripting_does_to_the_model():
    """torch.jit.script leaves what it compiles in the place of what was there."""
    model, x = Encoder(), torch.randn(T, B, I)
    expected, parameters = model(x), list(model.parameters())
    torch.jit.script(model)
    assert type(model.lstm) is nn.LSTM
    assert fastrnn.convert(model) == 1
    assert_close(model(x), expected)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_scripting_the_module_itself():
    theirs, ours = make_pair()
    x = make_input(ours)
    scripted, reference = torch.jit.script(ours), torch.jit.script(theirs)
    assert_close(scripted.forward__0(x), reference.forward__0(x))
    packed = pack_padded_sequence(x, [6, 4, 2])
    assert_close(scripted.forward__1(packed)[0].data, reference.forward__1(packed)[0].data)
    assert type(ours) is fastrnn.LSTM
    assert_close(ours(x), theirs(x))


class PolicyExporter(nn.Module):
    """What rsl_rl makes of a recurrent policy: the state in buffers, and a scripted reset."""

    def __init__(self, rnn, actor):
        super().__init__()
        self.actor, self.rnn = copy.deepcopy(actor), copy.deepcopy(rnn).cpu()
        for name in ("hidden_state", "cell_state"):
            self.register_buffer(name, torch.zeros(self.rnn.num_layers, 1, self.rnn.hidden_size))

    def forward(self, x):
        x, (h, c) = self.rnn(x.unsqueeze(0), (self.hidden_state, self.cell_state))
        self.hidden_state[:] = h
        self.cell_state[:] = c
        return self.actor(x.squeeze(0))

    @torch.jit.export
    def reset(self):
        self.hidden_state[:] = 0.0
        self.cell_state[:] = 0.0


def test_exporting_a_recurrent_policy(tmp_path):
    actor, results = nn.Linear(H, 2), []
    x = torch.randn(T, 1, I)
    for rnn in make_pair():
        exporter = PolicyExporter(rnn, actor).to("cpu")
        torch.jit.script(exporter).save(str(tmp_path / "policy.pt"))
        policy = torch.jit.load(str(tmp_path / "policy.pt"))
        with torch.no_grad():
            acted = [policy(step) for step in x]
            policy.reset()
            results.append([*acted, policy(x[0])])
    assert_close(*results)
    assert_close(results[1][0], results[1][-1])


def test_scripting_a_subclass_is_refused_with_the_way_out():
    mixed = type("Mixed", (DoublesInput, fastrnn.LSTM), {})(I, H)
    with pytest.raises(RuntimeError, match=r"cannot compile Mixed.*use torch\.export"):
        torch.jit.script(mixed)


def test_scripting_works_after_revert():
    model = Encoder()
    x = torch.randn(T, B, I)
    expected = model(x)
    fastrnn.revert(model)
    assert_close(torch.jit.script(model)(x), expected)


traces = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@traces
def test_tracing():
    model, x = Encoder(), torch.randn(T, B, I)
    traced = torch.jit.trace(model, x)
    again = torch.randn(T, B, I)
    assert_close(traced(again), model(again))


@traces
def test_a_traced_model_shares_the_parameters():
    model, x = Encoder(), torch.randn(T, B, I)
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        model.lstm.weight_hh_l0.mul_(3)
    assert_close(traced(x), model(x))


@traces
def test_tracing_a_subclass():
    mixed, x = type("Mixed", (DoublesInput, fastrnn.LSTM), {})(I, H), torch.randn(T, B, I)
    assert_close(torch.jit.trace(mixed, x)(x), mixed(x))


@traces
def test_hooks_run_once_under_tracing():
    model, x = Encoder(), torch.randn(T, B, I)
    model.lstm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_close(torch.jit.trace(model, x)(x), model(x))


@traces
def test_tracing_with_lengths_is_refused_with_the_way_out():
    lstm, x, lengths = fastrnn.LSTM(I, H), torch.randn(T, B, I), torch.tensor([6, 4, 2])
    with pytest.raises(RuntimeError, match=r"torch\.export, or trace fastrnn\.revert"):
        torch.jit.trace(lambda x: lstm(x, lengths=lengths)[0], x)


# --- torch.fx ------------------------------------------------------------------------------------


class RaggedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(I, I), fastrnn.LSTM(I, H)])

    def forward(self, x, lengths):
        output, (h_n, _) = self.parts[1](self.parts[0](x), lengths=lengths)
        return output + h_n


def test_symbolic_tracing_makes_one_node_of_it():
    model, x = Encoder(), torch.randn(T, B, I)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["lstm"]
    assert traced.lstm is model.lstm
    assert_close(traced(x), model(x))


def test_symbolic_tracing_with_lengths():
    model, lengths = RaggedEncoder(), torch.tensor([6, 4, 2])
    x = torch.randn(T, B, I)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["parts.0", "parts.1"]
    assert_close(traced(x, lengths), model(x, lengths))


@pytest.mark.parametrize("hooked", [False, True], ids=["itself", "hooked"])
def test_what_symbolic_tracing_cannot_do_names_the_tracer(hooked):
    model = Encoder()
    model.lstm.register_forward_hook(lambda module, args, result: result)
    with pytest.raises(torch.fx.proxy.TraceError, match=r"Tracer whose is_leaf_module says True"):
        torch.fx.symbolic_trace(model if hooked else fastrnn.LSTM(I, H))
