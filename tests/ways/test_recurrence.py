"""The recurrence: the rule chooses a path, all paths agree, backward is complete and repeatable."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import compute, layer
from fastrnn.cells import lstm as lstm_cell
from fastrnn.choosing import costs
from fastrnn.choosing.arrange import Work
from fastrnn.ways import rectangles, torch_lstm
from tests.oracle import (
    PATHS,
    answer,
    as_function,
    assert_agree,
    assert_identical,
    by_list,
    every_configuration,
    every_path,
    everything,
    forced,
    make_state,
    valid_steps,
    without_onednn,
)

B, T, I, H = 4, 6, 3, 5
MASK = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6
LENGTHS = [3, 6, 1, 5]


def make(dtype=torch.float32, **config):
    return fastrnn.LSTM(I, H, dtype=dtype, **config)


def ragged_call(lstm, x, hx):
    return by_list(lstm, x, hx, LENGTHS)


def problem(lstm):
    return torch.randn(T, B, I, dtype=lstm.weight_ih_l0.dtype), make_state(lstm, B)


# --- which path runs -----------------------------------------------------------------------------


@pytest.fixture
def calls():
    """How often each path's forward runs."""
    seen = {"loop": 0, "rectangles": 0, "padded": 0, "torch": 0}

    def counted(name, function):
        def run(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return run

    loop = counted("loop", lstm_cell.lstm_forward)
    rects = counted("rectangles", rectangles._run_direction)
    padded = counted("padded", compute.run_padded)
    rows = counted("padded", layer.run_dense_rows)
    torchs = counted("torch", torch_lstm.run_rows)
    with (
        mock.patch.object(lstm_cell, "lstm_forward", loop),
        mock.patch.object(rectangles, "_run_direction", rects),
        mock.patch.object(compute, "run_padded", padded),
        mock.patch.object(layer, "run_dense_rows", rows),
        mock.patch.object(torch_lstm, "run_rows", torchs),
    ):
        yield seen


def loop_takes(seconds, monkeypatch):
    found, cost = costs.costs_of, costs.LayerCosts(seconds, 0.0, 0.0)
    changed = {"loop": cost, "packed": cost}
    monkeypatch.setattr(costs, "costs_of", lambda *args: found(*args)._replace(**changed))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("loop_seconds", "padding", "path"),
    [(0.0, False, "loop"), (math.inf, False, "rectangles"), (0.0, True, "padded")],
    ids=["loop", "rectangles", "padded"],
)
def test_the_cheapest_path_runs(calls, loop_seconds, padding, path, train, monkeypatch):
    loop_takes(loop_seconds, monkeypatch)
    monkeypatch.setattr(Work, "pad", lambda *_: padding)
    with torch.set_grad_enabled(train):
        make()(torch.randn(T, B, I), lengths=LENGTHS)
    if path == "loop" and not train:  # whose loop in C++ is the faster one forward
        path = "torch"
    assert {name: count for name, count in calls.items() if count} == {path: 1}


def test_the_rule_asks_for_the_cost_of_training_where_there_will_be_a_backward(monkeypatch):
    asked = []

    def costs_of(*args):
        asked.append(args[2])
        return found(*args)

    found = costs.costs_of
    monkeypatch.setattr(costs, "costs_of", costs_of)
    monkeypatch.setattr(Work, "pad", lambda *_: False)
    lstm, x = make(), torch.randn(T, B, I)
    lstm(x, lengths=LENGTHS)
    with torch.no_grad():
        lstm(x, lengths=LENGTHS)
    lstm.requires_grad_(False)
    lstm(x, lengths=LENGTHS)
    lstm(x.requires_grad_(), lengths=LENGTHS)
    assert asked == [True, False, False, True]


NEEDS_THE_LOOP = {
    "cell-states": ({}, {"return_cell_states": True}),
    "projection": ({"proj_size": 2}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "backend-reference": ({"backend": "reference"}, {}),
}


@pytest.mark.parametrize(("config", "options"), NEEDS_THE_LOOP.values(), ids=NEEDS_THE_LOOP)
def test_what_onednn_cannot_do_the_step_loop_does(config, options, calls, monkeypatch):
    loop_takes(math.inf, monkeypatch)
    lstm = make(**config)
    lstm(torch.randn(T, B, I, dtype=lstm.weight_ih_l0.dtype), **options)
    assert {name: count for name, count in calls.items() if count} == {"loop": 1}


def test_without_onednn_the_step_loop_runs_and_computes_the_same(calls, monkeypatch):
    loop_takes(math.inf, monkeypatch)
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    with without_onednn():
        found = everything(ragged_call, lstm, x, hx)
    assert calls["rectangles"] == calls["padded"] == 0
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_forced_runs(path, calls):
    """What other tests rely on."""
    lstm = make()
    with forced(path):
        lstm(torch.randn(T, B, I), lengths=LENGTHS)
    assert calls[path if path in calls else "rectangles"] == sum(calls.values()) == 1


@every_path
@every_configuration
def test_every_path_gives_the_answer(config, path):
    lstm = make(**{**config, "batch_first": False})
    x, hx = problem(lstm)
    with forced(path):
        found = everything(ragged_call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


def test_the_reference_backend_gives_the_answer():
    lstm = make(num_layers=2, bidirectional=True, backend="reference")
    x, hx = problem(lstm)
    found = everything(ragged_call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


# --- memory --------------------------------------------------------------------------------------


@every_configuration
def test_recomputed_gates_give_the_answer(config, calls):
    lstm = make(**{**config, "batch_first": False}, memory="recompute")
    x, hx = problem(lstm)
    found = everything(ragged_call, lstm, x, hx)
    runs = lstm.num_layers * (1 + lstm.bidirectional)
    assert {name: count for name, count in calls.items() if count} == {"loop": runs}
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


def test_recomputing_keeps_less():
    """Of 6 H numbers a row gates, 4 H, and tanh(c), H."""
    kept = {}
    for memory in ("save", "recompute"):
        lstm = make(memory=memory, backend="reference")
        x, hx = problem(lstm)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, numbers=numbers: numbers.append(t.numel()) or t, lambda t: t
        ):
            ragged_call(lstm, x, hx)
        kept[memory] = sum(numbers)
    assert kept["save"] - kept["recompute"] == 5 * H * sum(LENGTHS)


def test_an_unknown_memory_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError) as error:
        make(memory="none")
    assert str(error.value) == "memory must be one of save, recompute, got 'none'"


def test_repr_names_what_is_not_the_default():
    assert repr(make()) == "LSTM(3, 5)"
    assert repr(make(memory="recompute")) == "LSTM(3, 5, memory=recompute)"


# --- backends ------------------------------------------------------------------------------------


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError) as error:
        make(backend="cudnn")
    assert str(error.value) == "backend must be one of auto, torch, reference, triton, got 'cudnn'"


def test_an_unknown_backend_set_later_is_refused_too():
    lstm = make()
    lstm.backend = "cudnn"
    with pytest.raises(ValueError, match="backend must be one of"):
        lstm(torch.randn(T, B, I))


def test_triton_asked_for_where_it_cannot_run_says_why_and_what_to_do():
    lstm = make(backend="triton")
    with pytest.raises(RuntimeError) as error:
        lstm(torch.randn(T, B, I))
    assert str(error.value).startswith('backend="triton" cannot run: ')
    assert 'Use backend="auto"' in str(error.value)


def test_backends_tells_what_can_run_here():
    found = fastrnn.backends()
    assert found["reference"] == "available"
    assert found["triton"] == "available" or found["triton"].startswith("unavailable: ")


# --- backward, again and in part -----------------------------------------------------------------


@every_path
def test_a_second_backward_gives_the_same_bits(path):
    lstm = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    with forced(path):
        output, (h_n, c_n) = lstm(x, lengths=LENGTHS)
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        inputs = [x, *lstm.parameters()]
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_path
@pytest.mark.parametrize("kept", ["output", "h_n", "c_n"])
def test_one_output_alone_in_the_loss(kept, path):
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)
    skip = {"output", "h_n", "c_n"} - {kept}
    with forced(path):
        found = everything(ragged_call, lstm, x, hx, skip=skip)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), skip=skip))


def test_cell_states_alone_in_the_loss():
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)

    def call(lstm, x, hx):
        output, states, cells = lstm(x, hx, lengths=LENGTHS, return_cell_states=True)
        return output, *states, cells

    skip = {"output", "h_n", "c_n"}
    expected = answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), cells=True, skip=skip)
    assert_agree(everything(call, lstm, x, hx, skip=skip), expected)


FREEZES = {
    "x": lambda name: name == "x",
    "states": lambda name: name in ("h_0", "c_0"),
    "weight_ih": lambda name: name.startswith("weight_ih"),
    "weight_hh": lambda name: name.startswith("weight_hh"),
    "bias_ih": lambda name: name.startswith("bias_ih"),
    "bias_hh": lambda name: name.startswith("bias_hh"),
    "forward": lambda name: name.endswith("_l0"),
    "reverse": lambda name: name.endswith("_reverse"),
    "everything-but-h_0": lambda name: name != "h_0",
}


@every_path
@pytest.mark.parametrize("freezes", FREEZES.values(), ids=FREEZES)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(freezes, path):
    lstm = make(bidirectional=True)
    x, (h_0, c_0) = problem(lstm)
    leaves = {"x": x, "h_0": h_0, "c_0": c_0, **dict(lstm.named_parameters())}

    def gradients(names):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
            leaf.grad = None
        output, (h_n, c_n) = lstm(x, (h_0, c_0), lengths=LENGTHS)
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    with forced(path):
        everything = gradients(leaves)
        trained = [name for name in leaves if not freezes(name)]
        found = gradients(trained)
    assert [name for name in found if found[name] is not None] == trained
    assert_identical({n: found[n] for n in trained}, {n: everything[n] for n in trained})


@every_path
def test_backward_in_eval_mode(path):
    lstm = make(num_layers=2, dropout=0.5).eval()
    x, hx = problem(lstm)
    with forced(path):
        found = everything(ragged_call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


@every_path
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "dense"])
def test_an_output_can_be_changed_in_place(lengths, path):
    lstm, x = make(), torch.randn(T, B, I)
    with forced(path):
        expected = lstm(x, lengths=lengths)[0] * 2
        output, _ = lstm(x, lengths=lengths)
        output.mul_(2)
    assert torch.equal(output, expected)


OWN_OUTPUT = {
    "plain": {},
    "2-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "projection": {"proj_size": 2},
    "recompute": {"memory": "recompute"},
    "reference": {"backend": "reference"},
}
INPUTS = {
    "dense": lambda lstm, x: lstm(x),
    "full": lambda lstm, x: lstm(x, lengths=[T] * B),
    "lengths": lambda lstm, x: lstm(x, lengths=LENGTHS),
    "mask": lambda lstm, x: lstm(x, mask=MASK),
    "packed-sorted": lambda lstm, x: lstm(pack_padded_sequence(x, [6, 5, 3, 1])),
    "packed": lambda lstm, x: lstm(pack_padded_sequence(x, LENGTHS, enforce_sorted=False)),
    "cells": lambda lstm, x: lstm(x, return_cell_states=True),
}


@every_path
@pytest.mark.parametrize("call", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("config", OWN_OUTPUT.values(), ids=OWN_OUTPUT)
def test_what_comes_out_can_be_changed_in_place_before_backward(config, call, path):
    lstm, x = make(**config), torch.randn(T, B, I, dtype=config.get("dtype"), requires_grad=True)

    def gradients(change):
        output, _, *cells = call(lstm, x)
        parts = [
            part.data if isinstance(part, PackedSequence) else part for part in (output, *cells)
        ]
        total = sum(change(part).square().sum() for part in parts)
        return torch.autograd.grad(total, [x, *lstm.parameters()])

    with forced(path):
        expected, found = gradients(lambda part: part * 2), gradients(lambda part: part.mul_(2))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@every_path
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_a_gradient_of_nan_at_an_invalid_step_of_the_output_goes_nowhere(
    poison, bidirectional, path
):
    """A loss of targets that are padded with NaN has one, though it is masked."""
    lstm, x = make(num_layers=2, bidirectional=bidirectional), torch.randn(T, B, I)
    x.requires_grad_()
    invalid = ~valid_steps(LENGTHS, T)
    d_output = torch.randn(T, B, (2 if bidirectional else 1) * H)
    d_output[invalid] = 0.0
    dirty = d_output.masked_fill(invalid.unsqueeze(2), poison)
    leaves = [x, *lstm.parameters()]
    with forced(path):
        expected, found = (
            torch.autograd.grad(lstm(x, lengths=LENGTHS)[0], leaves, gradient)
            for gradient in (d_output, dirty)
        )
    for name, left, right in zip(("x", *dict(lstm.named_parameters())), found, expected):
        assert torch.equal(left, right), name


@every_path
def test_an_input_changed_in_place_before_backward_is_refused(path):
    lstm, x = make(), torch.randn(T, B, I)
    with forced(path):
        output, _ = lstm(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@every_path
def test_saved_tensors_on_the_cpu_or_packed_by_hooks(path):
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    with forced(path):
        expected = everything(ragged_call, lstm, x, hx)
        with torch.autograd.graph.save_on_cpu():
            on_cpu = everything(ragged_call, lstm, x, hx)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hooked = everything(ragged_call, lstm, x, hx)
    assert packed
    assert_identical(on_cpu, expected)
    assert_identical(hooked, expected)


@every_path
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(use_reentrant, path):
    """The reentrant kind runs forward for inference first, and that may round otherwise."""
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)

    def checkpointed(lstm, x, hx):
        return torch.utils.checkpoint.checkpoint(
            ragged_call, lstm, x, hx, use_reentrant=use_reentrant
        )

    def grads(call):
        leaf = x.clone().requires_grad_()
        lstm.zero_grad()
        output, h_n, c_n = call(lstm, leaf, hx)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        return {"x": leaf.grad} | {name: p.grad for name, p in lstm.named_parameters()}

    with forced(path):
        found, expected = grads(checkpointed), grads(ragged_call)
    assert_agree(found, expected, tolerance=4e-6 if use_reentrant else 0)


def test_nothing_is_kept_where_nothing_needs_a_gradient():
    lstm = make(num_layers=2).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        output, (h_n, c_n) = lstm(torch.randn(T, B, I), lengths=LENGTHS)
    assert kept == []
    assert not any(tensor.requires_grad for tensor in (output, h_n, c_n))


@every_path
def test_the_returned_states_are_not_kept_for_backward(path):
    lstm = make(bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    with forced(path):
        output, (h_n, c_n) = lstm(x, lengths=LENGTHS)
        before = torch.autograd.grad(output.sum(), x, retain_graph=True)
        with torch.no_grad():
            h_n.fill_(math.nan)
            c_n.fill_(math.nan)
        after = torch.autograd.grad(output.sum(), x)
    assert torch.equal(before[0], after[0])


# --- derivatives of derivatives ------------------------------------------------------------------


def leaves_of(lstm, x, hx):
    leaves = (x, *hx, *lstm.parameters())
    return tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)


SMALL = {
    "plain": ({}, {}),
    "no-bias": ({"bias": False}, {}),
    "projection": ({"proj_size": 1}, {}),
    "bidirectional": ({"bidirectional": True}, {}),
    "2-layers": ({"num_layers": 2}, {}),
    "cell-states": ({"bidirectional": True}, {"return_cell_states": True}),
}


@pytest.mark.parametrize("lengths", [[3, 1, 0], [2, 2, 2], None], ids=["ragged", "short", "dense"])
@pytest.mark.parametrize(("config", "options"), SMALL.values(), ids=SMALL)
def test_gradcheck(config, options, lengths):
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64, **config)
    function = as_function(lstm, lengths, **options)
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    leaves = leaves_of(lstm, x, make_state(lstm, 3))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("lengths", [[3, 1, 0], None], ids=["ragged", "dense"])
@pytest.mark.parametrize(("config", "options"), SMALL.values(), ids=SMALL)
def test_gradgradcheck(config, options, lengths):
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64, **config)
    function = as_function(lstm, lengths, **options)
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    leaves = leaves_of(lstm, x, make_state(lstm, 3))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.slow
def test_gradcheck_and_gradgradcheck_entry_by_entry():
    lstm = fastrnn.LSTM(2, 2, bidirectional=True, dtype=torch.float64)
    function = as_function(lstm, [2, 0])
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    leaves = leaves_of(lstm, x, make_state(lstm, 2))
    assert torch.autograd.gradcheck(function, leaves)
    fixed = [leaf.detach() for leaf in leaves]

    def of_x_and_h_0(x, h_0):
        return function(x, h_0, *fixed[2:])

    assert torch.autograd.gradgradcheck(of_x_and_h_0, leaves[:2])


@pytest.mark.parametrize("which", ["x", "h_0", "weights"])
def test_gradgradcheck_where_only_some_inputs_need_a_gradient(which):
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64)
    function = as_function(lstm, [3, 1, 0])
    leaves = leaves_of(lstm, torch.randn(3, 3, 2, dtype=torch.float64), make_state(lstm, 3))
    needs = {"x": [0], "h_0": [1], "weights": [3, 4, 5, 6]}[which]
    leaves = tuple(leaf.requires_grad_(index in needs) for index, leaf in enumerate(leaves))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@every_path
@every_configuration
def test_a_gradient_penalty_is_the_answers(config, path):
    """Second derivatives in float32, where the first ones are derived by hand otherwise."""
    lstm = make(**{**config, "batch_first": False})
    x, hx = problem(lstm)

    def penalty(call):
        def run(lstm, x, hx):
            outputs = call(lstm, x, hx)
            loss = sum((output**2).sum() for output in outputs)
            return torch.autograd.grad(loss, [x, *hx], create_graph=True)

        return run

    with forced(path):
        found = everything(penalty(ragged_call), lstm, x, hx)
    expected = answer_of(penalty, lstm, x, hx)
    assert_agree(found, expected, tolerance=2e-5)


def answer_of(change, lstm, x, hx):
    """The answer to a changed call: `answer` patched at its one call of the oracle."""
    from tests import oracle as module

    straight = module.oracle
    valid = valid_steps(LENGTHS, T)

    def call(lstm, x, hx):
        return straight(lstm, x, hx, valid=valid)[:3]

    with mock.patch.object(module, "oracle", lambda lstm, x, hx, **_: change(call)(lstm, x, hx)):
        return answer(lstm, x, hx)


@every_path
def test_gradients_are_the_same_with_and_without_a_graph_of_them(path):
    lstm = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    with forced(path):
        output, (_, c_n) = lstm(x, lengths=LENGTHS)
        loss = output.square().sum() + c_n.sum()
        inputs = [x, *lstm.parameters()]
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        graphed = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(gradient.requires_grad for gradient in graphed)
    names = ["x", *(name for name, _ in lstm.named_parameters())]
    assert_agree(*(dict(zip(names, gradients)) for gradients in (graphed, plain)))


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_double_backward_in_16_bits(dtype, path):
    lstm = make(num_layers=2, bidirectional=True).to(dtype)
    x = torch.randn(T, B, I).to(dtype)

    def penalty(lstm, x):
        x = x.clone().requires_grad_()
        outputs, (h_n, c_n) = lstm(x, lengths=LENGTHS)
        loss = sum(output.float().square().sum() for output in (outputs, h_n, c_n))
        (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
        found = torch.autograd.grad(d_x.float().square().sum(), [x, *lstm.parameters()])
        return {str(index): gradient for index, gradient in enumerate(found)}

    exact = penalty(copy.deepcopy(lstm).double(), x.double())
    with forced(path):
        found = penalty(lstm, x)
    assert all(gradient.dtype == dtype for gradient in found.values())
    assert_agree(found, exact, tolerance=0.1)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_double_backward_where_the_state_depends_on_the_input(packed):
    """A gradient must reach x through this layer once, not again through h_0."""
    lstm = fastrnn.LSTM(2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def of_padded(x):
        h_0 = x.mean(0, keepdim=True)
        output, states = lstm(x, (h_0, h_0 * 2), lengths=[3, 1])
        return output, *states

    def of_packed(rows):
        h_0 = rows[:2].unsqueeze(0)
        output, states = lstm(PackedSequence(rows, torch.tensor([2, 1, 1])), (h_0, h_0 * 2))
        return output.data, *states

    assert torch.autograd.gradgradcheck(*((of_packed, rows) if packed else (of_padded, x)))


def test_double_backward_where_one_weight_is_made_of_another():
    lstm = fastrnn.LSTM(2, 2, bidirectional=True, bias=False, dtype=torch.float64)
    w_ih = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def function(w_ih, w_hh):
        weights = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh}
        weights |= {"weight_ih_l0_reverse": w_ih, "weight_hh_l0_reverse": w_hh * 2}
        output, states = functional_call(lstm, weights, (x,), {"lengths": [3, 1]})
        return output, *states

    assert torch.autograd.gradgradcheck(function, (w_ih, w_hh))


def test_double_backward_where_no_sequence_has_a_step():
    lstm = make()
    x, (h_0, c_0) = torch.randn(T, B, I, requires_grad=True), make_state(lstm, B)
    h_0.requires_grad_()
    output, (h_n, c_n) = lstm(x, (h_0, c_0), lengths=[0] * B)
    loss = output.sum() + h_n.square().sum() + c_n.sum()
    (d_h_0,) = torch.autograd.grad(loss, h_0, create_graph=True)
    assert torch.equal(d_h_0, 2 * h_0)
    (d_d_h_0,) = torch.autograd.grad(d_h_0.sum(), h_0)
    assert torch.equal(d_d_h_0, torch.full_like(h_0, 2))
