"""What torch may do around a call: transforms, batches of gradients, forward mode, graphs.

Under the first three only differentiable operations will do, out of place; while a graph is made,
or where tensors have no data, nobody may look at what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastrnn import torch_private
from fastrnn.torch_private import FAKE, PROXY, dispatch_mode


def under_functorch() -> bool:
    """Whether a transform of torch.func is active: grad, vmap, jvp and what is made of them."""
    return torch_private.functorch_active()


def vectorized(*gradients: Tensor | None) -> bool:
    """Whether gradients come in batches, as ``is_grads_batched=True`` sends them, or vmap."""
    # The former has a vmap of its own, of which functorch knows nothing.
    return under_functorch() or any(
        gradient is not None and torch_private.is_legacy_batched(gradient) for gradient in gradients
    )


def is_traced(*tensors: Tensor) -> bool:
    """Whether nobody may look at what is computed: a graph is made, or tensors have no data."""
    if torch.compiler.is_compiling():
        return True
    if dispatch_mode(FAKE) is not None or dispatch_mode(PROXY) is not None:
        return True  # FakeTensorMode, make_fx
    return not all(map(_has_data, tensors))


_PLAIN = {Tensor, nn.Parameter}


def _has_data(tensor: Tensor) -> bool:
    if type(tensor) in _PLAIN:
        return not tensor.is_meta
    return not torch_private.is_fake(tensor)


def read(scalar: Callable[[], Tensor]) -> int:
    """A number on the host, also where FakeTensorMode would make a fake of what only reads it."""
    if (
        torch.compiler.is_compiling()
        or dispatch_mode(FAKE) is None
        or dispatch_mode(PROXY) is not None
    ):
        return int(scalar())
    with torch_private.disable_dispatch_modes():
        return int(scalar())


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap runs over a tensor, at any level: nobody may look at what it holds."""
    while torch_private.is_wrapped(tensor):
        if torch_private.is_batched(tensor):
            return True
        tensor = torch_private.get_unwrapped(tensor)
    return False


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor holds for the whole of all batches that vmap runs over."""
    while torch_private.is_wrapped(tensor):
        tensor = torch_private.get_unwrapped(tensor)
    return tensor


def in_dual_level() -> bool:
    """Whether forward-mode derivatives may be on."""
    # The second look is one that torch.compile guards: a level entered before another call of the
    # graph makes another graph. One that the graph itself enters must not be guarded.
    return _dual_level_while_tracing() >= 0 or torch_private.dual_level() >= 0


def _dual_level_while_tracing() -> int:
    return torch_private.dual_level()


# A constant to torch.compile. torch.compiler.assume_constant_result sets just this, and imports all
# of torch._dynamo.
_dual_level_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def have_own_class(tensors: Sequence[Tensor]) -> bool:
    """Whether one is of a class that says itself what operators do, such as an ExpandedWeight."""
    kinds = set(map(type, tensors)) - _PLAIN
    return any(
        getattr(kind, "__torch_function__") is not torch_private.disabled_torch_function  # noqa: B009
        for kind in kinds
    )
