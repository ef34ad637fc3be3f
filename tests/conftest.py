"""What every test shares: fixed seeds, one thread per pytest worker, the conditions of markers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fastrnn.choosing.costs import costs_of

# The same examples on every run, so a red run can be repeated; no deadline: CI's cores are shared.
hypothesis.settings.register_profile("fastrnn", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastrnn")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1")
    has_gpu = torch.cuda.is_available()
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and not interprets:
            item.add_marker(no_interpreter)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test starts from the same random state; torch's global settings outlive no test."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A processor that torch says to be of this capability; for oracle.py's every_processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    costs_of.cache_clear()
    yield request.param
    costs_of.cache_clear()
