"""Copies of the kernels' package with one piece of text replaced, for tests that must fail then."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import fastrnn_kernels

_PACKAGE = Path(fastrnn_kernels.__file__).parent
_NAME = "mutant_of_fastrnn_kernels"


@contextmanager
def mutated(file: str, old: str, new: str, count: int, module: str) -> Iterator[ModuleType]:
    """`module` of a copy in which `old`, which stands `count` times in `file`, is `new`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / _NAME
        shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = (copy / file).read_text()
        found = text.count(old)
        assert found == count, f"{old!r} stands {found} times in {file}, not {count}"
        (copy / file).write_text(text.replace(old, new))
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(f"{_NAME}.{module}")
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.split(".")[0] == _NAME]:
                del sys.modules[name]
