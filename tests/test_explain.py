"""explain says what forward does, and FASTRNN_LOG says it while it does."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.choosing import describe
from fastrnn.choosing.environment import switch

B, T, I, H = 4, 30, 3, 8


def test_it_says_way_reason_and_what_stands_against_others():
    found = fastrnn.explain(fastrnn.LSTM(I, H, dtype=torch.float64), torch.zeros(T, B, I).double())
    assert found.way == "loop"
    assert set(found.others) == {"triton", "oneDNN"}
    assert str(found).splitlines()[0] == "I3 H8 L1 D1 B<=4 T<=32 float64 training on cpu"
    assert "not triton: the kernels compute float32" in str(found)


@pytest.mark.parametrize(
    ("options", "way"),
    [({}, "dense"), ({"lengths": [30, 2, 1, 1]}, None), ({"return_cell_states": True}, "loop")],
    ids=["dense", "lengths", "cell-states"],
)
def test_what_it_says_is_what_runs(options, way, monkeypatch):
    lstm, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    ran = []
    compute = fastrnn.lstm.compute
    monkeypatch.setattr(
        fastrnn.lstm,
        "compute",
        lambda asked, choice: ran.append(choice.way) or compute(asked, choice),
    )
    monkeypatch.setattr(fastrnn.LSTM, "_dense_on_cpu", lambda *_: None)
    found = fastrnn.explain(lstm, x, **options)
    lstm(x, **options)
    assert ran == [found.way]
    assert way is None or found.way == way


def test_nothing_is_computed():
    lstm = fastrnn.LSTM(I, H, device="meta")
    with pytest.raises(TypeError, match=r"fastrnn\.convert"):
        fastrnn.explain(nn.LSTM(I, H), torch.zeros(T, B, I))
    assert fastrnn.explain(lstm, torch.zeros(T, B, I, device="meta")).way == "torch"


def test_each_class_of_calls_is_logged_once_where_that_is_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("FASTRNN_LOG", "paths")
    switch.cache_clear()
    describe._log_once.cache_clear()
    lstm = fastrnn.LSTM(I, H)
    with caplog.at_level(logging.WARNING, "fastrnn"):
        for steps in (30, 31, 3):
            lstm(torch.randn(steps, B, I))
        lstm(torch.randn(T, B, I), lengths=[30, 2, 2, 1])
    switch.cache_clear()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("I3 H8 L1 D1 B<=4 T<=32 float32 training on cpu: dense, for ")
    assert "lengths" in lines[2]
