"""An extension of griffe: docstrings written for Sphinx's roles read well on the site too.

``:func:`fastrnn.tune``` becomes a link, ``.. math::`` a block of LaTeX as it stands, and an
indented block after ``::`` a block of Python.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")
_INDENTED = r"((?:[ ]*\n|[ ]{4,}[^\n]*(?:\n|\Z))+)"
_MATH = re.compile(rf"^\.\. math::\n{_INDENTED}", re.MULTILINE)
_LITERAL = re.compile(rf"^([^\n.][^\n]*)::\n\n{_INDENTED}", re.MULTILINE)
# What the site has a page for; other names are set as code. Where a function has the name of its
# module, griffe finds the module.
_LINKED = {
    "fastrnn.LSTM": "fastrnn.LSTM",
    "fastrnn.backends": "fastrnn.backends",
    "fastrnn.clip_grad_norm_": "fastrnn.clip_grad_norm_",
    "fastrnn.convert": "fastrnn.convert.convert",
    "fastrnn.explain": "fastrnn.explain.explain",
    "fastrnn.patched": "fastrnn.convert.patched",
    "fastrnn.tune": "fastrnn.tune.tune",
}


class SphinxRoles(griffe.Extension):
    """Rewrites each docstring once, when its object is found."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = _MATH.sub(lambda found: _fenced("latex", found[1]), text)
    text = _LITERAL.sub(lambda found: f"{found[1]}:\n\n{_fenced('python', found[2])}", text)
    return _ROLE.sub(_link, text)


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{textwrap.dedent(code).strip()}\n```\n\n"


def _link(found: re.Match[str]) -> str:
    name = found[2]
    shown = name.rpartition(".")[2] if found[1] else name
    return f"[`{shown}`][{_LINKED[name]}]" if name in _LINKED else f"`{shown}`"
