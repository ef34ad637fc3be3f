"""The rules of choose.py, device by device; devices that are not here are named by the input."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.choosing import choose as choosing
from fastrnn.choosing import cudnn, measured
from fastrnn.choosing.choose import choose
from fastrnn.choosing.environment import switch

H200 = cudnn.Gpu((9, 0), 132)


def request(
    device="cpu",
    *,
    dtype=torch.float32,
    steps=40,
    batch=16,
    sizes=(128, 512),
    lengths=None,
    train=True,
    packed=False,
    cell_states=False,
    **options,
):
    """What such a call asks for, its input said to be on ``device``."""
    lstm = fastrnn.LSTM(*sizes, dtype=dtype, **options).requires_grad_(train)
    x = torch.zeros(steps, batch, sizes[0], dtype=dtype)
    if packed:
        x = pack_padded_sequence(x, [steps, *[1] * (batch - 1)])
    asked, _ = lstm._read(x, None, lengths, None, None, cell_states)
    asked.form.device = torch.device(device)
    return asked


@pytest.fixture
def a_gpu(monkeypatch):
    """One that the kernels run on, and nothing measured."""
    monkeypatch.setattr(choosing, "can_run_triton", lambda *_: None)
    monkeypatch.setattr(choosing, "_streams", lambda _: False)
    monkeypatch.setattr(cudnn.Gpu, "of", lambda _: H200)
    monkeypatch.setattr(measured, "fastest", lambda _: None)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(choosing, "can_run_triton", lambda *_: "the GPU has 7.5")


RAGGED = {"lengths": [40] * 8 + [3] * 8}

# --- devices without kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize(
    "call",
    [{}, RAGGED, {"packed": True}, {"dtype": torch.float64}, {"proj_size": 8}, {"train": False}],
    ids=["dense", "ragged", "packed", "float64", "projection", "inference"],
)
def test_without_kernels_torch_runs_and_never_the_step_loop(no_kernels, call, device):
    assert choose(request(device, **call)).way == "torch"


@pytest.mark.parametrize(
    "call", [{"cell_states": True}, {"memory": "recompute"}], ids=["cell-states", "recompute"]
)
def test_without_kernels_the_step_loop_does_what_torch_cannot(no_kernels, call):
    assert choose(request("cuda", **call)).way == "loop"


# --- a GPU with kernels --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "way"),
    [
        ({"dtype": torch.bfloat16}, "triton"),
        ({"dtype": torch.float16}, "torch"),
        ({"dtype": torch.float16, "batch": 17}, "triton"),
        ({"dtype": torch.float16, "num_layers": 2}, "triton"),
        ({"dtype": torch.float16} | RAGGED, "triton"),
        ({"dtype": torch.float16, "packed": True}, "triton"),
        ({"sizes": (128, 128)}, "torch"),
        ({"sizes": (128, 192)}, "triton"),
        ({"sizes": (128, 192), "train": False}, "torch"),
        ({"sizes": (128, 128)} | RAGGED, "triton"),
        ({"steps": 8}, "torch"),
        ({"steps": 9}, "triton"),
        ({"cell_states": True}, "triton"),
        ({"sizes": (128, 128), "memory": "recompute"}, "triton"),
    ],
    ids=str,
)
def test_the_kernels_run_but_where_cudnn_is_persistent_or_steps_are_few(a_gpu, call, way):
    assert choose(request("cuda", **call)).way == way


def test_float32_weights_that_do_not_stay_on_chip_are_torchs(a_gpu, monkeypatch):
    monkeypatch.setattr(choosing, "_streams", lambda _: True)
    assert choose(request("cuda")).way == "torch"
    assert choose(request("cuda", dtype=torch.bfloat16)).way == "triton"


def test_lengths_on_the_device_are_the_kernels_where_torch_would_wait(a_gpu):
    asked = request("cuda", steps=3, lengths=[3] * 16)
    on_device = torch.empty(16, dtype=torch.int64, device="meta")
    assert choose(asked._replace(lengths=on_device)).way == "triton"
    assert choose(asked).way == "torch"


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_a_measurement_decides_before_any_rule(a_gpu, monkeypatch, way):
    monkeypatch.setattr(measured, "fastest", lambda _: way)
    for call in ({"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        choice = choose(request("cuda", **call))
        assert choice.way == way
        assert not choice.by_rule


def test_a_class_is_measured_at_first_sight_where_that_is_asked_for(monkeypatch, tmp_path):
    """FASTRNN_TUNE=1; the kernels are the step loop here, and the rule says that they can run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTRNN_TUNE", "1")
    switch.cache_clear()
    measured.forget()
    seen = []
    monkeypatch.setattr(
        "fastrnn.lstm.choose", lambda asked: choosing.Choice("loop", "", by_rule=not seen)
    )
    monkeypatch.setattr(measured, "measure", lambda asked, run: seen.append(run))
    lstm = fastrnn.LSTM(3, 4)
    lstm(torch.randn(6, 2, 3), lengths=[6, 2])
    lstm(torch.randn(6, 2, 3), lengths=[6, 2])
    switch.cache_clear()
    assert len(seen) == 1


# --- the CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "way"),
    [
        ({"steps": 1}, "cell"),
        ({"steps": 1, "dtype": torch.float64}, "cell"),
        ({"steps": 1, "batch": 64, "train": False}, "dense"),
        ({"steps": 1, "proj_size": 8}, "torch"),
        ({}, "dense"),
        ({"dtype": torch.float64}, "loop"),
        ({"dtype": torch.float64, "train": False}, "torch"),
        ({"dtype": torch.float64, "steps": 5}, "torch"),
        ({"dtype": torch.float64, "train": False} | RAGGED, "torch"),
        ({"proj_size": 8}, "loop"),
        ({"proj_size": 8, "train": False}, "torch"),
        ({"packed": True, "steps": 5}, "torch"),
        ({"cell_states": True}, "loop"),
        ({"memory": "recompute"}, "loop"),
    ],
    ids=str,
)
def test_on_the_cpu(call, way):
    assert choose(request(sizes=(12, 16), **call)).way == way


def test_equal_lengths_that_come_packed_are_a_dense_batch():
    lstm, x = fastrnn.LSTM(3, 4), torch.randn(6, 2, 3)
    packed = pack_padded_sequence(x, [6, 6])
    asked, _ = lstm._read(packed, None, None, None, None, False)
    assert choose(asked).way == "dense"
    assert torch.equal(lstm(packed)[0].data.view(6, 2, 4), lstm(x)[0])


# --- by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_environment_overrides_every_module(monkeypatch, backend):
    monkeypatch.setenv("FASTRNN_BACKEND", backend)
    switch.cache_clear()
    way = choose(request()).way
    switch.cache_clear()
    assert way == {"torch": "torch", "reference": "loop"}[backend]
