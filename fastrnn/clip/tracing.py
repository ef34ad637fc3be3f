"""Where a tensor has no value that could be asked for: in graphs, and on fake tensors.

A clip branches on the norm, which only a value can decide. A graph that is being recorded would
bake in the branch of the tensors it is recorded with, and a fake tensor has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastrnn import torch_private

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


_is_compiling = torch.compiler.is_compiling
_is_tracing = torch_private.is_tracing
_functorch_level = torch_private.functorch_level
_modes = torch_private.dispatch_modes
_modes_before_dispatch = torch_private.dispatch_modes_before


def is_recorded() -> bool:
    """Whether a graph is being recorded: by torch.compile, jit.trace, make_fx, or functorch."""
    if _is_compiling() or _is_tracing() or _functorch_level() is not None:
        return True
    if _modes_before_dispatch():
        return True
    return _modes() > 0 and bool(_stand_ins() - {"FAKE"})


def values_unknown() -> bool:
    """Whether a tensor may have no value: while a graph is recorded, or under FakeTensorMode."""
    return is_recorded() or (_modes() > 0 and bool(_stand_ins()))


def has_value(tensor: Tensor) -> bool:
    """Whether a tensor can be asked for its value, if its device lets itself be waited for."""
    return type(tensor) is Tensor and not values_unknown()


def _stand_ins() -> set[str]:
    """The modes in force under which tensors stand for others: FAKE, PROXY, FUNCTIONAL."""
    keys = (getattr(mode, "_mode_key", None) for mode in torch_private.dispatch_mode_stack())
    return {key.name for key in keys if key is not None}


def outside_graphs(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Run a method in Python where torch.compile would put it into a graph.

    Dynamo does not see attributes that are set on an optimizer, and cannot know what a clipper
    keeps; with `fullgraph=True` the method is an error that says so.
    """
    outside: list[Callable[Concatenate[S, P], R]] = []

    @functools.wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            if not outside:  # not at once, for it imports torch._dynamo
                outside.append(torch.compiler.disable(method))
            return outside[0](self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return run
