"""The pages: every block of Python runs, every command exists, every link leads somewhere.

The blocks of a page run in order, in one namespace. What a reader need not see, such as making a
batch, stands in a comment ``<!-- setup ... -->`` and runs where it stands. A block that needs a
package or a GPU that is not here says so in a comment before it, ``<!-- needs: lightning -->`` or
``<!-- needs: gpu -->``, and is compiled but not run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.__main__ import main as bench
from fastrnn.choosing.environment import SWITCHES
from fastrnn.recipes import RECIPES
from fastrnn.recipes.command_line import TOOLS
from fastrnn_kernels.tiling import CHIPS

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)

_BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->|(?:<!-- needs: (?P<needs>\w+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """Some lines of a page.

    Attributes:
        language: "python", "sh", ..., or empty.
        code: the lines.
        line: of the page on which they begin.
        needs: a package, "gpu", or empty.
    """

    language: str
    code: str
    line: int
    needs: str

    @property
    def lacking(self) -> bool:
        """Whether it needs what is not here."""
        if self.needs == "gpu":
            return not torch.cuda.is_available()
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, what a reader does not see among them."""
    text, found = page.read_text(), []
    for match in _BLOCK.finditer(text):
        group = "code" if match["setup"] is None else "setup"
        line = text.count("\n", 0, match.start(group)) + 1
        indent = len(match["indent"] or "")
        code = "".join(each[indent:] or "\n" for each in match[group].splitlines(keepends=True))
        language = "python" if group == "setup" else match["language"]
        found.append(Block(language, code, line, match["needs"] or ""))
    return found


PYTHON = {
    name: page for name, page in PAGES.items() if any(b.language == "python" for b in blocks(page))
}


@pytest.mark.parametrize("page", PYTHON.values(), ids=PYTHON)
def test_every_block_of_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a block writes
    namespace, lacking = {"__name__": "page"}, set()
    for block in blocks(page):
        if block.language != "python":
            continue
        # Empty lines before it, so that a traceback has the page's lines.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.lacking:
            lacking.add(block.needs)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch's, of what a page shows: TorchScript, quantisation
            exec(code, namespace)
    if lacking:
        pytest.skip(f"all ran but the blocks that need {', '.join(sorted(lacking))}")


@every_page
def test_every_command_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for name in re.findall(r"\bmake ([a-z-]+)", "\n".join(_code(text))):
        assert name in targets, f"make {name}"
    for name in re.findall(r"python -m fastrnn ([a-z0-9]+)", text):
        assert name in {*RECIPES, *TOOLS}, f"python -m fastrnn {name}"
    for name in sorted(set(re.findall(r"python -m bench ([a-z]+)", text))):
        with pytest.raises(SystemExit) as stopped:
            bench([name, "--help"])
        assert stopped.value.code == 0, f"python -m bench {name}"


@every_page
def test_every_link_leads_somewhere(page):
    text = "".join(re.split(r"```.*?```", page.read_text(), flags=re.DOTALL))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in _anchors(other.read_text()), target


def _code(text: str) -> list[str]:
    """What is set as code: blocks of commands, and names within a line."""
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)


def _anchors(text: str) -> set[str]:
    """The headings' anchors, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in headings}


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for name in PAGES:
        if name.startswith("docs/"):
            assert f" {name.removeprefix('docs/')}\n" in menu, name


def test_the_gpu_guide_has_every_switch():
    text = PAGES["docs/gpu.md"].read_text()
    for switch in SWITCHES.values():
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{switch.name}`")]
        assert all(f"`{value}`" in row for value in switch.values), switch.name


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_every_chip_is_named(page):
    text = PAGES[page].read_text()
    assert [chip for chip in CHIPS if not re.search(rf"\b{chip}\b", text)] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    for page in (tmp_path / "reference").rglob("index.html"):
        shown = re.sub(r"<[^>]+>", "", page.read_text())
        assert not re.search(r":\w+:`|\.\. math::|``", shown), page  # Sphinx's markup
    tools = (tmp_path / "reference/tools/index.html").read_text()
    assert "Measure what is fastest for an LSTM" in tools  # the function, and not its module
