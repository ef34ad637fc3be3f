"""A wheel and a source distribution hold what they need, and work where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77.0.3", reason="it builds the distributions")

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (".*", "__pycache__", "*.pyc", "build", "dist", "site", "runs", "*.egg-info")
# What a user of the wheel would miss first.
IN_WHEEL = {
    "fastrnn/__init__.py",
    "fastrnn/py.typed",
    "fastrnn/recipes/data/vowels_train.txt.xz",
    "fastrnn/recipes/data/vowels.md",
    "fastrnn_kernels/__init__.py",
    "fastrnn_kernels/lstm_forward.py",
    "fastrnn_kernels/py.typed",
}


def sources():
    """All files of the checkout that belong to the project, as paths below it."""
    found = shutil.ignore_patterns(*NOT_SOURCES)
    names = set()
    for folder, folders, files in os.walk(ROOT):
        ignored = found(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in ignored]
        kept = (Path(folder, name) for name in files if name not in ignored)
        names |= {path.relative_to(ROOT).as_posix() for path in kept}
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, built from a copy without isolation, so without a network."""
    folder = tmp_path_factory.mktemp("built")
    copy, out = folder / "copy", folder / "out"
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    out.mkdir()
    program = (
        "import sys; from setuptools import build_meta as build; out = sys.argv[1]; "
        "print(build.build_sdist(out)); print(build.build_wheel(out))"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program, str(out)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "absent from the `packages` configuration" not in result.stdout + result.stderr
    return out


def test_the_wheel_holds_both_packages_and_nothing_else(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    assert names >= IN_WHEEL
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "fastrnn",
        "fastrnn_kernels",
    }


def test_the_source_distribution_holds_every_file(built):
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert sources() - names == set()


def test_the_version_stands_in_one_place(built):
    import fastrnn

    [wheel] = built.glob("*.whl")
    assert wheel.name.startswith(f"fastrnn-{fastrnn.__version__}-")
    texts = [ROOT / "pyproject.toml", ROOT / "CITATION.cff"]
    assert not any(fastrnn.__version__ in path.read_text() for path in texts)


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_outside_the_checkout(built, tmp_path):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )

    where = run("-c", "import fastrnn, fastrnn_kernels; print(fastrnn.__file__)")
    assert where.stdout.startswith(str(tmp_path / "installed")), where.stderr
    result = run("-m", "fastrnn", "vowels", "--epochs", "1", "--out", "run")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run").rglob("*.png"))
