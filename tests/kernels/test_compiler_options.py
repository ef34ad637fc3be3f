"""What a kernel computes does not hang on the defaults of a Triton release."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastrnn_kernels
from fastrnn_kernels.compiler_options import compiler_options
from fastrnn_kernels.tiling import Tile

PACKAGE = Path(fastrnn_kernels.__file__).parent
# Functions whose options are those of compiler_options.
SOURCES = ("compiler_options(", "launch_options(", "threshold_options(", ".options()")


def launches(program: str) -> list[ast.Call]:
    """The calls of kernels `kernel[grid](...)`, and of `triton.compile(...)`, in a program."""
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if (isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value)[-7:] == "_kernel")
        or ast.unparse(call.func) == "triton.compile"
    ]


def test_every_launch_and_compilation_gives_the_options() -> None:
    bare, seen = [], 0
    for path in sorted(PACKAGE.glob("*.py")):
        program = path.read_text()
        for call in launches(program):
            seen += 1
            given = " ".join(
                ast.unparse(word.value) for word in call.keywords if word.arg in (None, "options")
            )
            if given == "options":  # made above
                given = program
            if not any(source in given for source in (*SOURCES, ".constants()")):
                bare.append(f"{path.name}:{call.lineno}")
    assert seen >= 11
    assert not bare, f"give these **compiler_options(...): {bare}"


def test_products_and_sums_are_fused_whatever_triton_does_by_default() -> None:
    assert compiler_options(8) == {
        "num_warps": 8,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": False,
    }
    assert Tile("whole", 16, 32, 32, 1, 1).constants()["enable_fp_fusion"] is True


def test_what_is_not_asked_for_is_left_to_triton() -> None:
    given = compiler_options(4, num_stages=1, cooperative=True, max_registers=64)
    assert given == {**compiler_options(4, cooperative=True), "num_stages": 1, "maxnreg": 64}


@pytest.mark.parametrize("module", ["gradient_norm", "gradient_threshold"])
def test_the_clips_kernels_have_them(module: str) -> None:
    pytest.importorskip("triton")
    options = __import__(f"fastrnn_kernels.{module}", fromlist=["launch_options"]).launch_options
    assert options(64)["enable_fp_fusion"] is True
