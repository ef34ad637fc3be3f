"""What fastrnn needs of torch that torch promises to nobody: it is there, and in one file alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrnn import torch_private
from fastrnn.clip.distributed import DTensor

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("fastrnn", "kernels/fastrnn_kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "torch_private.py"
)
DOCUMENTED = {"torch._check"}  # torch.export's pages name it
ONEDNN_LSTM = (
    "aten::mkldnn_rnn_layer(Tensor input, Tensor weight0, Tensor weight1, Tensor weight2, Tensor "
    "weight3, Tensor hx_, Tensor cx_, bool reverse, int[] batch_sizes, int mode, int hidden_size, "
    "int num_layers, bool has_biases, bool bidirectional, bool batch_first, bool train) -> (Tensor"
    ", Tensor, Tensor, Tensor)"
)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and part[:2] != "__" for part in name.split("."))


def private_names(text: str) -> Iterator[str]:
    """Of torch, in a program: what is imported, and what is asked of something imported."""
    tree = ast.parse(text)
    of_torch = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module
            names = {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        else:
            continue
        names = {own: name for own, name in names.items() if name.split(".")[0] == "torch"}
        of_torch |= names
        yield from filter(is_private, names.values())
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in of_torch and parts:
            name = ".".join([of_torch[inner.id], *reversed(parts)])
            if is_private(parts[0]):
                yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_uses_a_private_name_of_torch(path):
    found = sorted(set(private_names(path.read_text())) - DOCUMENTED)
    assert not found, f"{found} belong in torch_private.py, each with what it is for"


@pytest.mark.parametrize(
    "program",
    [
        "import torch; torch._C._get_tracing_state()",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.utils._foreach_utils import anything",
        "def late():\n    from torch.somewhere import _hidden as shown",
        "import torch._dynamo",
    ],
)
def test_a_private_name_is_seen(program):
    assert list(private_names(program))


def test_public_names_are_not_private():
    assert not list(private_names("import torch; torch.__version__; torch.nn.LSTM; own._x"))


def test_what_only_some_need_is_there():
    """A name that is needed by all is noticed at import."""
    assert isinstance(torch_private.dual_level(), int)
    assert not torch_private.is_fake(torch.ones(1))
    assert torch_private.onednn_multiplies_bfloat16() in (True, False)
    assert torch_private.strided_shard().__name__ == "_StridedShard"


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch.Tensor, "_version"), (DTensor, "_local_tensor"), (nn.RNNBase, "_init_flat_weights")],
    ids=lambda thing: getattr(thing, "__name__", thing),
)
def test_torchs_objects_have_the_attributes_that_are_read(owner, name):
    annotated = getattr(owner, "__annotations__", {})
    assert hasattr(owner, name) or name in annotated, (
        f"torch {torch.__version__} has no {owner.__name__}.{name}, which fastrnn reads"
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_the_onednn_operator_takes_what_it_is_given():
    assert torch_private.has_onednn_lstm, "torch.mkldnn_rnn_layer is gone: the CPU is slow without"
    assert str(torch.ops.aten.mkldnn_rnn_layer.default._schema) == ONEDNN_LSTM


def in_a_fresh_python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_name_that_is_gone_is_named_at_import():
    done = in_a_fresh_python("""
        import torch
        del torch._C._get_mkldnn_enabled
        import fastrnn
    """)
    assert "ImportError: fastrnn needs a private name that torch" in done.stderr
    assert "_get_mkldnn_enabled" in done.stderr


def test_without_the_onednn_operator_torchs_own_code_computes():
    program = """
        import sys, torch
        from torch.utils.flop_counter import FlopCounterMode
        if sys.argv[1:] == ["gone"]:
            del torch.mkldnn_rnn_layer
        import fastrnn
        from fastrnn.ways import onednn
        torch.manual_seed(0)
        lstm = fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True)
        x = torch.randn(9, 6, 3)
        for lengths in (None, [9, 7, 5, 3, 1, 0]):
            with FlopCounterMode(display=False):
                lstm(x, lengths=lengths)[0].square().sum().backward()
        print(onednn.available(torch.device("cpu"), torch.float32))
        print(*(p.grad.double().square().sum().item() for p in lstm.parameters()))
    """
    found = []
    for argument in ((), ("gone",)):
        done = in_a_fresh_python(program, *argument)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines())
    assert found[1][0] == "False"
    with_it, without = ([float(word) for word in lines[1].split()] for lines in found)
    assert without == pytest.approx(with_it, rel=1e-4)
