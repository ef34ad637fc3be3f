"""A clip that costs no pass over the gradients: the scale rides into a fused optimizer's step.

`torch.optim`'s Adam, AdamW, SGD and Adagrad with `fused=True` divide every gradient by the
attribute `grad_scale` while they read it, and change nothing where the attribute `found_inf` is 1:
what `torch.amp.GradScaler` sets on them. :class:`FusedStep` sets both for the one step that comes,
and takes them away after it. Other optimizers read neither (RMSprop and NAdam ignore them without a
word), so :func:`why_unfused` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_FUSED: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD, Adagrad)
_MODULES = frozenset(f"torch.optim.{name}" for name in ("adam", "adamw", "sgd", "adagrad"))
_CALLS_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__  # as torch wraps every step
_ATTRIBUTES = ("grad_scale", "found_inf")


def why_unfused(optimizer: Optimizer) -> str | None:
    """Why an optimizer's step cannot take the scale along; None where it can.

    Raises:
        TypeError: it is no optimizer of torch's.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    name = type(optimizer).__name__
    if not isinstance(optimizer, _FUSED):
        return f"{name} does not read grad_scale; Adam, AdamW, SGD and Adagrad do, with fused=True"
    if not _runs_torchs_step(optimizer):
        return f"{name} has a step of its own, which may not read grad_scale"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{name} reads grad_scale only with fused=True in all param groups"
    return None


def _runs_torchs_step(optimizer: Optimizer) -> bool:
    """Whether what runs as the optimizer's step is torch's own, with the hooks around it.

    A subclass, and whoever replaces the method on the instance or the class, may do what they like
    in it. Wrappers of torch's own run what they wrap: those for profiling, which call the hooks, of
    LR schedulers, and of torch.compile.
    """
    step: Any = optimizer.step
    hooked = False
    while True:
        if getattr(step, "__self__", optimizer) is not optimizer:
            return False
        step = getattr(step, "__func__", step)
        module = str(getattr(step, "__globals__", {}).get("__name__"))
        if module in _MODULES:
            return hooked
        attributes = getattr(step, "__dict__", {})
        inner = attributes.get("_torchdynamo_orig_callable") or attributes.get("__wrapped__")
        if inner is None or not module.startswith("torch."):
            return False
        hooked = hooked or step.__code__ is _CALLS_HOOKS
        step = inner


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
        self._times_armed = 0
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
        self._times_armed += 1
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

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._armed:
            return None
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
        if self._by_scaler and self._found_inf is not None:
            theirs = torch.as_tensor(found_inf, device=self._found_inf.device)
            optimizer.found_inf = torch.maximum(theirs, self._found_inf)  # type: ignore[attr-defined]
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None
        return args[:1], kwargs | {"closure": self._watching(closure, optimizer)}

    def _watching(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Return a closure that refuses to have new gradients scaled by the norm of the old."""
        before, times_armed = _gradients_of(optimizer), self._times_armed

        def run() -> Any:
            loss = closure()
            if self._times_armed == times_armed and _changed(before, _gradients_of(optimizer)):
                self.disarm(optimizer)
                raise RuntimeError(
                    "optimizer.step(closure) computes new gradients after clip_into; call "
                    "clip_into at the end of the closure instead, or clipper.step(optimizer, "
                    "closure=closure)"
                )
            return loss

        return run

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


def _gradients_of(optimizer: Optimizer) -> list[tuple[Tensor | None, int]]:
    """Return the optimizer's gradients, each with how often it was written."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [(g, 0 if g is None or g.is_inference() else g._version) for g in grads]


def _changed(
    before: list[tuple[Tensor | None, int]], after: list[tuple[Tensor | None, int]]
) -> bool:
    """Whether a gradient is another tensor, or was written."""
    return len(before) != len(after) or any(
        old is not new or was != version for (old, was), (new, version) in zip(before, after)
    )


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
