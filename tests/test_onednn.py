"""Where torch's oneDNN LSTM can run, and where not."""

from __future__ import annotations

import pytest
import torch

from fastrnn import onednn
from tests.oracle import without_onednn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_it_runs_float32_rows_on_the_cpu():
    assert onednn.available(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32)],
    ids=["float64", "bfloat16", "meta"],
)
def test_it_does_not_run(device, dtype):
    assert not onednn.available(torch.device(device), dtype)


def test_it_does_not_run_where_it_is_switched_off():
    with without_onednn():
        assert not onednn.available(torch.device("cpu"), torch.float32)
