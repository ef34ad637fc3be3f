"""What torch may do around a call: functorch's transforms, vectorized gradients, forward mode.

Under each of them only differentiable operations will do, out of place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def under_functorch() -> bool:
    """Whether a transform of torch.func is active: grad, vmap, jvp and what is made of them."""
    return torch._C._are_functorch_transforms_active()


def vectorized(*gradients: Tensor | None) -> bool:
    """Whether gradients come in batches, as ``is_grads_batched=True`` sends them, or vmap."""
    # The former has a vmap of its own, of which functorch knows nothing.
    return under_functorch() or any(
        gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)
        for gradient in gradients
    )


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap runs over a tensor, at any level: nobody may look at what it holds."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor holds for the whole of all batches that vmap runs over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_dual_level() -> bool:
    """Whether forward-mode derivatives may be on."""
    # The second look is one that torch.compile guards: a level entered before another call of the
    # graph makes another graph. One that the graph itself enters must not be guarded.
    return _dual_level_while_tracing() >= 0 or forward_ad._current_level >= 0


def _dual_level_while_tracing() -> int:
    return forward_ad._current_level


# A constant to torch.compile. torch.compiler.assume_constant_result sets just this, and imports all
# of torch._dynamo.
_dual_level_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
