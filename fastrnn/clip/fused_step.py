"""A clip that costs no pass over the gradients: the scale rides into a fused optimizer's step.

`torch.optim`'s Adam, AdamW, SGD and Adagrad with `fused=True` divide every gradient by the
attribute `grad_scale` while they read it, and change nothing where the attribute `found_inf` is 1:
what `torch.amp.GradScaler` sets on them. :class:`FusedStep` sets both for the one step that comes,
and takes them away after it. Other optimizers read neither (RMSprop and NAdam ignore them without a
word), so :func:`why_unfused` refuses them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_FUSED: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD, Adagrad)
_ATTRIBUTES = ("grad_scale", "found_inf")


def why_unfused(optimizer: Optimizer) -> str | None:
    """Why an optimizer's step cannot take the scale along; None where it can.

    Raises:
        TypeError: it is no optimizer of torch's.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    name = type(optimizer).__name__
    if not isinstance(optimizer, _FUSED):
        return f"{name} does not read grad_scale; Adam, AdamW, SGD and Adagrad do, with fused=True"
    # A subclass may do what it likes in a step of its own. torch wraps the method for profiling.
    steps = {inspect.unwrap(optimizer_class.step) for optimizer_class in _FUSED}
    if inspect.unwrap(type(optimizer).step) not in steps:
        return f"{name} has a step of its own, which may not read grad_scale"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{name} reads grad_scale only with fused=True in all param groups"
    return None


class FusedStep:
    """The steps of one optimizer that take a scale along.

    Its hooks stay on the optimizer, and do nothing in a step that was not armed.

    Args:
        optimizer: one for which :func:`why_unfused` gives no reason.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._armed = False
        self._scaled = False
        self._by_scaler = False
        self._grad_scale: Tensor | None = None
        self._found_inf: Tensor | None = None
        self._new_buffers: list[Tensor] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(
        self,
        optimizer: Optimizer,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scaled: bool,
    ) -> None:
        """Set what the next step takes along; what was set for it before is forgotten.

        Args:
            optimizer: the one given before.
            grad_scale: by which the step divides gradients `[]` float32; None: by nothing.
            found_inf: 1 where the step is to change nothing, else 0 `[]` float32; None: 0.
            scaled: whether a GradScaler scaled the gradients and has not unscaled them, so that
                `scaler.step(optimizer)` has to run the step, and divides by its own scale too.

        Raises:
            RuntimeError: somebody else has set the attributes.
        """
        self.disarm(optimizer)
        for name in _ATTRIBUTES:
            if getattr(optimizer, name, None) is not None:
                raise RuntimeError(
                    f"the optimizer has a {name} which this clipper has not set; remove it, or use "
                    "clip() and optimizer.step()"
                )
        self._armed, self._scaled, self._by_scaler = True, scaled, False
        self._grad_scale, self._found_inf = grad_scale, found_inf
        self._new_buffers = [] if found_inf is None else _momentum_to_come(optimizer)
        if grad_scale is not None:
            optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        if found_inf is not None:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def disarm(self, optimizer: Optimizer) -> None:
        """Leave the optimizer as it was; nothing if the step has run."""
        if self._armed:
            self._armed = False
            self._grad_scale = self._found_inf = None
            for name in _ATTRIBUTES:
                optimizer.__dict__.pop(name, None)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._armed:
            return
        # A scaler puts its own found_inf on the optimizer. It leaves grad_scale alone where it has
        # unscaled the gradients, and replaces it by a product where it has not.
        found_inf = getattr(optimizer, "found_inf", None)
        self._by_scaler = found_inf is not self._found_inf
        multiplied = getattr(optimizer, "grad_scale", None) is not self._grad_scale
        if self._scaled != multiplied:
            self.disarm(optimizer)
            raise RuntimeError(
                "clip_into was given a scaler, so scaler.step(optimizer) has to run the step, on "
                "gradients that are still scaled. After scaler.unscale_(optimizer), call "
                "clip_into(optimizer) without the scaler."
                if self._scaled
                else "the gradients are still scaled: call clip_into(optimizer, scaler), or "
                "scaler.unscale_(optimizer) before clip_into(optimizer)"
            )
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            self.disarm(optimizer)
            raise RuntimeError(
                "optimizer.step(closure) computes new gradients after clip_into; call clip_into at "
                "the end of the closure instead"
            )
        if self._by_scaler and self._found_inf is not None:
            theirs = torch.as_tensor(found_inf, device=self._found_inf.device)
            optimizer.found_inf = torch.maximum(theirs, self._found_inf)  # type: ignore[attr-defined]

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._armed:
            return
        # The first step with momentum makes its buffers of uninitialised memory, and leaves them so
        # if it is to change nothing (torch 2.11 and 2.13). To ask waits; once in a training.
        if self._new_buffers and optimizer.found_inf.item():  # type: ignore[attr-defined]
            for parameter in self._new_buffers:
                optimizer.state[parameter].pop("momentum_buffer", None)
        if self._by_scaler:  # which removes its attributes itself
            self._armed = False
        else:
            self.disarm(optimizer)


def _momentum_to_come(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters for which the next step of SGD makes the momentum buffer."""
    if not isinstance(optimizer, SGD):
        return []
    return [
        parameter
        for group in optimizer.param_groups
        if group["momentum"] != 0
        for parameter in group["params"]
        if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None
    ]
