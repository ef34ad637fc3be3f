"""Small tensors that are made once and kept for all calls.

A tensor that is made inside somebody's dispatch mode (FakeTensorMode, make_fx), inside a functorch
transform or in inference mode is of its kind, and later calls outside would get it. So what is kept
is made outside of all of them; and inside the first two nothing kept is handed out, because the
mode wants to see the tensor being made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastrnn import torch_private
from fastrnn.input.transforms import under_functorch

_Make = TypeVar("_Make", bound=Callable[..., Tensor])


def inside_a_mode() -> bool:
    """Whether a dispatch mode or a functorch transform sees what is computed."""
    return torch_private.dispatch_modes() > 0 or under_functorch()


def constant(maxsize: int) -> Callable[[_Make], _Make]:
    """A decorator: the tensors a function made last, by its arguments; not to be written to.

    Args:
        maxsize: how many are kept.
    """

    def decorate(make: _Make) -> _Make:
        @functools.lru_cache(maxsize)
        def kept(*args: Hashable) -> Tensor:
            with torch.inference_mode(False), torch_private.DisableTorchFunction():
                return make(*args)

        @functools.wraps(make)
        def kept_or_new(*args: Hashable) -> Tensor:
            return make(*args) if inside_a_mode() else kept(*args)

        return cast(_Make, kept_or_new)

    return decorate
