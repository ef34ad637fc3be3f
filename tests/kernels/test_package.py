"""What importing the package does."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_neither_triton_nor_torch() -> None:
    code = (
        "import sys; import fastrnn_kernels; "
        "print(sorted({'triton', 'torch'} & {name.split('.')[0] for name in sys.modules}))"
    )
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path
    )
    assert done.stdout.strip() == "[]"


def test_the_tiling_needs_no_triton() -> None:
    code = "import sys; import fastrnn_kernels.tiling; print('triton' in sys.modules)"
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path
    )
    assert done.stdout.strip() == "False"
