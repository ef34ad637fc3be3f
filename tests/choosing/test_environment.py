"""The environment's switches: read once, checked, and what they do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import fastrnn
from fastrnn.choosing import environment
from fastrnn.choosing.environment import SWITCHES, misspelt, surroundings, switch


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    switch.cache_clear()
    yield
    switch.cache_clear()


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_that_is_not_set_has_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert switch(name) == SWITCHES[name].default
    monkeypatch.setenv(name, "")
    switch.cache_clear()
    assert switch(name) == SWITCHES[name].default


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in SWITCHES for value in SWITCHES[name].values]
)
def test_each_value_is_taken(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert switch(name) == value


def test_another_value_is_an_error_that_names_those_that_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", "cuda")
    words = "FASTRNN_BACKEND must be one of torch, reference, got 'cuda'"
    with pytest.raises(ValueError, match=words):
        fastrnn.LSTM(2, 3)(torch.zeros(4, 1, 2))


def test_the_kernels_know_the_same_values_of_theirs() -> None:
    program = (
        "from typing import get_args; from fastrnn.choosing.environment import SWITCHES;"
        "from fastrnn_kernels.trust import CheckMode;"
        "assert SWITCHES['FASTRNN_CHECK'].values == get_args(CheckMode)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("asked", ["auto", "reference", "torch"])
@pytest.mark.parametrize(("forced", "way"), [("torch", "torch"), ("reference", "loop")])
def test_a_backend_can_be_put_in_the_place_of_every_other(
    forced: str, way: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrnn import lstm as lstm_module
    from fastrnn.choosing import choose as choosing

    monkeypatch.setenv("FASTRNN_BACKEND", forced)
    found = []

    def choose(request):
        choice = choosing.choose(request)
        found.append(choice.way)
        return choice

    with mock.patch.object(lstm_module, "choose", choose):
        fastrnn.LSTM(2, 3, backend=asked)(torch.zeros(4, 1, 2))
    assert found == [way]


def test_gradients_are_clipped_without_a_kernel_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn.clip.gradient_norms import can_run_kernel

    monkeypatch.setenv("FASTRNN_BACKEND", "torch")
    assert can_run_kernel([mock.Mock(is_cuda=True)], 2.0) == "FASTRNN_BACKEND=torch is set"


def test_a_forced_backend_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_BACKEND", "reference")
    lstm, x = fastrnn.LSTM(2, 3), torch.randn(4, 2, 2)
    compiled = torch.compile(lstm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
    torch._dynamo.reset()


def test_what_is_set_is_shown_and_what_is_misspelt_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment.os,
        "environ",
        {"TRITON_CACHE_DIR": "a", "FASTRNN_CHECKS": "0", "HOME": "b", "XDG_CACHE_HOME": "c"},
    )
    assert surroundings() == {"FASTRNN_CHECKS": "0", "TRITON_CACHE_DIR": "a", "XDG_CACHE_HOME": "c"}
    assert misspelt() == ["FASTRNN_CHECKS"]
