"""GradientClipper: a clip that knows its parameters, remembers what it did, and can skip a step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastrnn.clip.fused_step import FusedStep, why_unfused
from fastrnn.clip.gradient_norms import (
    Clipped,
    clip_coefficient,
    clip_gradients,
    refuse_nonfinite,
    scale_gradients,
)
from fastrnn.clip.groups import Parameters, read_groups
from fastrnn.clip.history import History, Ring

__all__ = ["GradientClipper"]

NonFinite = Literal["keep", "raise", "skip", "zero"]


class GradientClipper:
    """Clip the norm of the gradients of certain parameters, step after step.

    `grad = grad * min(max_norm / (norm + 1e-6), 1)`, where `norm` is the norm of all gradients of a
    group as one vector: what :func:`fastrnn.clip_grad_norm_` does. Two lines of a training loop::

        clipper = fastrnn.GradientClipper(model.parameters(), max_norm=1.0)
        ...
        loss.backward()
        norm = clipper.step(optimizer)  # in place of clip_grad_norm_ and optimizer.step()

    or, where the step is somebody else's, `norm = clipper.clip()` before it. With a
    `torch.amp.GradScaler`, `norm = clipper.step(optimizer, scaler)`, then `scaler.update()`.

    As with an optimizer, parameters are taken once: create it after the model is on its device, and
    after `fully_shard` or `accelerator.prepare`. DTensors and plain gradients may be mixed; then
    all processes have to make the same calls, and all get the same norms. Deterministic as
    `clip_grad_norm_` is. Nothing waits for a GPU except where it is said. The first device is that
    of the first gradient; norms and history are there.

    Args:
        parameters: a tensor, an iterable of tensors or of `(name, tensor)`
            (`model.named_parameters()`), or param groups: dicts with "params" and, if they like,
            "max_norm"; so also `optimizer.param_groups`. Each group with a `max_norm` of its own
            has a norm of its own and is clipped by itself; the others together are one group.
        max_norm: the largest norm allowed, at least 0; of the groups that name none. `math.inf`:
            nothing is clipped, only measured and recorded.
        norm_type: the order of the norm. Default: 2.
        nonfinite: what to do where a norm is infinite or NaN. Default: "keep".

            - "keep": scale like any other, as torch does: inf to zeros, NaN to NaNs.
            - "raise": raise torch's error, before anything is scaled. Waits for the device.
            - "skip": parameters and optimizer state stay as they are, and the step is counted.
              With a fused optimizer in :meth:`step` or :meth:`clip_into`, nothing waits but the
              first step of SGD with momentum. Otherwise the norm is asked for, which is free on the
              CPU and waits for a GPU, and the gradients are set to None: no optimizer of torch's
              then changes anything.
            - "zero": set all gradients of the group to zero. The step is taken: momentum and weight
              decay still move the parameters.
        percentile: AutoClip (Seetharaman et al. 2020, arXiv:2007.14469): the threshold is this
            percentile, 0 to 100, of the norms recorded and the present one, though never above
            `max_norm`. The authors use 10. Norms that are not finite are left out. Default: None,
            the threshold is `max_norm`.
        norm_dtype: `torch.float32` computes the norms of 16-bit gradients in float32. None rounds
            them to 16 bits, as torch does; in float16 they overflow above 65504. Default: None.
        history: how many steps are kept on the device, for :meth:`history`, :meth:`plot`,
            :meth:`suggest_max_norm` and `percentile`; the paper's AutoClip keeps all. Default:
            1000.

    Raises:
        TypeError: a parameter is no tensor.
        ValueError: there are no parameters, one comes twice, or an option is out of its range.
    """

    def __init__(
        self,
        parameters: Parameters,
        max_norm: float,
        norm_type: float = 2.0,
        *,
        nonfinite: NonFinite = "keep",
        percentile: float | None = None,
        norm_dtype: torch.dtype | None = None,
        history: int = 1000,
    ) -> None:
        if nonfinite not in get_args(NonFinite):
            raise ValueError(
                f"nonfinite must be one of {', '.join(get_args(NonFinite))}, got {nonfinite!r}"
            )
        if percentile is not None and not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be from 0 to 100, got {percentile}")
        if norm_dtype not in (None, torch.float32):
            raise ValueError(f"norm_dtype must be None or torch.float32, got {norm_dtype}")
        if history < 1:
            raise ValueError(f"history must be at least 1 step, got {history}")
        self.norm_type = float(norm_type)
        self.nonfinite = nonfinite
        self.percentile = percentile
        self.norm_dtype = norm_dtype
        self._groups = read_groups(parameters, max_norm)
        self._ring = Ring(history, len(self._groups))
        self._max_norms = torch.tensor(
            [group.max_norm for group in self._groups], dtype=torch.float32
        )
        self._latest: list[tuple[list[str], Tensor]] = []
        self._fused_steps: WeakKeyDictionary[Optimizer, FusedStep] = WeakKeyDictionary()

    def __repr__(self) -> str:
        groups = ", ".join(f"{len(g.parameters)} at {g.max_norm:g}" for g in self._groups)
        return (
            f"GradientClipper({groups}, norm_type={self.norm_type:g}, "
            f"nonfinite={self.nonfinite!r}, percentile={self.percentile}, "
            f"norm_dtype={self.norm_dtype})"
        )

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradients in place.

        After a GradScaler's backward pass, call `scaler.unscale_(optimizer)` first.

        Returns:
            The norm before clipping `[]`; `[groups]` where there are several. Zeros if there are no
            gradients; then nothing is recorded.

        Raises:
            RuntimeError: a norm is not finite and `nonfinite` is "raise". Nothing was scaled.
        """
        grads = self._gradients()
        if not any(grads):
            return self._shaped(torch.zeros(len(grads)))
        zero = self.nonfinite == "zero"
        at_once = self.percentile is None and self.nonfinite in ("keep", "zero")
        found = self._measure(grads, scale=at_once)
        norms = _vector([clipped.total_norm for clipped in found])
        thresholds = self._settle(norms, _vector([clipped.coefficient for clipped in found]))
        if at_once:
            return self._shaped(norms)
        if self._refuses(norms):
            for group in self._groups:
                for parameter in group.parameters:
                    parameter.grad = None
            return self._shaped(norms)
        for group_grads, clipped, threshold in zip(grads, found, thresholds):
            if group_grads:
                scale_gradients(group_grads, clipped.total_norm, threshold, zero)
        return self._shaped(norms)

    @torch.no_grad()
    def clip_into(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Let the optimizer's next step do the scaling, while it reads the gradients anyway.

        For `torch.optim`'s Adam, AdamW, SGD and Adagrad with `fused=True`. The gradients are only
        read here. The step divides them by `1 / coefficient` in float32, where :meth:`clip`
        multiplies, so the last bit may differ; on the CPU, if nothing has to be clipped, it
        divides by nothing. It leaves the scaled gradients behind, as fused optimizers do. Nothing
        is left on the optimizer after the step::

            norm = clipper.clip_into(optimizer)
            optimizer.step()

        Args:
            optimizer: which steps just the parameters that are clipped here.
            scaler: given if it scaled the loss and has not unscaled the gradients since. The norm
                is divided by its scale, and its `step(optimizer)` must follow. After
                `scaler.unscale_(optimizer)`, leave it out. Default: None.

        Returns:
            The norm before clipping, of unscaled gradients `[]`. Zero if there are no gradients;
            then nothing is recorded.

        Raises:
            TypeError: `optimizer` is not torch's.
            ValueError: the optimizer does not read the scale, or steps other parameters; there are
                several groups; `nonfinite` is "zero", which has to write the gradients; or the
                scaler unscales this optimizer's gradients itself (Adagrad's in torch 2.11).
            RuntimeError: the norm is not finite and `nonfinite` is "raise"; nothing was changed. Or
                somebody else has set the optimizer's `grad_scale` or `found_inf`. Later, from
                the step: it is not the one announced by `scaler`, or has a closure.
        """
        grads = self._gradients()
        if (reason := self._why_not_into(optimizer, scaler, grads)) is not None:
            raise ValueError(
                f"clip_into cannot be used here: {reason}. Use clip() before the optimizer's step."
            )
        return self._clip_into(optimizer, scaler, grads)

    def _clip_into(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None,
        grads: list[list[Tensor]],
    ) -> Tensor:
        step = self._fused_steps.get(optimizer)
        if step is None:
            step = self._fused_steps[optimizer] = FusedStep(optimizer)
        step.disarm(optimizer)
        if not any(grads):
            return self._shaped(torch.zeros(1))
        scaled = scaler is not None and scaler.is_enabled()
        [found] = self._measure(grads, scale=False)
        norms, coefficients = found.total_norm[None], found.coefficient[None]
        if scaler is not None and scaled:
            scale = scaler.scale(norms.new_ones(1, dtype=torch.float32))
            norms = norms / scale
            self._latest = [(names, each / scale) for names, each in self._latest]
            coefficients = clip_coefficient(norms, self._groups[0].max_norm)
        [threshold] = self._settle(norms, coefficients)
        if self.nonfinite == "raise":
            refuse_nonfinite(norms[0], self.norm_type)
        if self.percentile is not None:
            coefficients = clip_coefficient(norms, threshold)
        grad_scale: Tensor | None = coefficients[0].float().reciprocal()
        found_inf: Tensor | None = norms[0].isfinite().logical_not().float()
        if norms.is_cpu:
            grad_scale = None if coefficients.item() >= 1 else grad_scale
            found_inf = None if norms.isfinite().item() else found_inf
        step.arm(optimizer, grad_scale, found_inf if self.nonfinite == "skip" else None, scaled)
        return self._shaped(norms)

    def step(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Clip, and run the optimizer's step; by :meth:`clip_into` where it can be used.

        Args:
            optimizer: any.
            scaler: which scaled the loss and has not unscaled the gradients; its `unscale_`, where
                needed, and `step` are called here, its `update()` is not. Default: None.

        Returns:
            The norm before clipping, as :meth:`clip` returns it.

        Raises:
            TypeError: `optimizer` is not torch's.
            RuntimeError: a norm is not finite and `nonfinite` is "raise". No step was taken.
        """
        grads = self._gradients()
        into = self._why_not_into(optimizer, scaler, grads) is None
        if into:
            with torch.no_grad():
                norm = self._clip_into(optimizer, scaler, grads)
        else:
            if scaler is not None:
                scaler.unscale_(optimizer)
            norm = self.clip()
        try:
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.step()
        finally:
            if into:
                self._fused_steps[optimizer].disarm(optimizer)
        return norm

    def history(self) -> History:
        """Return the latest steps, on the CPU, oldest first. Waits for the device."""
        return self._ring.read()

    @property
    def steps(self) -> int:
        """How many steps were recorded, in all. Waits for the device."""
        return self._ring.counts()[0]

    @property
    def nonfinite_steps(self) -> int:
        """How many of them had a norm that was infinite or NaN: with "skip", the steps skipped.

        Waits for the device.
        """
        return self._ring.counts()[1]

    def parameter_norms(self) -> dict[str, Tensor]:
        """Return each parameter's norm in the latest step, before clipping. Costs nothing extra.

        Returns:
            From name to norm `[]`, on the device, for parameters that had a gradient. The name is
            the one given, or else the place among all parameters: "0", "1", ...
        """
        return {
            name: norm for names, norms in self._latest for name, norm in zip(names, norms.unbind())
        }

    def suggest_max_norm(self, quantile: float = 0.9) -> float | list[float]:
        """Return the quantile of the recorded finite norms: above it, steps would be clipped.

        Statistics of the norm over many updates are the usual guide to a threshold (Pascanu,
        Mikolov and Bengio 2013, section 3.2). Record some hundred steps with `max_norm=math.inf`.
        Waits for the device.

        Args:
            quantile: from 0 to 1. Default: 0.9, which would clip one step in ten.

        Returns:
            The norm; one of each group, where there are several.

        Raises:
            ValueError: `quantile` is out of its range, or no finite norm is recorded.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be from 0 to 1, got {quantile}")
        norms: list[float] = self._ring.percentile(100 * quantile).tolist()
        if any(map(math.isnan, norms)):
            raise ValueError(
                "no finite norm is recorded to suggest a max_norm from; train some steps first"
            )
        return norms[0] if len(norms) == 1 else norms

    def plot(self, path: str | os.PathLike[str], title: str = "Gradient norms") -> None:
        """Draw the recorded norms, thresholds, and the steps that were clipped or not finite.

        Args:
            path: of the image to write; its ending says in which format.
            title: above the plot.

        Raises:
            ModuleNotFoundError: matplotlib is missing; `pip install "fastrnn[demo]"` brings it.
            ValueError: nothing is recorded.
        """
        from fastrnn.clip.plot import plot_history

        plot_history(path, self.history(), title)

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded: all that a clipper does not get from its arguments."""
        return {"history": self._ring.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is of a clipper with another `history` or other groups.
        """
        self._ring.load_state_dict(state_dict["history"])

    def _gradients(self) -> list[list[Tensor]]:
        return [[p.grad for p in group.parameters if p.grad is not None] for group in self._groups]

    def _measure(self, grads: list[list[Tensor]], scale: bool) -> list[Clipped]:
        """Measure each group, and scale it if asked to; one without gradients has norm 0."""
        found = []
        self._latest = []
        device = next(group[0].device for group in grads if group)
        for group, group_grads in zip(self._groups, grads):
            if not group_grads:
                zero = torch.zeros((), device=device)
                found.append(Clipped(zero, torch.ones_like(zero), zero[None][:0]))
                continue
            clipped = clip_gradients(
                group_grads,
                group.max_norm,
                self.norm_type,
                scale=scale,
                zero_nonfinite=self.nonfinite == "zero",
                norm_dtype=self.norm_dtype,
            )
            found.append(clipped)
            names = group.names
            if len(group_grads) < len(names):
                names = [n for n, p in zip(names, group.parameters) if p.grad is not None]
            self._latest.append((names, clipped.norms))
        return found

    def _settle(self, norms: Tensor, coefficients: Tensor) -> Sequence[float | Tensor]:
        """Record a step, and return each group's threshold."""
        if self._max_norms.device != norms.device:
            self._max_norms = self._max_norms.to(norms.device)
        limits = self._max_norms
        thresholds: Sequence[float | Tensor] = [group.max_norm for group in self._groups]
        if self.percentile is not None:
            # fmin ignores NaN: until there is a finite norm, max_norm holds alone.
            limits = torch.fmin(self._ring.percentile(self.percentile, norms), limits)
            coefficients = clip_coefficient(norms, limits, self.nonfinite == "zero")
            thresholds = limits.unbind()
        if self.nonfinite in ("raise", "skip") and not (norms.is_cpu and _all_finite(norms)):
            coefficients = coefficients.where(norms.isfinite().all(), math.nan)
        self._ring.record(norms, limits, coefficients)
        return thresholds

    def _refuses(self, norms: Tensor) -> bool:
        """Whether the step is to be skipped; raises where it is to raise. Waits for the device."""
        if self.nonfinite == "raise":
            for norm in norms.unbind():
                refuse_nonfinite(norm, self.norm_type)
        return self.nonfinite == "skip" and not _all_finite(norms)

    def _why_not_into(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None,
        grads: list[list[Tensor]],
    ) -> str | None:
        """Why the optimizer's step cannot take the scale along; None where it can."""
        if (reason := why_unfused(optimizer)) is not None:
            return reason
        scaled = scaler is not None and scaler.is_enabled()
        if scaled and not getattr(optimizer, "_step_supports_amp_scaling", False):
            return (  # torch 2.11's Adagrad
                "the scaler unscales this optimizer's gradients itself, before its step; call "
                "scaler.unscale_(optimizer) first and leave out the scaler"
            )
        if len(self._groups) > 1:
            return f"a step takes one scale, and there are {len(self._groups)} groups"
        if self.nonfinite == "zero":
            return 'nonfinite="zero" has to write the gradients'
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        theirs = {id(p.grad) for p in parameters if p.grad is not None}
        if theirs != set(map(id, grads[0])):
            return (
                f"the optimizer steps {len(theirs)} parameters that have gradients and the clipper "
                f"clips {len(grads[0])}, which are not the same"
            )
        return None

    def _shaped(self, norms: Tensor) -> Tensor:
        """Return norms [groups] as the user gets them."""
        return norms[0] if len(self._groups) == 1 else norms


def _all_finite(norms: Tensor) -> bool:
    return all(map(math.isfinite, norms.tolist()))


def _vector(scalars: list[Tensor]) -> Tensor:
    """Return tensors of shape [] as one of shape [n], on the first one's device."""
    if len(scalars) == 1:
        return scalars[0][None]
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
