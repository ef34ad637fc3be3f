"""The offline gate of the norm kernel: it passes, and its rules can fail.

It compiles, which the interpreter's environment would prevent: each run is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn_kernels

PACKAGE = Path(fastrnn_kernels.__file__).parent
SNAPSHOT = PACKAGE.parent / "offline_norm.txt"
KERNEL, NORM = "gradient_kernel.py", "gradient_norm.py"
TABLE, BARRIER = "gradient_table.py", "grid_barrier.py"
BROKEN = {
    "relaxed wait": (BARRIER, 'sem="acquire"', 'sem="relaxed"', "the wait is not an acquire"),
    "no alignment promised": (
        KERNEL,
        "tl.multiple_of(ptr + head, 16)",
        "ptr + head",
        "not loaded 16 bytes at a time; gradients are not stored 16 bytes at a time",
    ),
    "few registers": (NORM, "MAX_REGISTERS = 64", "MAX_REGISTERS = 32", "spills"),
    "many programs": (
        TABLE,
        "PROGRAMS_PER_MULTIPROCESSOR = 2",
        "PROGRAMS_PER_MULTIPROCESSOR = 3",
        "registers of too few programs",
    ),
    "sums added by atomics": (
        KERNEL,
        "tl.store(partials_ptr + segment, partial)",
        "tl.atomic_add(partials_ptr + segment, partial)",
        "floating-point atomics",
    ),
    "blocks too large for the registers": (
        NORM,
        "BLOCK_BYTES = 16_384",
        "BLOCK_BYTES = 32_768",
        "a block is used before it is loaded as a whole",
    ),
}
SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    offline = importlib.import_module(f"{name}.offline_norm")
    scale = "stored" in name  # it doubles the time
    case = offline.NormCase("sm_90", "2", "bf16", True, scale, "scale")
    print(name, offline.examine(case).line, flush=True)
"""


def run(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.timeout(300)
def test_a_representative_part_passes_and_is_as_it_was() -> None:
    command = ("fastrnn_kernels.offline_norm", "--quick", "--check", str(SNAPSHOT))
    done = run(PACKAGE.parent, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 cases, 0 faulty" in done.stdout


@pytest.mark.timeout(300)
def test_rules_fail_where_they_should(tmp_path: Path) -> None:
    """Copies of the package in which one thing is broken, all in one process: it takes long."""
    names = []
    for name, (file, old, new, fault) in BROKEN.items():
        names.append(name.replace(" ", "_") + ("_stored" if "stored" in fault else ""))
        copy = tmp_path / names[-1]
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = (copy / file).read_text()
        assert old in text, name
        (copy / file).write_text(text.replace(old, new))
    done = run(tmp_path, "-c", SCRIPT, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = dict(zip(BROKEN, done.stdout.splitlines(), strict=True))
    unnoticed = [name for name in BROKEN if BROKEN[name][3] not in verdicts[name]]
    assert not unnoticed, verdicts
