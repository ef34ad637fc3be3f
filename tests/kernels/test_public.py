"""backend="triton" through the public API and the cooperative interpreter."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.choosing import backends
from fastrnn.choosing import choose as choosing
from fastrnn.choosing.choose import Choice
from fastrnn.choosing.request import Request
from fastrnn.input.packing import ragged_layout
from fastrnn.ways import fused
from fastrnn_kernels import lstm_backward as backward_module
from fastrnn_kernels import lstm_forward as forward_module
from fastrnn_kernels import previous_states as previous_module
from fastrnn_kernels import trust
from fastrnn_kernels.launch import CannotLaunch
from tests.interpreter import Schedule, schedules
from tests.kernels.launches import on_kernels
from tests.oracle import (
    answer,
    assert_agree,
    assert_identical,
    everything,
    make_state,
    opchecks,
    oracle,
    padded,
    valid_steps,
)

pytestmark = pytest.mark.interpreter

B, T, I = 5, 4, 3
LENGTHS = [3, 0, 4, 1, 4]
RESIDENCIES = ("whole", "split", "streamed")
every_residency = pytest.mark.parametrize("residency", RESIDENCIES)


def make(H: int = 5, **config: object) -> fastrnn.LSTM:
    torch.manual_seed(0)
    return fastrnn.LSTM(I, H, backend="triton", **config)


def problem(
    lstm: fastrnn.LSTM, batch: int = B, steps: int = T
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    dtype = lstm.weight_ih_l0.dtype
    return torch.randn(steps, batch, I).to(dtype), make_state(lstm, batch)


def by_lengths(lstm, x, hx):
    return padded(lstm, x, hx, lengths=LENGTHS)


@every_residency
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "bidirectional": True},
        {"batch_first": True, "H": 1},
        {"memory": "recompute", "bidirectional": True},
    ],
    ids=["plain", "two-layers-bidirectional", "no-bias", "batch-first-H1", "recompute"],
)
def test_lengths(config: dict[str, object], residency: str) -> None:
    lstm = make(**config)
    x, hx = problem(lstm)
    with on_kernels(residency) as launches:
        found = everything(by_lengths, lstm, x, hx)
    assert launches.call_count == 2 * lstm.num_layers  # one forward, one backward
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


@pytest.mark.parametrize("schedule", schedules(), ids=str)
def test_any_order_of_programs(schedule: Schedule) -> None:
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    with on_kernels("split", schedule):
        found = everything(by_lengths, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


@every_residency
@pytest.mark.parametrize("form", ["dense", "mask", "resets", "mask-and-resets", "packed"])
def test_forms(form: str, residency: str) -> None:
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(T, B, generator=generator) < 0.7
    mask[:, 1] = False
    resets = torch.rand(T, B, generator=generator) < 0.3
    ragged = {
        "dense": {},
        "mask": {"valid": mask},
        "resets": {"resets": resets},
        "mask-and-resets": {"valid": mask, "resets": resets},
        "packed": {"valid": valid_steps([3, 2, 4, 1, 4], T)},
    }[form]

    def call(lstm, x, hx):
        if form == "packed":
            lengths = torch.tensor([3, 2, 4, 1, 4])
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            out, (h_n, c_n) = lstm(packed, hx)
            return torch.nn.utils.rnn.pad_packed_sequence(out)[0], h_n, c_n
        named = {"mask" if name == "valid" else name: value for name, value in ragged.items()}
        return padded(lstm, x, hx, **named)

    with on_kernels(residency):
        found = everything(call, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, **ragged))


@every_residency
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 4), (3, 1)], ids=["B1-T1", "B1", "T1"])
def test_a_single_step_or_sequence(batch: int, steps: int, residency: str) -> None:
    lstm = make(num_layers=2)
    x, hx = problem(lstm, batch, steps)
    with on_kernels(residency):
        found = everything(padded, lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("residency", "memory"),
    [("whole", "save"), ("split", "save"), ("streamed", "save"), ("whole", "recompute")],
)
def test_sixteen_bits_stay_within_the_budget(
    residency: str, memory: str, dtype: torch.dtype
) -> None:
    """Error against float64 <= 2 x (error of plain PyTorch in this dtype + a rounding)."""
    lstm = make(dtype=dtype, bidirectional=True, memory=memory)
    x, hx = problem(lstm)
    valid = valid_steps(LENGTHS, T)
    with on_kernels(residency):
        found = everything(by_lengths, lstm, x, hx)
    low = everything(lambda *args: oracle(*args, valid=valid)[:3], lstm, x, hx)
    for name, exact in answer(lstm, x, hx, valid=valid).items():
        assert found[name].dtype == dtype, name
        rounding = exact.abs().max() * torch.finfo(dtype).eps / 2
        budget = 2 * ((low[name].double() - exact).abs().max() + rounding)
        assert (found[name].double() - exact).abs().max() <= budget, name


def test_cell_states() -> None:
    lstm = make(num_layers=2, bidirectional=True)
    x, hx = problem(lstm)

    def call(lstm, x, hx):
        return padded(lstm, x, hx, lengths=LENGTHS, return_cell_states=True)

    valid = valid_steps(LENGTHS, T)
    with on_kernels():
        found = everything(call, lstm, x, hx)
        with torch.no_grad():
            inference = call(lstm, x, hx)
    assert_agree(found, answer(lstm, x, hx, valid=valid, cells=True))
    assert torch.equal(inference[3], found["cells"])


@pytest.mark.parametrize("bounded", [False, True], ids=["exact", "bounded"])
def test_padding_changes_nothing(bounded: bool) -> None:
    """Also where the lengths are on a device, so that all B * T rows are computed with."""
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    filled = x.masked_fill(~valid_steps(LENGTHS, T).unsqueeze(2), math.nan)
    with on_kernels(), _bounded() if bounded else contextlib.nullcontext():
        clean = everything(by_lengths, lstm, x, hx)
        found = everything(by_lengths, lstm, filled, hx)
    assert_identical(found, clean)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Layouts as they are where the lengths are on the device: without knowing them."""

    def layout(*arguments, **options):
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            return ragged_layout(*arguments, **options)

    with mock.patch("fastrnn.choosing.arrange.ragged_layout", layout):
        yield


def test_deterministic_and_a_second_backward_gives_the_same_bits() -> None:
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    with on_kernels():
        first = everything(by_lengths, lstm, x, hx)
        assert_identical(everything(by_lengths, lstm, x, hx), first)
        x.requires_grad_()
        out, h_n, c_n = by_lengths(lstm, x, hx)
        loss = out.square().sum() + h_n.sum() + c_n.square().sum()
        inputs = [x, *lstm.parameters()]
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_frozen_weights_and_unused_outputs() -> None:
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    expected = answer(lstm, x, hx, valid=valid_steps(LENGTHS, T), skip=("output", "h_n"))
    for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l0_reverse"):
        lstm.get_parameter(name).requires_grad_(False)
    x.requires_grad_()
    with on_kernels():
        _, _, c_n = by_lengths(lstm, x, hx)
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randint(-8, 9, size, generator=generator).div(8)
            for size in ((T, B, 10), c_n.shape, c_n.shape)
        ]
        c_n.backward(weights[2])
    assert_agree({"x": x.grad}, {"x": expected["d_x"]})
    for name, parameter in lstm.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None:
            assert_agree({name: parameter.grad}, {name: expected[f"d_{name}"]})


def test_double_backward_goes_through_the_differentiable_loop() -> None:
    lstm = make(bidirectional=True)
    reference = fastrnn.LSTM(I, 5, bidirectional=True, backend="reference")
    reference.load_state_dict(lstm.state_dict())
    found = []
    for module in (lstm, reference):
        torch.manual_seed(3)
        x, hx = problem(module)
        x.requires_grad_()
        with on_kernels():
            out, _, _ = by_lengths(module, x, hx)
            (d_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(d_x.square().sum(), [x, *module.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    lstm = make()
    x, hx = problem(lstm)
    with on_kernels(), torch.autocast("cpu", dtype=torch.bfloat16):
        out, h_n, _ = by_lengths(lstm, x, hx)
        out.float().square().sum().backward()
    assert out.dtype == h_n.dtype == torch.bfloat16
    assert lstm.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "memory"),
    [(torch.float32, "recompute"), (torch.bfloat16, "save")],
    ids=["float32-recompute", "bfloat16-save"],
)
def test_compiled_in_one_graph(dtype: torch.dtype, memory: str) -> None:
    lstm = make(bidirectional=True, dtype=dtype, memory=memory)
    x, hx = problem(lstm)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor(LENGTHS)

    def call(module, x, hx):
        return padded(module, x, hx, lengths=lengths)

    with on_kernels() as launches:
        eager = everything(call, lstm, x, hx)
        before = launches.call_count
        found = everything(lambda _, x, hx: _flatten(compiled(x, hx, lengths=lengths)), lstm, x, hx)
    assert launches.call_count == 2 * before
    assert_agree(found, eager, {torch.float32: 4e-6, torch.bfloat16: 2e-2}[dtype])
    torch._dynamo.reset()


def _flatten(result):
    out, (h_n, c_n) = result
    return out, h_n, c_n


@opchecks
@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_opcheck(memory: str, save: bool) -> None:
    from fastrnn.operators import lstm_layer_backward_op, lstm_layer_op

    lstm = make(bidirectional=True)
    sizes = torch.tensor([4, 2, 0])
    rows = torch.randn(6, I)
    h_0, c_0 = make_state(lstm, 4)
    weights = [weight.detach() for direction in lstm.all_weights for weight in direction]
    tensors = [rows, h_0, c_0, *weights]
    rows, h_0, c_0, *weights = (tensor.requires_grad_(save) for tensor in tensors)
    path = (True, False, True, save, "triton", memory)
    with on_kernels():
        torch.library.opcheck(lstm_layer_op, (rows, sizes, h_0, c_0, weights, *path))
        if not save:
            return
        with torch.no_grad():
            h, h_n, c_n, *states = lstm_layer_op(rows, sizes, h_0, c_0, weights, *path)
        plain = [tensor.detach() for tensor in (rows, h_0, c_0, *weights)]
        gradients = [torch.randn_like(tensor) for tensor in (h, h_n, c_n, states[0])]
        inputs = (plain[0], sizes, *plain[1:3], plain[3:], h, *states, True, False)
        torch.library.opcheck(lstm_layer_backward_op, (*gradients, *inputs, "triton", memory))


# --- where the kernels cannot run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"proj_size": 2}, "proj_size is a second product"),
        ({"dtype": torch.float64}, "compute float32, bfloat16 and float16, got torch.float64"),
        ({"H": 200_000, "device": "meta"}, "no tile fits"),
    ],
    ids=["proj_size", "float64", "too-wide"],
)
def test_a_layer_that_the_kernels_do_not_know_is_refused_with_the_reason(
    config: dict[str, object], reason: str
) -> None:
    lstm = make(**config)
    dtype, device = lstm.weight_ih_l0.dtype, lstm.weight_ih_l0.device
    with on_kernels(), pytest.raises(RuntimeError, match=reason):
        lstm(torch.zeros(T, B, I, dtype=dtype, device=device))


@pytest.mark.parametrize("refused", ["lstm_forward", "lstm_backward"])
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_launch_that_the_gpu_refuses_is_taken_over_by_the_loop(
    memory: str, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the kernels were chosen, not asked for."""
    lstm = make(bidirectional=True, memory=memory)
    x, hx = problem(lstm)
    module = forward_module if refused == "lstm_forward" else backward_module
    error = CannotLaunch("cuda:0 refused the launch: too many blocks in cooperative launch")

    chosen = mock.Mock(return_value=Choice("triton", "", backend="triton-or-reference"))
    with (
        on_kernels(),
        mock.patch("fastrnn.lstm.choose", chosen),
        mock.patch.object(module, refused, side_effect=error),
        caplog.at_level(logging.INFO, logger="fastrnn"),
    ):
        found = everything(by_lengths, lstm, x, hx)
    assert "too many blocks" in caplog.text
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))


def test_a_launch_that_the_gpu_refuses_is_an_error_where_the_kernels_were_asked_for() -> None:
    lstm = make()
    x, hx = problem(lstm)
    error = CannotLaunch("cuda:0 refused the launch: too many blocks in cooperative launch")
    with (
        on_kernels(),
        mock.patch.object(forward_module, "lstm_forward", side_effect=error),
        pytest.raises(RuntimeError, match="cannot run: cuda:0 refused the launch"),
    ):
        by_lengths(lstm, x, hx)


@pytest.mark.parametrize(
    "module", [forward_module, backward_module, previous_module], ids=["forward", "backward", "h'"]
)
def test_after_a_refused_launch_the_step_loop_ends_the_call_and_torch_takes_the_next(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lstm = make(bidirectional=True)
    lstm.backend = "auto"
    x, hx = problem(lstm)
    ways = []

    def choose(asked: Request) -> Choice:
        choice = choosing.choose(asked)
        ways.append(choice.way)
        return choice

    refusing = mock.Mock(side_effect=CannotLaunch("too many blocks in cooperative launch"))
    monkeypatch.setattr(module, "launching", refusing)
    monkeypatch.setattr(choosing, "_on_cpu", choosing._on_gpu)
    monkeypatch.setattr(choosing, "KERNEL_STEPS", 0)
    passes = "steps_forward" if module is forward_module else "steps_backward"
    loop = mock.Mock(wraps=getattr(fused, passes))
    monkeypatch.setattr(fused, passes, loop)
    trust.forget()
    with on_kernels(), mock.patch("fastrnn.lstm.choose", choose):
        found = [everything(by_lengths, lstm, x, hx) for _ in range(3)]
    trust.forget()
    assert ways == ["triton", "torch", "torch"]
    assert loop.call_count == refusing.call_count == 1
    expected = answer(lstm, x, hx, valid=valid_steps(LENGTHS, T))
    for each in found:
        assert_agree(each, expected)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["too many blocks" in record.getMessage() for record in warned] == [True]


@pytest.mark.parametrize("failing", ["check_forward", "check_backward"])
def test_a_kernel_that_fails_its_check_is_replaced_and_not_chosen_again(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTRNN_CHECK", "first")
    trust.forget()
    lstm = make(bidirectional=True)
    x, hx = problem(lstm)
    chosen = mock.Mock(return_value=Choice("triton", "", backend="triton-or-reference"))
    kind = (x.device, x.dtype, 5, 2)
    with (
        on_kernels() as launches,
        mock.patch.object(trust, "_needs_trust", return_value=True),
        mock.patch.object(trust.checking, failing, return_value="h is off by 3"),
        mock.patch("fastrnn.lstm.choose", chosen),
    ):
        assert backends.can_run_triton(*kind) is None
        found = everything(by_lengths, lstm, x, hx)
        assert "failed its check on cpu, h is off by 3" in backends.can_run_triton(*kind)
    assert_agree(found, answer(lstm, x, hx, valid=valid_steps(LENGTHS, T)))
    assert launches.call_count
    assert caplog.text.count("a kernel is not used by this process any more") == 1
    trust.forget()


def test_precision_follows_the_switch_of_cudnns_rnns() -> None:
    lstm = make()
    x, hx = problem(lstm)
    asked = []
    with (
        on_kernels(),
        mock.patch.object(
            forward_module, "precision_of", lambda _, precision: asked.append(precision) or "tf32"
        ),
    ):
        for allowed in (True, False):
            with torch.backends.cudnn.flags(allow_tf32=allowed):
                by_lengths(lstm, x, hx)
    assert asked == ["tf32", "tf32x3"]
