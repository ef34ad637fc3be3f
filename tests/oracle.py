"""The right answer for a ragged batch, one step after the other in float64, and means to compare.

`everything` runs a call and returns each of its outputs and each gradient by name; `assert_agree`
compares two such results relative to each tensor's largest entry.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.choosing import costs
from fastrnn.choosing.arrange import Work
from fastrnn.choosing.costs import Costs, LayerCosts
from fastrnn.ways import onednn

# Of a tensor's largest entry: a few roundings, times the square root of the terms that are summed.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13}

CONFIGURATIONS = {
    "plain": {},
    "2-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "3-layers-bidirectional": {"num_layers": 3, "bidirectional": True},
    "everything": {
        "num_layers": 2,
        "bidirectional": True,
        "proj_size": 2,
        "bias": False,
        "batch_first": True,
    },
}
every_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


class Shape(NamedTuple):
    """A batch's size; its id is ``B3-T17-I5-H64``."""

    B: int
    T: int
    I: int
    H: int

    def __str__(self):
        return f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"


ODD_SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(3, 17, 5, 64),
    Shape(2, 1, 63, 65),
    Shape(5, 9, 65, 63),
    Shape(63, 3, 4, 1),
    Shape(65, 4, 1, 7),
    Shape(1, 65, 3, 5),
]
every_shape = pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)


def mixed_lengths(batch, steps):
    """From T down to 0, unsorted, with both ends where the batch has room for them."""
    return [steps, *((7 * b) % (steps + 1) for b in range(1, batch))]


LENGTHS = {
    "mixed": mixed_lengths,
    "equal": lambda batch, steps: [max(1, steps - 1)] * batch,
    "full": lambda batch, steps: [steps] * batch,
    "none": lambda batch, steps: [0] * batch,
    "one-step": lambda batch, steps: [1] * batch,
    "one-sequence-left": lambda batch, steps: [0] * (batch - 1) + [steps],
}
every_lengths = pytest.mark.parametrize("lengths_of", LENGTHS.values(), ids=LENGTHS)


def valid_steps(lengths, steps):
    """``[T, B]`` bool: the leading steps."""
    return torch.arange(steps).unsqueeze(1) < torch.tensor(lengths)


# --- which path runs -----------------------------------------------------------------------------

PATHS = {
    "loop": None,
    "one-rectangle": LayerCosts(layer=0.0, call=1.0, row=1e-9, step=0.0),
    "many-rectangles": LayerCosts(layer=0.0, call=1e-9, row=1.0, step=0.0),
    "padded": LayerCosts(layer=0.0, call=1.0, row=1e-9, step=0.0),
}
PROCESSORS = {"AVX2": "AVX2", "AVX512": "AVX512", "another": "NEON"}
every_processor = pytest.mark.parametrize(  # with conftest.py's fixture
    "capability", PROCESSORS.values(), ids=PROCESSORS, indirect=True
)
every_path = pytest.mark.parametrize("path", PATHS)
# opcheck copies what it is given since torch 2.14, and torch hides its own warning that the copies
# are no leaves from everybody but those to whom warnings are errors.
opchecks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@contextlib.contextmanager
def forced(path):
    """One path, whatever the others cost.

    The step loop; one rectangle with padding; rectangles without any; or the padded batch as it
    stands, where it can be: with lengths and nothing else, none of them zero, and without given
    states if bidirectional.
    """
    with contextlib.ExitStack() as stack:

        def patch(module, name, value):
            stack.enter_context(mock.patch.object(module, name, lambda *_, **__: value))

        patch(Work, "pad", path == "padded")
        if path == "loop":
            patch(onednn, "available", False)
        else:
            cost, never = PATHS[path], LayerCosts(layer=math.inf, call=0.0, row=0.0)
            patch(costs, "costs_of", Costs(cost, cost, never, never))
        yield


@contextlib.contextmanager
def without_onednn():
    """oneDNN switched off; torch warns of a setting for Intel GPUs that this does not touch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


# --- the answer ----------------------------------------------------------------------------------


def oracle(lstm, x, hx, *, valid=None, resets=None):
    """Output ``[T, B, D * P]``, h_n, c_n and the last layer's cell states ``[T, B, D * H]``.

    Args:
        lstm: whose weights to use; its batch_first is ignored.
        x: ``[T, B, I]``.
        hx: h_0 and c_0.
        valid: ``[T, B]`` bool; an invalid step outputs zeros and leaves the state as it was.
        resets: ``[T, B]`` bool; a sequence's state is zeroed before its next valid step in
            time, and, walking back, before the valid step that precedes it.
    """
    steps, batch = x.shape[:2]
    valid = torch.ones(steps, batch, dtype=torch.bool) if valid is None else valid
    weights = dict(lstm.named_parameters())
    directions = 2 if lstm.bidirectional else 1
    final_h, final_c = [], []
    for layer in range(lstm.num_layers):
        outputs, cells = [], []
        for direction in range(directions):
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            index = layer * directions + direction
            h, c = hx[0][index], hx[1][index]
            restarts = _restarts(valid, resets, reverse=direction == 1)
            h_steps, c_steps = [None] * steps, [None] * steps
            for t in reversed(range(steps)) if direction else range(steps):
                keep, fresh = valid[t].unsqueeze(1), restarts[t].unsqueeze(1)
                h_new, c_new = _step(
                    weights,
                    suffix,
                    torch.where(keep, x[t], 0.0),
                    torch.where(fresh, 0.0, h),
                    torch.where(fresh, 0.0, c),
                )
                h, c = torch.where(keep, h_new, h), torch.where(keep, c_new, c)
                h_steps[t], c_steps[t] = torch.where(keep, h, 0.0), torch.where(keep, c, 0.0)
            outputs.append(torch.stack(h_steps))
            cells.append(torch.stack(c_steps))
            final_h.append(h)
            final_c.append(c)
        x = torch.cat(outputs, 2)
    return x, torch.stack(final_h), torch.stack(final_c), torch.cat(cells, 2)


def _step(weights, suffix, x, h, c):
    gates = x @ weights[f"weight_ih_{suffix}"].t() + h @ weights[f"weight_hh_{suffix}"].t()
    if f"bias_ih_{suffix}" in weights:
        gates = gates + weights[f"bias_ih_{suffix}"] + weights[f"bias_hh_{suffix}"]
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    if f"weight_hr_{suffix}" in weights:
        h = h @ weights[f"weight_hr_{suffix}"].t()
    return h, c


def _restarts(valid, resets, *, reverse):
    """``[T, B]`` bool: the valid steps that start from a zero state in the direction walked."""
    restarts = torch.zeros_like(valid)
    if resets is None:
        return restarts
    for b in range(valid.shape[1]):
        pending, before = False, None
        for t in range(valid.shape[0]):
            pending = pending or bool(resets[t, b])
            if not valid[t, b]:
                continue
            if pending and not reverse:
                restarts[t, b] = True
            elif pending and before is not None:
                restarts[before, b] = True
            pending, before = False, t
    return restarts


# --- every output and every gradient -------------------------------------------------------------


def make_state(lstm, batch, dtype=None):
    """Random h_0 and c_0, in the dtype of the weights."""
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    dtype = dtype or lstm.weight_ih_l0.dtype
    h_0 = torch.randn(rows, batch, lstm.proj_size or lstm.hidden_size).to(dtype)
    return h_0, torch.randn(rows, batch, lstm.hidden_size).to(dtype)


def everything(call, lstm, x, hx, *, skip=()):
    """The outputs of ``call(lstm, x, hx)`` and the gradients of all their entries' weighted sum.

    The weights of the sum are multiples of 1/8, exact in every dtype, and depend on shapes only.

    Args:
        call: returns output, h_n, c_n, and cell states if it likes; tensors of any shape.
        lstm: whose parameters' gradients are taken.
        x: the input; a leaf is made of it.
        hx: h_0 and c_0; leaves are made of them.
        skip: outputs left out of the sum.
    """
    leaves = {"x": x, "h_0": hx[0], "c_0": hx[1]}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    values = call(lstm, leaves["x"], (leaves["h_0"], leaves["c_0"]))
    outputs = dict(zip(("output", "h_n", "c_n", "cells"), values))
    leaves |= lstm.named_parameters()
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: torch.randint(-8, 9, value.shape, generator=generator).div(8).to(value.dtype)
        for name, value in outputs.items()
    }
    summed = [name for name in outputs if name not in skip]
    found = torch.autograd.grad(
        [outputs[name] for name in summed],
        list(leaves.values()),
        [gradients[name] for name in summed],
        materialize_grads=True,
    )
    results = {name: value.detach() for name, value in outputs.items()}
    return results | {f"d_{name}": gradient for name, gradient in zip(leaves, found)}


def as_function(lstm, lengths, **options):
    """All outputs as a function of x, h_0, c_0 and the weights."""
    names = [name for name, _ in lstm.named_parameters()]

    def function(x, h_0, c_0, *weights):
        output, states, *cells = functional_call(
            lstm, dict(zip(names, weights)), (x, (h_0, c_0)), {"lengths": lengths, **options}
        )
        return output, *states, *cells

    return function


def answer(lstm, x, hx, *, valid=None, resets=None, cells=False, skip=()):
    """`everything` of the oracle in float64, with the weights that `lstm` has."""

    def call(lstm, x, hx):
        return oracle(lstm, x, hx, valid=valid, resets=resets)[: 4 if cells else 3]

    double = fastrnn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        lstm.bias,
        bidirectional=lstm.bidirectional,
        proj_size=lstm.proj_size,
        dtype=torch.float64,
    )
    double.load_state_dict(copy.deepcopy(lstm.state_dict()))
    return everything(call, double, x.double(), (hx[0].double(), hx[1].double()), skip=skip)


def assert_agree(actual, expected, tolerance=None):
    """Same names; each tensor within `tolerance` of the other's largest entry (zeros: exactly)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        of = TOLERANCE[actual[name].dtype] if tolerance is None else tolerance
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=0,
            atol=of * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_identical(actual, expected):
    """Same names, same bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_within_budget(found, low, exact, dtype):
    """Error against float64 at most 1.5 times the low-precision LSTM's and one rounding.

    In the mean of squares: the largest of a few numbers scatters by more than that.
    """
    assert found.keys() == low.keys() == exact.keys()
    for name, right in exact.items():
        error, their_error = (_mean(value[name].double() - right) for value in (found, low))
        rounding = torch.finfo(dtype).eps / 2 * _mean(right)
        assert error <= 1.5 * (their_error + rounding), (name, error, their_error, rounding)


def _mean(values):
    return values.square().mean().sqrt().item()


# --- the forms a ragged batch comes in -----------------------------------------------------------


def padded(lstm, x, hx, **ragged):
    """Call with a time-major ``x``, mask and resets, whatever batch_first is; the result is too."""
    if not lstm.batch_first:
        return _flat(lstm(x, hx, **ragged))
    for name in ("mask", "resets"):
        if ragged.get(name) is not None:
            ragged[name] = ragged[name].t()
    output, *rest = _flat(lstm(x.transpose(0, 1), hx, **ragged))
    rest[2:] = [cells.transpose(0, 1) for cells in rest[2:]]
    return output.transpose(0, 1), *rest


def _flat(result):
    output, (h_n, c_n), *cells = result
    return output, h_n, c_n, *cells


def by_list(lstm, x, hx, lengths):
    return padded(lstm, x, hx, lengths=lengths)


def by_tensor(lstm, x, hx, lengths):
    return padded(lstm, x, hx, lengths=torch.tensor(lengths))


def by_int32(lstm, x, hx, lengths):
    return padded(lstm, x, hx, lengths=torch.tensor(lengths, dtype=torch.int32))


def by_mask(lstm, x, hx, lengths):
    return padded(lstm, x, hx, mask=valid_steps(lengths, x.shape[0]))


def by_lengths_and_mask(lstm, x, hx, lengths):
    """Each alone says too much."""
    longer = [min(length + b % 2, x.shape[0]) for b, length in enumerate(lengths)]
    wider = [min(length + 1 - b % 2, x.shape[0]) for b, length in enumerate(lengths)]
    return padded(lstm, x, hx, lengths=longer, mask=valid_steps(wider, x.shape[0]))


def by_packing(lstm, x, hx, lengths):
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h_n, c_n = _flat(lstm(packed, hx))
    return pad_packed_sequence(output, total_length=x.shape[0])[0], h_n, c_n


def by_jagged(lstm, x, hx, lengths):
    rows = torch.cat([x[:length, b] for b, length in enumerate(lengths)])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    output, h_n, c_n = _flat(lstm(torch.nested.nested_tensor_from_jagged(rows, offsets), hx))
    parts = output.values().split(lengths)
    parts = [torch.nn.functional.pad(part, (0, 0, 0, x.shape[0] - len(part))) for part in parts]
    return torch.stack(parts, 1), h_n, c_n


FORMS = {
    "list": by_list,
    "tensor": by_tensor,
    "int32": by_int32,
    "mask": by_mask,
    "lengths-and-mask": by_lengths_and_mask,
    "packed": by_packing,
    "jagged": by_jagged,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
