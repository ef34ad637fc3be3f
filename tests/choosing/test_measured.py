"""Ways that were measured: what is timed, what is kept, and what is done with it."""

from __future__ import annotations

import json

import pytest
import torch

import fastrnn
from fastrnn.choosing import measured

B, T, I, H = 3, 5, 2, 4


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.forget()
    yield tmp_path
    measured.forget()


def request(steps=T, lengths=None, train=True, hidden_size=H):
    lstm = fastrnn.LSTM(I, hidden_size).requires_grad_(train)
    return lstm._read(torch.randn(steps, B, I), None, lengths, None, None, False)[0]


def clock_of(seconds):
    """A way takes so long, and a clock of its own says so."""
    now, ran = [0.0], []

    def run(asked, way):
        ran.append(way)
        now[0] += seconds[way]

    return run, lambda: now[0], ran


def measure(asked, torch_seconds, triton_seconds, rounds=4):
    seconds = {"torch": torch_seconds, "triton": triton_seconds}
    run, clock, ran = clock_of(seconds)
    return measured.measure(asked, run, rounds=rounds, clock=clock), ran


def test_the_faster_way_is_kept_for_the_class(own_store):
    assert measured.fastest(request()) is None
    found, _ = measure(request(), 2e-3, 1e-3)
    assert found == {"torch": pytest.approx(2000), "triton": pytest.approx(1000)}
    assert measured.fastest(request(steps=8)) == "triton"  # up to the next power of two
    (file,) = (own_store / "fastrnn").glob("ways-*.json")
    assert list(json.loads(file.read_text())["ways"]) == [measured.class_of(request())]


@pytest.mark.parametrize(
    "other",
    [{"steps": 9}, {"lengths": [5, 2, 1]}, {"train": False}, {"hidden_size": 8}],
    ids=["longer", "ragged", "inference", "wider"],
)
def test_another_class_is_another_question(other):
    measure(request(), 1e-3, 2e-3)
    assert measured.fastest(request(**other)) is None


def test_the_ways_take_turns_after_a_warm_up():
    _, ran = measure(request(), 1e-3, 1e-3, rounds=2)
    assert ran == ["torch", "triton", "triton", "torch", "torch", "triton"]


def test_a_file_that_is_not_what_it_should_be_is_as_good_as_none(own_store, caplog):
    measure(request(), 1e-3, 2e-3)
    (file,) = (own_store / "fastrnn").glob("ways-*.json")
    file.write_text(file.read_text().replace('"torch"', '"cudnn"'))
    measured.forget()
    assert measured.fastest(request()) is None
    assert "measured ways" in caplog.text and "fastrnn.tune" in caplog.text
