"""Where torch's oneDNN LSTM can run, and where not."""

from __future__ import annotations

import pytest
import torch

from fastrnn import onednn
from tests.oracle import without_onednn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_it_runs_float32_rows_on_the_cpu():
    assert onednn.available(torch.zeros(2, 3))


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, 3, device="meta"),
    ],
    ids=["float64", "bfloat16", "meta"],
)
def test_it_does_not_run(rows):
    assert not onednn.available(rows)


def test_it_does_not_run_where_it_is_switched_off():
    with without_onednn():
        assert not onednn.available(torch.zeros(2, 3))
