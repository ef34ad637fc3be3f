"""fastrnn.LSTM gives the right answer for every form of ragged input and dtype, or an error."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.input import packing
from fastrnn.input.packing import common_steps
from tests.oracle import (
    answer,
    assert_agree,
    assert_identical,
    assert_within_budget,
    by_jagged,
    by_list,
    by_packing,
    every_configuration,
    every_form,
    every_lengths,
    every_path,
    every_shape,
    everything,
    forced,
    make_state,
    oracle,
    padded,
    valid_steps,
)

B, T, I, H = 4, 6, 3, 5
LENGTHS = [3, 6, 1, 5]
WITH_EMPTY = [3, 6, 0, 5]
MASK = torch.tensor(  # [B, T]: holes, left padding, nothing, everything
    [[1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    dtype=torch.bool,
).t()
RESETS = torch.tensor(  # [B, T]: on masked steps too, at the start, at the end, twice running
    [[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1]],
    dtype=torch.bool,
).t()


def make(dtype=torch.float32, **config):
    return fastrnn.LSTM(I, H, dtype=dtype, **config)


def lengths_on(path):
    """A batch with an empty sequence is never run padded."""
    return LENGTHS if path == "padded" else WITH_EMPTY


def problem(lstm):
    """Time-major input and states."""
    dtype = lstm.weight_ih_l0.dtype
    return torch.randn(T, B, I).to(dtype), make_state(lstm, B)


def lengths_for(form, lengths=WITH_EMPTY):
    """A PackedSequence has no empty sequences."""
    return [max(1, length) for length in lengths] if form is by_packing else lengths


# --- the right answer ----------------------------------------------------------------------------


@every_form
@every_configuration
def test_every_form_of_lengths(config, form):
    lstm, lengths = make(**config), lengths_for(form)
    x, hx = problem(lstm)
    if form is by_packing or form is by_jagged:  # they are time-major and batch-first by nature
        lstm.batch_first = False
    found = everything(lambda *args: form(*args, lengths), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(lengths, T)))


@every_form
@every_configuration
def test_every_form_of_lengths_in_float64(config, form):
    lstm, lengths = make(torch.float64, **config), lengths_for(form)
    x, hx = problem(lstm)
    if form is by_packing or form is by_jagged:
        lstm.batch_first = False
    found = everything(lambda *args: form(*args, lengths), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(lengths, T)))


@every_path
@every_lengths
@every_shape
def test_odd_shapes(shape, lengths_of, path):
    lstm = fastrnn.LSTM(shape.I, shape.H, bidirectional=True)
    lengths = lengths_of(shape.B, shape.T)
    x, hx = torch.randn(shape.T, shape.B, shape.I), make_state(lstm, shape.B)
    with forced(path):
        found = everything(lambda *args: by_list(*args, lengths), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(lengths, shape.T)), tolerance=1e-5)


@every_path
@every_shape
def test_odd_shapes_without_lengths(shape, path):
    lstm = fastrnn.LSTM(shape.I, shape.H, bidirectional=True)
    x, hx = torch.randn(shape.T, shape.B, shape.I), make_state(lstm, shape.B)
    with forced(path):
        found = everything(padded, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx), tolerance=1e-5)


RAGGED = {
    "mask": {"mask": MASK},
    "resets": {"resets": RESETS},
    "mask-resets": {"mask": MASK, "resets": RESETS},
    "lengths-resets": {"lengths": WITH_EMPTY, "resets": RESETS},
    "lengths-mask-resets": {"lengths": WITH_EMPTY, "mask": MASK, "resets": RESETS},
}


def as_oracle(lengths=None, mask=None, resets=None):
    valid = torch.ones(T, B, dtype=torch.bool) if mask is None else mask
    valid = valid if lengths is None else valid & valid_steps(lengths, T)
    return {"valid": valid, "resets": resets}


@every_path
@every_configuration
@pytest.mark.parametrize("ragged", RAGGED.values(), ids=RAGGED)
def test_masks_resets_and_lengths_together(ragged, config, path):
    lstm = make(**config)
    x, hx = problem(lstm)
    with forced(path):
        found = everything(lambda *args: padded(*args, **ragged), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged)))


@every_configuration
@pytest.mark.parametrize("ragged", [{}, *RAGGED.values()], ids=["dense", *RAGGED])
def test_cell_states(ragged, config):
    lstm = make(**config)
    x, hx = problem(lstm)

    def call(lstm, x, hx):
        return padded(lstm, x, hx, **ragged, return_cell_states=True)

    found = everything(call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **as_oracle(**ragged), cells=True))


@every_form
def test_without_a_state_it_starts_from_zeros(form):
    lstm, lengths = make(num_layers=2, bidirectional=True), lengths_for(form)
    x, hx = problem(lstm)
    zeros = tuple(torch.zeros_like(state) for state in hx)
    found = form(lstm, x, None, lengths)
    expected = oracle(lstm, x, zeros, valid=valid_steps(lengths, T))
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ragged", [{}, *RAGGED.values()], ids=["dense", *RAGGED])
def test_inference_computes_what_training_does(ragged):
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)
    training = padded(lstm, x, hx, **ragged)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            inference = padded(lstm, x, hx, **ragged)
        for value, right in zip(inference, training):
            torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


# --- the form of the output ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_padded_output_is_zero_and_state_stays_past_the_end(batch_first):
    lstm = make(batch_first=batch_first)
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    output, (h_n, _) = lstm(x, lengths=WITH_EMPTY)
    output = output if batch_first else output.transpose(0, 1)
    for b, length in enumerate(WITH_EMPTY):
        assert (output[b, length:] == 0).all()
        assert (output[b, :length] != 0).all()
        assert torch.equal(h_n[0, b], output[b, length - 1] if length else torch.zeros(H))


def test_a_packed_sequence_with_resets_comes_back_packed():
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed, hx, resets=RESETS, mask=MASK)
    assert type(output) is PackedSequence
    valid = MASK & valid_steps(LENGTHS, T)
    expected = oracle(lstm, x, hx, valid=valid, resets=RESETS)
    found = pad_packed_sequence(output, total_length=T)[0], h_n, c_n
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


def test_a_jagged_tensor_with_resets_comes_back_jagged():
    lstm = make(bidirectional=True, batch_first=True)
    x, hx = problem(lstm)
    parts = [x[:length, b] for b, length in enumerate(WITH_EMPTY)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    output, (h_n, c_n), cells = lstm(
        jagged, hx, resets=RESETS.t(), mask=MASK.t(), return_cell_states=True
    )
    assert output.layout is torch.jagged
    assert cells.layout is torch.jagged
    valid = MASK & valid_steps(WITH_EMPTY, T)
    expected = oracle(lstm, x, hx, valid=valid, resets=RESETS)
    for b, length in enumerate(WITH_EMPTY):
        same((output[b], cells[b]), (expected[0][:length, b], expected[3][:length, b]))
    for value, right in zip((h_n, c_n), expected[1:3]):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)


def test_a_jagged_output_is_as_ragged_as_the_input():
    """So that it can be added to it, and padded to its longest sequence."""
    x = torch.nested.nested_tensor([torch.randn(n, H) for n in WITH_EMPTY], layout=torch.jagged)
    output, _ = fastrnn.LSTM(H, H)(x)
    assert torch.equal((x + output).values(), x.values() + output.values())
    padded_shapes = [torch.nested.to_padded_tensor(jagged, 0.0).shape for jagged in (x, output)]
    assert padded_shapes == [(B, T, H), (B, T, H)]


def test_a_jagged_tensors_gradient_is_jagged():
    parts = [torch.randn(length, I) for length in WITH_EMPTY]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    output, _ = make()(jagged)
    output.values().square().sum().backward()
    assert jagged.grad.layout is torch.jagged
    assert jagged.grad.values().shape == (sum(WITH_EMPTY), I)
    assert (jagged.grad.values() != 0).all()


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@every_configuration
def test_one_unbatched_sequence(config, batch_first):
    lstm = make(**{**config, "batch_first": batch_first})
    x, (h_0, c_0) = torch.randn(T, I), make_state(lstm, 1)
    flags = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    resets = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    ragged = {"lengths": [5], "mask": flags, "resets": resets, "return_cell_states": True}
    output, (h_n, c_n), cells = lstm(x, (h_0[:, 0], c_0[:, 0]), **ragged)
    valid = (flags & (torch.arange(T) < 5)).unsqueeze(1)
    expected = oracle(lstm, x.unsqueeze(1), (h_0, c_0), valid=valid, resets=resets.unsqueeze(1))
    for value, right in zip((output, h_n, c_n, cells), expected):
        torch.testing.assert_close(value, right.squeeze(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "lengths",
    [4, [4], torch.tensor([4]), torch.tensor(4), np.int64(4), np.array(4), np.uint8(4)],
    ids=["int", "list", "tensor", "0-d-tensor", "numpy", "0-d-array", "unsigned"],
)
def test_the_length_of_an_unbatched_sequence(lengths):
    lstm, x = make(), torch.randn(T, I)
    output, (h_n, c_n) = lstm(x, lengths=lengths)
    expected, (h_4, c_4) = lstm(x[:4])
    torch.testing.assert_close(output[:4], expected, rtol=0, atol=1e-6)
    assert (output[4:] == 0).all()
    torch.testing.assert_close((h_n, c_n), (h_4, c_4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "lengths",
    [
        tuple(WITH_EMPTY),
        torch.tensor(WITH_EMPTY, dtype=torch.uint8),
        torch.tensor(WITH_EMPTY, dtype=torch.uint16),
        [torch.tensor(3), np.int32(6), 0, 5],
        np.array(WITH_EMPTY),
        np.array(WITH_EMPTY, dtype=np.uint16),
        np.array(WITH_EMPTY, dtype=np.uint64),
    ],
    ids=["tuple", "uint8", "uint16", "list-of-kinds", "array", "uint16-array", "uint64-array"],
)
def test_other_ways_to_say_lengths(lengths):
    lstm, x = make(), torch.randn(T, B, I)
    assert torch.equal(lstm(x, lengths=lengths)[0], lstm(x, lengths=WITH_EMPTY)[0])


# --- the smallest batches ------------------------------------------------------------------------


@every_path
@every_configuration
def test_no_sequence_has_a_step(config, path):
    """h_n is h_0, the output is zero, and gradients are those of that."""
    lstm = make(**config)
    x, hx = problem(lstm)
    with forced(path):
        found = everything(lambda *args: by_list(*args, [0] * B), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=torch.zeros(T, B, dtype=torch.bool)))
    assert torch.equal(found["h_n"], hx[0])
    assert torch.equal(found["c_n"], hx[1])


def test_all_steps_masked_with_resets_leave_the_state():
    """A reset takes effect at a step; there is none."""
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    nothing = torch.zeros(T, B, dtype=torch.bool)
    output, (h_n, c_n) = lstm(x, hx, mask=nothing, resets=~nothing)
    assert (output == 0).all()
    assert torch.equal(h_n, hx[0])
    assert torch.equal(c_n, hx[1])


@every_configuration
def test_no_valid_step_leaves_every_parameter_a_gradient_of_zero(config):
    """An optimizer or DDP expects one."""
    lstm = make(**{**config, "batch_first": False})
    output, (h_n, _) = lstm(torch.randn(T, B, I), lengths=[0] * B)
    (output.sum() + h_n.sum()).backward()
    for name, parameter in lstm.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@every_configuration
@pytest.mark.parametrize("what", ["nothing", "lengths", "mask", "resets"])
def test_an_empty_batch(what, config):
    lstm = make(**config)
    theirs = nn.LSTM(I, H, **config)
    x = torch.randn((0, T, I) if lstm.batch_first else (T, 0, I), requires_grad=True)
    flags = torch.zeros(x.shape[:2], dtype=torch.bool)
    ragged = {"nothing": {}, "lengths": {"lengths": []}, "mask": {"mask": flags}}
    ragged["resets"] = {"resets": flags}
    output, states = lstm(x, **ragged[what])
    expected, expected_states = theirs(x.detach())
    shapes = [tensor.shape for tensor in (output, *states)]
    assert shapes == [tensor.shape for tensor in (expected, *expected_states)]
    output.sum().backward()
    assert x.grad.shape == x.shape


# --- resets --------------------------------------------------------------------------------------


def one_sequence(*resets, mask=None):
    """A bidirectional LSTM over one sequence with its states; the resets are at these steps."""
    lstm = make(bidirectional=True)
    x, hx = torch.randn(T, 1, I), make_state(lstm, 1)
    flags = torch.zeros(T, 1, dtype=torch.bool)
    flags[list(resets)] = True
    output, states = lstm(x, hx, resets=flags, mask=mask)
    return lstm, x, hx, output, states


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_segments_are_separate_sequences():
    lstm, x, _, output, _ = one_sequence(2, 5)
    same(output[2:5], lstm(x[2:5])[0])  # neither the first nor the last: no state enters


def test_forward_the_given_state_enters_the_first_segment():
    lstm, x, hx, output, _ = one_sequence(2, 5)
    same(output[:2, :, :H], lstm(x[:2], hx)[0][:, :, :H])
    same(output[5:, :, :H], lstm(x[5:])[0][:, :, :H])


def test_forward_the_given_state_enters_nowhere_if_the_first_step_resets():
    lstm, x, _, output, (h_n, _) = one_sequence(0)
    same(output[:, :, :H], lstm(x)[0][:, :, :H])
    same(h_n[0], lstm(x)[1][0][0])


def test_in_reverse_the_given_state_enters_the_last_segment():
    lstm, x, hx, output, _ = one_sequence(2, 5)
    same(output[5:, :, H:], lstm(x[5:], hx)[0][:, :, H:])
    same(output[:2, :, H:], lstm(x[:2])[0][:, :, H:])


def test_in_reverse_a_reset_at_the_first_step_changes_nothing():
    """The unit is the segment, and the whole sequence is one."""
    lstm, x, hx, output, (h_n, _) = one_sequence(0)
    same(output[:, :, H:], lstm(x, hx)[0][:, :, H:])
    same(h_n[1], lstm(x, hx)[1][0][1])


def test_final_states_are_those_of_the_last_segment_and_in_reverse_of_the_first():
    lstm, x, _, _, (h_n, c_n) = one_sequence(2, 5)
    _, (last_h, last_c) = lstm(x[5:])
    _, (first_h, first_c) = lstm(x[:2])
    same((h_n[0], c_n[0]), (last_h[0], last_c[0]))
    same((h_n[1], c_n[1]), (first_h[1], first_c[1]))


def test_the_final_state_is_the_one_after_the_last_valid_step():
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).unsqueeze(1)
    lstm, x, _, _, (h_n, _) = one_sequence(2, mask=mask)
    same(h_n[0], lstm(x[2:4])[1][0][0])


def test_a_reset_on_a_masked_step_holds_for_the_next_valid_step():
    mask = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool).unsqueeze(1)
    lstm, x, _, output, _ = one_sequence(2, mask=mask)
    same(output[4:, :, :H], lstm(x[4:])[0][:, :, :H])
    same(output[:2, :, H:], lstm(x[:2])[0][:, :, H:])


def test_a_reset_on_a_masked_first_step_keeps_the_given_state_out():
    mask = torch.tensor([0, 1, 1, 1, 1, 1], dtype=torch.bool).unsqueeze(1)
    lstm, x, _, output, _ = one_sequence(0, mask=mask)
    same(output[1:, :, :H], lstm(x[1:])[0][:, :, :H])


def test_a_reset_after_the_last_valid_step_changes_nothing():
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).unsqueeze(1)
    torch.manual_seed(0)
    *_, with_reset, states = one_sequence(5, mask=mask)
    torch.manual_seed(0)
    *_, without, expected = one_sequence(mask=mask)
    assert torch.equal(with_reset, without)
    assert_identical(dict(enumerate(states)), dict(enumerate(expected)))


def test_resets_at_every_step_leave_no_memory():
    lstm, x, _, output, _ = one_sequence(*range(T))
    alone = torch.cat([lstm(x[t : t + 1])[0] for t in range(T)])
    same(output[1:-1], alone[1:-1])


# --- dtypes --------------------------------------------------------------------------------------

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
every_low = pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)


@every_low
@every_configuration
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_16_bit_is_as_exact_as_nn_lstm(ragged, config, dtype):
    config = {**config, "batch_first": False}
    ours, theirs = make(dtype, **config), nn.LSTM(I, H, dtype=dtype, **config)
    theirs.load_state_dict(ours.state_dict())
    x, hx = problem(ours)

    def call(lstm, x, hx):
        if ragged:
            return by_packing(lstm, x, hx, LENGTHS)
        output, states = lstm(x, hx)
        return output, *states

    found, low = everything(call, ours, x, hx), everything(call, theirs, x, hx)
    assert {value.dtype for value in found.values()} == {dtype}
    exact = answer(ours, x, hx, valid=valid_steps(LENGTHS, T) if ragged else None)
    assert_within_budget(found, low, exact, dtype)


@every_low
def test_16_bit_with_masks_resets_and_cell_states(dtype):
    """Within a few roundings of the answer: everything inside is float32."""
    lstm = make(dtype, num_layers=2, bidirectional=True)
    x, hx = problem(lstm)

    def call(lstm, x, hx):
        return padded(lstm, x, hx, mask=MASK, resets=RESETS, return_cell_states=True)

    found = everything(call, lstm, x, hx)
    assert {value.dtype for value in found.values()} == {dtype}
    exact = answer(lstm, x, hx, valid=MASK, resets=RESETS, cells=True)
    assert_agree(found, exact, tolerance=4 * torch.finfo(dtype).eps)


@every_low
@pytest.mark.parametrize("ragged", [{}, {"lengths": WITH_EMPTY}], ids=["dense", "ragged"])
def test_autocast_gives_autocasts_dtype_and_float32_gradients(ragged, dtype):
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)

    def call(lstm, x, hx):
        with torch.autocast("cpu", dtype):
            return padded(lstm, x, hx, **ragged, return_cell_states=True)

    found = everything(call, lstm, x, hx)
    names = ("output", "h_n", "c_n", "cells")
    assert {found[name].dtype for name in names} == {dtype}
    assert {value.dtype for name, value in found.items() if name not in names} == {torch.float32}
    exact = answer(lstm, x, hx, **as_oracle(**ragged), cells=True)
    assert_agree(found, exact, tolerance=6 * torch.finfo(dtype).eps)


def test_backward_within_autocast():
    lstm = make()
    x, _ = problem(lstm)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
        output, _ = lstm(x)
    outside = torch.autograd.grad(output.sum(), list(lstm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_double_backward_within_autocast():
    lstm = make()
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lstm(x, lengths=WITH_EMPTY)
        (d_x,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        penalty = d_x.square().sum()
    penalty.backward()
    assert d_x.dtype == x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()


def test_under_autocast_states_and_input_may_differ_in_dtype():
    """As the second of two LSTMs under autocast sees them."""
    lstm = make()
    x, (h_0, c_0) = problem(lstm)
    with torch.autocast("cpu", torch.bfloat16):
        output, states = lstm(x.bfloat16(), (h_0, c_0.half()))
    assert {tensor.dtype for tensor in (output, *states)} == {torch.bfloat16}


def test_autocast_leaves_float64_alone():
    lstm = make(torch.float64)
    x, _ = problem(lstm)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lstm(x)
    assert output.dtype == torch.float64
    assert torch.equal(output, lstm(x)[0])


def test_autocast_switched_off_again_within_changes_nothing():
    lstm = make()
    x, _ = problem(lstm)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        output, _ = lstm(x)
    assert torch.equal(output, lstm(x)[0])


def test_autocasts_own_setting_is_back_afterwards():
    lstm = make()
    with torch.autocast("cpu", torch.bfloat16):
        lstm(torch.randn(T, B, I))[0].sum().backward()
        assert torch.is_autocast_enabled("cpu")
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


# --- what stands in the padding ------------------------------------------------------------------


@every_path
@every_configuration
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("what", ["lengths", "mask", "lengths-mask-resets"])
def test_what_stands_in_the_padding_changes_no_bit(what, poison, config, path):
    lstm = make(**config)
    x, hx = problem(lstm)
    ragged = {"lengths": {"lengths": lengths_on(path)}, **RAGGED}[what]
    invalid = ~as_oracle(**ragged)["valid"]
    with forced(path):
        clean = everything(lambda *args: padded(*args, **ragged), lstm, x, hx)
        x[invalid] = poison
        dirty = everything(lambda *args: padded(*args, **ragged), lstm, x, hx)
    assert_identical(dirty, clean)
    assert (dirty["d_x"][invalid] == 0).all()


@every_path
def test_nan_in_one_sequence_spoils_no_other(path):
    lstm = make(num_layers=2, bidirectional=True)
    x, _ = problem(lstm)
    with forced(path):
        clean = by_list(lstm, x, None, lengths_on(path))
        x[:, 1] = math.nan
        dirty = by_list(lstm, x, None, lengths_on(path))
    others = [0, 2, 3]
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(dirty, clean))
    assert dirty[0][:, 1].isnan().all()


def test_nan_in_the_state_of_a_sequence_that_starts_afresh_stays_out():
    lstm = make()
    x, (h_0, c_0) = problem(lstm)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0, 1] = True
    h_0[:, 1] = math.nan
    found = everything(lambda *args: padded(*args, resets=resets), lstm, x, (h_0, c_0))
    assert all(value.isfinite().all() for value in found.values())


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "config",
    [{}, {"bidirectional": True}, {"proj_size": 2}, {"num_layers": 3}, {"batch_first": True}],
    ids=["2-layers", "bidirectional", "projection", "3-layers", "batch-first"],
)
def test_dropout_draws_what_nn_lstms_does(config, packed):
    config = {"num_layers": 2, "dropout": 0.5, **config}
    ours, theirs = make(**config), nn.LSTM(I, H, **config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn((B, T, I) if ours.batch_first else (T, B, I))
    if packed:
        x = pack_padded_sequence(x, sorted(LENGTHS, reverse=True), ours.batch_first)
    results = []
    for lstm in (ours, theirs):
        torch.manual_seed(3)
        output, states = lstm(x)
        results.append((output.data if packed else output, *states))
        results.append(torch.get_rng_state())
    for value, right in zip(results[0], results[2]):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-6)
    assert torch.equal(results[1], results[3])


def test_dropouts_mask_is_the_one_of_backward():
    """The gradient of x is zero exactly if everything between the layers was dropped."""
    lstm = make(num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, requires_grad=True)

    def run():
        torch.manual_seed(1)
        output, _ = lstm(x, lengths=WITH_EMPTY)
        return output.square().sum()

    (d_x,) = torch.autograd.grad(run(), x)
    with torch.no_grad():
        step = 1e-3 * d_x / d_x.norm()
        x += step
        above = run()
        x -= 2 * step
        below = run()
    torch.testing.assert_close((above - below) / 2e-3, d_x.norm(), rtol=2e-2, atol=0)


# --- the same again ------------------------------------------------------------------------------


@every_path
@every_configuration
def test_run_twice_is_bit_equal(config, path):
    lstm = make(**config)
    x, hx = problem(lstm)
    with forced(path):
        runs = [
            everything(lambda *args: padded(*args, **RAGGED["mask-resets"]), lstm, x, hx)
            for _ in range(2)
        ]
    assert_identical(*runs)


def test_bit_equal_in_two_threads_at_once():
    lstm = make(num_layers=2, bidirectional=True)
    problems = [problem(lstm) for _ in range(6)]

    def run(given):
        return everything(lambda *args: by_list(*args, WITH_EMPTY), lstm, *given)

    alone = [run(given) for given in problems]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, problems * 3))
    for found, expected in zip(together, alone * 3):
        assert_identical(found, expected)


@every_path
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "dense"])
def test_final_states_zeroed_in_place_before_backward(lengths, path):
    lstm = make(bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    with forced(path):
        expected = torch.autograd.grad(lstm(x, lengths=lengths)[0].square().sum(), x)
        output, (h_n, c_n) = lstm(x, lengths=lengths)
        h_n.zero_()
        c_n.zero_()
        found = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(found[0], expected[0])


@every_path
@pytest.mark.parametrize("gate", range(4), ids="ifgo")
@pytest.mark.parametrize(
    "value", [9.9e3, 1e4, 1e5, torch.finfo(torch.float32).max, math.inf], ids=str
)
@pytest.mark.parametrize("sign", [1, -1], ids=["open", "shut"])
@pytest.mark.parametrize("config", [{}, {"bidirectional": True, "num_layers": 2}], ids=["", "deep"])
def test_a_gate_that_its_bias_pins(config, sign, value, gate, path):
    """Such numbers outweigh what carries the states through the padding."""
    lstm, x = make(**config), torch.randn(T, B, I)
    for name in ("bias_ih_l0", "bias_hh_l0_reverse") if config else ("bias_ih_l0",):
        # No trace of the write is left in the parameter's version.
        getattr(lstm, name).data[gate * H : (gate + 1) * H] = sign * value
    lengths = lengths_on(path)
    with forced(path), torch.no_grad():
        output, (h_n, c_n) = lstm(x, lengths=lengths)
    valid = valid_steps(lengths, T)
    zeros = [torch.zeros_like(state) for state in (h_n, c_n)]
    for found, right in zip((output, h_n, c_n), oracle(lstm, x, zeros, valid=valid)):
        torch.testing.assert_close(found, right.float(), rtol=0, atol=1e-5)
    assert (output[~valid] == 0).all()


@every_path
@pytest.mark.parametrize("gate", range(4), ids="ifgo")
def test_a_gate_that_a_float16_bias_pins(gate, path):
    for autocast in (False, True):
        lstm = make(torch.float32 if autocast else torch.float16)
        value = 1e5 if autocast else 65504.0  # which autocast makes infinite
        lstm.bias_ih_l0.data[gate * H : (gate + 1) * H] = value
        x, lengths = torch.randn(T, B, I, dtype=lstm.bias_ih_l0.dtype), lengths_on(path)
        with forced(path), torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
            output, (h_n, c_n) = lstm(x, lengths=lengths)
        exact, zeros = copy.deepcopy(lstm).double(), torch.zeros(1, B, H, dtype=torch.float64)
        right = oracle(exact, x.double(), (zeros, zeros), valid=valid_steps(lengths, T))
        for found, value in zip((output, h_n, c_n), right):
            torch.testing.assert_close(found.double(), value, rtol=0, atol=5e-3)


@every_path
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("config", [{}, {"bidirectional": True, "num_layers": 2}], ids=["", "deep"])
def test_a_step_added_to_those_of_a_batch_is_seen_nowhere(config, batch_first, path):
    """61 steps are run as 62, which other batches have too."""
    steps, lengths = 61, [61, 60, 1, 33]
    assert common_steps(steps) == 62
    lstm = make(batch_first=batch_first, **config)
    x, hx = torch.randn(steps, B, I), make_state(lstm, B)
    if lstm.bidirectional:  # with given states both directions of a padded batch are packed
        hx = tuple(torch.zeros_like(state) for state in hx)

    def call(lstm, x, hx):
        return padded(lstm, x, None if lstm.bidirectional else hx, lengths=lengths)

    with forced(path):
        found = everything(call, lstm, x, hx)
    expected = answer(lstm, x, hx, valid=valid_steps(lengths, steps))
    if lstm.bidirectional:
        for results in (found, expected):
            del results["d_h_0"], results["d_c_0"]
    assert_agree(found, expected)


def test_steps_added_change_no_draw_of_dropout():
    lstm, x = make(num_layers=3, dropout=0.5), torch.randn(61, B, I)
    results = []
    for added in (0.0, 0.02):
        with mock.patch.object(packing, "MOST_ADDED", added), forced("padded"):
            torch.manual_seed(1)
            results.append(lstm(x, lengths=[61, 60, 1, 33])[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


# --- torch's settings ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "list", "tensor", "mask", "resets", "packed"])
def test_a_default_device_changes_nothing(form):
    """As torch.set_default_device("cuda") in a program that also has an LSTM on the CPU."""
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)
    ragged = {
        "list": {"lengths": WITH_EMPTY},
        "tensor": {"lengths": torch.tensor(WITH_EMPTY)},
        "mask": {"mask": MASK},
        "resets": {"resets": RESETS},
    }.get(form, {})
    given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if form == "packed" else x

    def run():
        output, (h_n, c_n) = lstm(given, hx, **ragged)
        output = output.data if form == "packed" else output
        loss = output.square().sum() + h_n.sum() + c_n.sum()
        return output, h_n, c_n, *torch.autograd.grad(loss, list(lstm.parameters()))

    with torch.device("meta"):
        found = run()
    assert all(torch.equal(value, right) for value, right in zip(found, run(), strict=True))


def test_a_default_dtype_changes_nothing():
    """Nor does it outlast the call in what is kept between calls: this hidden size is new."""
    lstm = fastrnn.LSTM(I, 17, bidirectional=True)
    x, hx = torch.randn(T, B, I), make_state(lstm, B)
    with forced("one-rectangle"):
        torch.set_default_dtype(torch.float64)
        found = padded(lstm, x, hx, **RAGGED["lengths-resets"])
        torch.set_default_dtype(torch.float32)
        expected = padded(lstm, x, hx, **RAGGED["lengths-resets"])
    assert all(torch.equal(value, right) for value, right in zip(found, expected))


def test_inference_mode_before_training_with_the_same_lengths():
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    with torch.inference_mode():
        by_list(lstm, x, hx, [6, 4, 4, 2])
    found = everything(lambda *args: by_list(*args, [6, 4, 4, 2]), lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps([6, 4, 4, 2], T)))


def test_nothing_given_is_changed():
    lstm = make(bidirectional=True)
    x, (h_0, c_0) = problem(lstm)
    given = [x, h_0, c_0, MASK, RESETS, torch.tensor(WITH_EMPTY)]
    before = [tensor.clone() for tensor in given]
    lengths = given[5]
    output, _ = lstm(x, (h_0, c_0), lengths=lengths, mask=MASK, resets=RESETS)
    output.sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before))


# --- mistakes ------------------------------------------------------------------------------------


def states(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def packed_of(*shape, dtype=torch.float32):
    return pack_padded_sequence(torch.zeros(shape, dtype=dtype), [6, 5, 3, 1])


MISTAKES = {
    "0-dimensions": lambda lstm: lstm(torch.tensor(1.0)),
    "1-dimension": lambda lstm: lstm(states(I)),
    "4-dimensions": lambda lstm: lstm(states(2, T, B, I)),
    "input-too-wide": lambda lstm: lstm(states(T, B, I + 1)),
    "unbatched-too-wide": lambda lstm: lstm(states(T, I + 1)),
    "input-float64": lambda lstm: lstm(states(T, B, I, dtype=torch.float64)),
    "input-int64": lambda lstm: lstm(states(T, B, I, dtype=torch.int64)),
    "input-bfloat16": lambda lstm: lstm(states(T, B, I, dtype=torch.bfloat16)),
    "no-steps": lambda lstm: lstm(states(0, B, I)),
    "no-steps-unbatched": lambda lstm: lstm(states(0, I)),
    "no-input": lambda lstm: lstm(),
    "input-on-meta": lambda lstm: lstm(states(T, B, I).to("meta")),
    "states-on-meta": lambda lstm: lstm(states(T, B, I), (states(1, B, H).to("meta"),) * 2),
    "h-batch": lambda lstm: lstm(states(T, B, I), (states(1, B + 1, H), states(1, B, H))),
    "h-width": lambda lstm: lstm(states(T, B, I), (states(1, B, H + 1), states(1, B, H))),
    "h-layers": lambda lstm: lstm(states(T, B, I), (states(2, B, H), states(1, B, H))),
    "c-batch": lambda lstm: lstm(states(T, B, I), (states(1, B, H), states(1, B + 1, H))),
    "c-width": lambda lstm: lstm(states(T, B, I), (states(1, B, H), states(1, B, H + 1))),
    "c-layers": lambda lstm: lstm(states(T, B, I), (states(1, B, H), states(2, B, H))),
    "states-unbatched": lambda lstm: lstm(states(T, B, I), (states(1, H), states(1, H))),
    "c-unbatched": lambda lstm: lstm(states(T, B, I), (states(1, B, H), states(1, H))),
    "unbatched-with-batched-states": lambda lstm: lstm(states(T, I), (states(1, 1, H),) * 2),
    "unbatched-width": lambda lstm: lstm(states(T, I), (states(1, H + 1), states(1, H))),
    "unbatched-layers": lambda lstm: lstm(states(T, I), (states(1, H), states(2, H))),
    "one-state": lambda lstm: lstm(states(T, B, I), (states(1, B, H),)),
    "three-states": lambda lstm: lstm(states(T, B, I), (states(1, B, H),) * 3),
    "a-third-argument": lambda lstm: lstm(states(T, B, I), None, [1] * B),
    "an-unknown-keyword": lambda lstm: lstm(states(T, B, I), sequence_lengths=[1] * B),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_torchs_error(mistake):
    with pytest.raises(Exception) as theirs:
        mistake(nn.LSTM(I, H))
    with pytest.raises(theirs.type) as ours:
        mistake(fastrnn.LSTM(I, H))
    assert str(ours.value) == str(theirs.value)


def packed_and_padded(x, hx=None):
    """The same mistake with a PackedSequence, where torch's own words are poor, and padded."""
    return (
        lambda lstm: lstm(pack_padded_sequence(x, [6, 5, 3, 1]), hx),
        lambda lstm: lstm(x, hx),
    )


PACKED_MISTAKES = {
    "too-wide": packed_and_padded(states(T, B, I + 1)),
    "float64": packed_and_padded(states(T, B, I, dtype=torch.float64)),
    "h-batch": packed_and_padded(states(T, B, I), (states(1, B + 1, H), states(1, B, H))),
    "h-width": packed_and_padded(states(T, B, I), (states(1, B, H + 1), states(1, B, H))),
    "h-layers": packed_and_padded(states(T, B, I), (states(2, B, H), states(1, B, H))),
    "c-width": packed_and_padded(states(T, B, I), (states(1, B, H), states(1, B, H + 1))),
    "states-unbatched": packed_and_padded(states(T, B, I), (states(1, H), states(1, H))),
}


@pytest.mark.parametrize(("packed", "plain"), PACKED_MISTAKES.values(), ids=PACKED_MISTAKES)
def test_a_mistake_with_packed_input_gets_the_words_of_padded_input(packed, plain):
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        plain(nn.LSTM(I, H))
    with pytest.raises(theirs.type) as ours:
        packed(fastrnn.LSTM(I, H))
    assert str(ours.value) == str(theirs.value)


OWN_MISTAKES = {
    "lengths-shape": (
        {"lengths": [1, 2, 3]},
        "lengths must have shape [4] (one per sequence), got [3]",
    ),
    "lengths-too-long": (
        {"lengths": [1, 7, 3, 4]},
        "lengths must be at most the 6 steps of the input, got 7; "
        "pad the input to the longest sequence",
    ),
    "lengths-a-number": (
        {"lengths": 5},
        "lengths must be integers, one per sequence, got 5; for a batch of equal lengths use "
        "[5] * 4",
    ),
    "lengths-a-numpy-number": (
        {"lengths": np.int64(5)},
        "lengths must be integers, one per sequence, got np.int64(5); for a batch of equal "
        "lengths use [5] * 4",
    ),
    "lengths-in-a-set": (
        {"lengths": {3, 6, 1, 5}},
        "lengths must be a list or tensor in the order of the batch, got a set, which has an "
        "order of its own",
    ),
    "lengths-in-a-dict": (
        {"lengths": dict.fromkeys(LENGTHS)},
        "lengths must be a list or tensor in the order of the batch, got a dict, which has an "
        "order of its own",
    ),
    "lengths-of-bools": (
        {"lengths": [True, 6, 1, 5]},
        "lengths must be integers, one per sequence, got [True, 6, 1, 5]",
    ),
    "lengths-on-meta": (
        {"lengths": torch.tensor(LENGTHS, device="meta")},
        "lengths must have values, got a Tensor on meta that has none; on meta, under a fake mode "
        "and while tracing give lengths as a list",
    ),
    "mask-on-meta": (
        {"mask": MASK.to("meta")},
        "mask must have values, got a Tensor on meta that has none; on meta, under a fake mode "
        "and while tracing give lengths as a list",
    ),
    "lengths-negative": (
        {"lengths": torch.tensor([1, -1, 3, 4])},
        "lengths must not be negative, got -1",
    ),
    "lengths-float": ({"lengths": torch.ones(4)}, "lengths must be integers, got torch.float32"),
    "mask-dtype": (
        {"mask": torch.ones(T, B)},
        "mask must have dtype torch.bool, got torch.float32; use mask.bool()",
    ),
    "resets-shape": (
        {"resets": torch.ones(B, T, dtype=torch.bool)},
        "resets must have shape [6, 4] ([T, B], as batch_first says), got [4, 6]",
    ),
}


@pytest.mark.parametrize(("ragged", "words"), OWN_MISTAKES.values(), ids=OWN_MISTAKES)
def test_a_mistake_in_a_ragged_argument_is_named(ragged, words):
    with pytest.raises((ValueError, TypeError)) as error:
        make()(torch.zeros(T, B, I), **ragged)
    assert str(error.value) == words


def packed_in_order(x, lengths):
    """The sequences in the caller's order."""
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def jagged(x, lengths):
    parts = [x[:length, b] for b, length in enumerate(lengths)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("form", [packed_in_order, jagged], ids=["packed", "jagged"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("extra", [{}, {"mask": None}], ids=["lengths", "lengths-mask"])
def test_lengths_beyond_those_of_the_input_itself_are_refused(form, as_tensor, extra):
    """There a packed or jagged tensor holds other sequences' steps, or none."""
    own, asked = [3, 6, 2, 5], [3, 6, 4, 1]
    if extra:
        mask = torch.ones(T, B, dtype=torch.bool)
        extra = {"mask": mask if form is packed_in_order else mask.t()}
    with pytest.raises(ValueError) as error:
        make()(
            form(torch.zeros(T, B, I), own),
            lengths=torch.tensor(asked) if as_tensor else asked,
            **extra,
        )
    assert str(error.value) == (
        "lengths must be at most those of the input itself, got 4 for sequence 2, which has 2 steps"
    )


@pytest.mark.parametrize("form", [packed_in_order, jagged], ids=["packed", "jagged"])
def test_lengths_within_those_of_the_input_itself_shorten_it(form):
    lstm, x = make(), torch.randn(T, B, I)
    _, found = lstm(form(x, [3, 6, 2, 5]), lengths=[3, 4, 1, 5])
    _, expected = lstm(x, lengths=[3, 4, 1, 5])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_flags_of_a_jagged_tensor_are_named_as_such():
    with pytest.raises(ValueError) as error:
        make()(jagged(torch.zeros(T, B, I), LENGTHS), mask=MASK)
    assert str(error.value) == (
        "mask must have shape [4, 6] ([B, T], as of every jagged input, T its longest sequence), "
        "got [6, 4]"
    )


@pytest.mark.parametrize("name", ["mask", "resets"])
@pytest.mark.parametrize("shape", [(T, 1), (1, T), (T - 1,)], ids=str)
def test_flags_of_an_unbatched_sequence_have_one_axis(shape, name):
    with pytest.raises(ValueError) as error:
        make()(torch.zeros(T, I), **{name: torch.ones(shape, dtype=torch.bool)})
    assert str(error.value) == (
        f"{name} of an unbatched sequence must have shape [6] (one per step), got {list(shape)}"
    )


INPUTS = {
    "none": (None, TypeError, "got NoneType"),
    "list": ([[0.0] * I], TypeError, "got list; make a tensor of numbers with torch.as_tensor"),
    "array": (np.zeros((T, B, I)), TypeError, "got ndarray"),
    "an-lstms-result": ((states(T, B, I), None), TypeError, r"give an LSTM's result on as lstm"),
    "sparse": (states(T, B, I).to_sparse(), ValueError, r"dense .* got torch.sparse_coo; use"),
}


@pytest.mark.parametrize(("given", "kind", "words"), INPUTS.values(), ids=INPUTS)
def test_an_input_that_is_no_dense_tensor_is_refused_with_the_way_out(given, kind, words):
    with pytest.raises(kind, match=words):
        make()(given)


@pytest.mark.parametrize(
    ("hx", "words"),
    [
        (states(1, B, H), "got Tensor; an LSTM has two states where a GRU has one"),
        (states(2, B, H), "got Tensor"),
        ((None, None), r"got \(NoneType, NoneType\); leave hx out for zeros"),
        ((np.zeros((1, B, H)),) * 2, r"got \(ndarray, ndarray\)"),
    ],
    ids=["tensor", "tensor-of-two", "nones", "arrays"],
)
def test_states_that_are_no_pair_of_tensors_are_refused_with_the_way_out(hx, words):
    with pytest.raises(TypeError, match=r"hx must be a pair of tensors \(h_0, c_0\), " + words):
        make()(states(T, B, I), hx)


def test_a_setting_of_memory_that_does_not_exist_is_refused_when_it_is_used():
    lstm = make()
    lstm.memory = "bogus"
    with pytest.raises(ValueError, match="memory must be one of save, recompute, got 'bogus'"):
        lstm(states(T, B, I))


def test_a_state_of_another_dtype_is_refused_with_the_way_out():
    lstm = make()
    x, hx = problem(lstm)
    with pytest.raises(ValueError) as error:
        lstm(x, (hx[0].double(), hx[1]))
    assert str(error.value) == (
        "hidden[0] dtype (torch.float64) does not match input dtype (torch.float32). "
        "Convert it: hx[0].to(torch.float32)"
    )


def test_a_strided_nested_tensor_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"build it with\s+torch\.nested\.nested_tensor"):
        make()(torch.nested.nested_tensor([torch.zeros(3, I)]))


@pytest.mark.parametrize("name", ["mask", "resets"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_a_list_of_flags_is_refused(unbatched, name):
    x = torch.zeros(T, I) if unbatched else torch.zeros(T, 1, I)
    with pytest.raises(TypeError, match=f"{name} must be a bool tensor, got list"):
        make()(x, **{name: [True] * T})
