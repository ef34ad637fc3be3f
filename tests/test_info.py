"""`python -m fastrnn info`: complete, readable, JSON; with GPUs and without, and without triton."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fastrnn import info as info_module
from fastrnn.choosing import backends
from fastrnn.choosing.environment import SWITCHES, switch
from fastrnn.info import info
from fastrnn.recipes.command_line import main

SECTIONS = ["versions", "devices", "shape", "can run", "tiles", "caches", "switches", "environment"]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from fastrnn_kernels import tile_store, trust

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    switch.cache_clear()
    for store in (tile_store, trust):
        store.forget()
    yield tmp_path
    switch.cache_clear()
    for store in (tile_store, trust):
        store.forget()


def test_every_section_is_there_in_text_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == SECTIONS
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip(":") for line in lines if not line.startswith(" ")][: len(SECTIONS)] == [
        *SECTIONS
    ]
    assert f"  torch: {torch.__version__}" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where it is")
def test_without_a_gpu_it_says_so() -> None:
    found = info()
    assert list(found["devices"]) == ["cpu"]
    assert found["can run"]["cpu"]["LSTM by torch's own"] == "yes"
    assert found["can run"]["cpu"]["LSTM by the kernels"].startswith("no: the kernels run on GPUs")
    assert "no GPU here" in found["tiles"]["none"]


def test_a_chip_that_is_elsewhere_can_be_asked_for() -> None:
    from fastrnn_kernels.tiling import CHIPS, forward_tile

    found = info(512, 64, 2, torch.float16, "sm_80")["tiles"]["sm_80"]
    tile = forward_tile(64, 512, 2, torch.float16, CHIPS["sm_80"], "tf32")
    assert found["forward"]["BLOCK_B"] == tile.BLOCK_B
    assert found["forward"]["programs"] == tile.unit_programs * tile.batch_programs * 2
    assert "no tile fits" in info(200_000, chip="sm_80")["tiles"]["sm_80"]["backward"]
    assert info(chip="sm_5")["tiles"]["sm_5"].startswith("unknown; the tests compile for sm_80")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """An H100 that torch describes; nothing can be put on it."""
    from fastrnn_kernels import tiling

    device = torch.device("cuda", 0)
    properties = SimpleNamespace(
        name="an H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(info_module, "gpus", lambda: [device])
    monkeypatch.setattr(info_module, "_driver", lambda: "13.0")
    monkeypatch.setattr(info_module, "can_run_kernel", lambda grads, norm_type: None)
    monkeypatch.setattr(info_module.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(backends, "_device_reason", lambda *_: None)
    monkeypatch.setattr(tiling, "_chip_of_gpu", lambda index: tiling.CHIPS["sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    return device


def test_a_gpu_with_its_tiles_measured_ones_and_verdicts(gpu: torch.device) -> None:
    from fastrnn_kernels import tile_store, trust
    from fastrnn_kernels.tiling import CHIPS, forward_tile

    shape = (64, 256, 1, torch.bfloat16)
    tile = forward_tile(*shape, CHIPS["sm_90"], "tf32")
    measured = tile_store.ShapeClass.of("forward", *shape, gpu, "tf32")
    tile_store.save_tiles({measured: (tile, 12.5)})
    trust.verdicts.add({"an H100/13000/forward/H8": None, "an H100/13000/forward/H16": "h is off"})
    found = info()
    assert found["devices"]["cuda:0"]["architecture"] == "sm_90"
    assert found["can run"]["cuda:0"]["LSTM by the kernels"] == "yes"
    assert found["tiles"]["cuda:0"]["forward"]["chosen"] == "by measurement"
    assert found["tiles"]["cuda:0"]["backward"]["chosen"] == "by rule"
    assert found["caches"]["measured tiles"]["of"] == [measured.key]
    verdicts = found["caches"]["verdicts of checks"]
    assert verdicts["passed"] == 1
    assert verdicts["failed"] == {"an H100/13000/forward/H16": "h is off"}


def test_a_refused_kernel_is_a_reason(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn_kernels import trust

    monkeypatch.setitem(trust._refused_layers, (gpu, torch.bfloat16, 256, 1), "no C compiler")
    assert info()["can run"]["cuda:0"]["LSTM by the kernels"] == "no: no C compiler"


def test_caches_have_a_place_and_say_whether_they_can_be_written(own_caches: Path) -> None:
    found = info()["caches"]
    assert str(own_caches) in found["measured tiles"]["place"]
    assert found["measured tiles"]["writable"]
    with mock.patch("os.access", return_value=False):
        assert not info()["caches"]["verdicts of checks"]["writable"]


def test_switches_and_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CHECK", "always")
    monkeypatch.setenv("FASTRNN_TUNE", "maybe")
    monkeypatch.setenv("FASTRNN_BACKENDS", "torch")
    found = info()["switches"]
    assert set(SWITCHES) < set(found)
    assert found["FASTRNN_CHECK"].startswith("always (0|first|always: ")
    assert found["FASTRNN_TUNE"].startswith("FASTRNN_TUNE must be one of 0, 1, got 'maybe'")
    assert found["FASTRNN_BACKENDS"] == "is no switch of fastrnn"


def test_the_home_directory_stays_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/somebody/triton")
    text = json.dumps(info())
    assert "somebody" not in text
    assert "~/triton" in text


def test_it_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "from fastrnn.recipes.command_line import main; sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed: pip install triton" in done.stdout
