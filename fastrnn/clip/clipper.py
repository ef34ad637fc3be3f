"""GradientClipper: a clip that knows its parameters, remembers what it did, and can skip a step."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fastrnn.clip.clipping import clip_gradients, scale_gradients
from fastrnn.clip.fused_step import FusedStep, why_unfused
from fastrnn.clip.gradient_norms import (
    Clipped,
    Recorder,
    clip_coefficient,
    multiply,
    refuse_nonfinite,
    settle_by_kernel,
)
from fastrnn.clip.groups import Group, Parameters, read_groups
from fastrnn.clip.history import History, Ring
from fastrnn.clip.tracing import has_value, is_recorded, outside_graphs

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
    all processes have to make the same calls, and all get the same norms. FSDP1's flat parameters
    are refused. Deterministic as `clip_grad_norm_` is: the same gradients give the same bits. How
    they are grouped or sharded changes the norm by rounding only. Nothing waits for a GPU except
    where it is said. The first device is that of the first gradient; norms and history are there.

    A clipper can be pickled and copied together with its parameters. Inside `torch.compile` its
    methods run outside the graph. In a graph made by `make_fx` or `torch.jit.trace`, and on fake
    tensors, :meth:`clip` scales by torch's operations and records nothing.

    Parameters whose update does not depend on the size of their gradients, as Muon's, can be
    measured without being scaled, and left out of the norm that scales the others::

        muon = torch.optim.Muon(matrices, lr=0.02)
        adamw = torch.optim.AdamW(others, lr=3e-4, fused=True)
        clipper = fastrnn.GradientClipper(
            [{"params": matrices, "clip": False, "count": False}, {"params": others}],
            max_norm=1.0,
        )
        ...
        loss.backward()
        norm = clipper.step(adamw)  # of the others; parameter_norms() has all
        muon.step()

    Args:
        parameters: a tensor, an iterable of tensors or of `(name, tensor)`
            (`model.named_parameters()`), or param groups: dicts with "params" and, if they like,
            "max_norm"; so also `optimizer.param_groups`. Each group with a `max_norm` of its own
            has a norm of its own and is clipped by itself; the others together are one group. Of
            these, a dict with `"clip": False` is measured and never scaled, and one with
            `"count": False` is no part of the norm. Unless `nonfinite` is "keep", the norm is NaN
            where such a part is not finite.
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
            `max_norm`. The authors use 10. Norms that are not finite are left out. Every step
            sorts what is recorded, at most `history` norms. Default: None, the threshold is
            `max_norm`.
        norm_dtype: `torch.float32` computes the norms of 16-bit gradients in float32. None rounds
            them to 16 bits, as torch does; in float16 they overflow above 65504. Default: None.
        history: how many steps are kept on the device, for :meth:`history`, :meth:`plot`,
            :meth:`suggest_max_norm` and `percentile`; the paper's AutoClip keeps all. Default:
            1000.
        max_skips: after so many skipped steps in a row, the next call that skips raises and names
            the parameters to blame; waits for a GPU once in so many steps. Only with
            `nonfinite="skip"`. Default: None, any number may be skipped.

    Raises:
        TypeError: a parameter is no tensor, or belongs to FSDP1.
        ValueError: there are no parameters, one comes twice, none counts, or an option is out of
            its range.
    """

    # Of all clippers: an optimizer gets its hooks once, whoever clips into it.
    _fused_steps: ClassVar[WeakKeyDictionary[Optimizer, FusedStep]] = WeakKeyDictionary()

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
        max_skips: int | None = None,
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
        if max_skips is not None and (nonfinite != "skip" or max_skips < 1):
            raise ValueError(
                f'max_skips must be at least 1, and nonfinite "skip"; got {max_skips} and '
                f"{nonfinite!r}"
            )
        self.norm_type = float(norm_type)
        self.nonfinite = nonfinite
        self.percentile = percentile
        self.norm_dtype = norm_dtype
        self.max_skips = max_skips
        self._groups = read_groups(parameters, max_norm)
        self._ring = Ring(history, len(self._groups))
        self._max_norms = torch.tensor(
            [group.max_norm for group in self._groups], dtype=torch.float32
        )
        self._latest: list[tuple[list[str], Tensor]] = []
        self._warned = False
        self._found = 0  # gradients, when it was last compared with the optimizer's

    def __repr__(self) -> str:
        groups = ", ".join(f"{len(g.parameters)} at {g.max_norm:g}" for g in self._groups)
        return (
            f"GradientClipper({groups}, norm_type={self.norm_type:g}, "
            f"nonfinite={self.nonfinite!r}, percentile={self.percentile}, "
            f"norm_dtype={self.norm_dtype})"
        )

    @outside_graphs
    def clip(self) -> Tensor:
        """Scale the gradients in place.

        After a GradScaler's backward pass, call `scaler.unscale_(optimizer)` first.

        Returns:
            The norm before clipping `[]`; `[groups]` where there are several. Zeros if there are no
            gradients; then nothing is recorded, and the first time there is a warning.

        Raises:
            RuntimeError: a norm is not finite and `nonfinite` is "raise". Nothing was scaled. Or
                `max_skips` steps in a row were skipped. Or a graph is being recorded, which cannot
                branch on the norm as "raise", "skip" and `percentile` do.
        """
        grads = self._gradients()
        if not any(grads) and not self._warned:
            self._warned = True
            warnings.warn(
                f"none of the clipper's {self._size} parameters has a gradient, so nothing is "
                f"clipped. {_REPLACED}",
                stacklevel=3,
            )
        return self._clip(grads)

    @torch.no_grad()
    def _clip(self, grads: list[list[Tensor]]) -> Tensor:
        if not any(grads):
            return self._shaped(torch.zeros(len(grads)))
        self._refuse_recording()
        # Of several groups none may be scaled before the last is known to be finite.
        several = len(grads) > 1 and self.nonfinite in ("raise", "skip")
        at_once = self.percentile is None and not several
        found = self._measure(grads, scale=at_once, record=at_once)
        norms = _vector([clipped.total_norm for clipped in found])
        thresholds: Sequence[float | Tensor] = [group.max_norm for group in self._groups]
        if has_value(norms):
            found = self._settle_by_kernel(found)
            if not found[0].recorded:
                coefficients = _vector([clipped.coefficient for clipped in found])
                thresholds = self._settle(norms, coefficients)
            if self._refuses(norms):
                for group in self._groups:
                    for parameter in group.parameters:
                        parameter.grad = None
                self._refuse_more_skips()
                return self._shaped(norms)
        if not at_once and found[0].recorded:
            multiply(grads[0], found[0], self.nonfinite == "zero")
            return self._shaped(norms)
        for group, group_grads, clipped, threshold in zip(self._groups, grads, found, thresholds):
            if group_grads and not (at_once and group.plain):
                self._scale(group, group_grads, clipped.total_norm, threshold)
        return self._shaped(norms)

    @outside_graphs
    def clip_into(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Let the optimizer's next step do the scaling, while it reads the gradients anyway.

        For `torch.optim`'s Adam, AdamW, SGD and Adagrad with `fused=True`, and torch's own `step`
        (LR schedulers and `torch.compile` may have wrapped it). The gradients are only read here.
        The step divides them by `1 / coefficient` in float32, where :meth:`clip` multiplies, so the
        last bit may differ; on the CPU, if nothing has to be clipped, it divides by nothing. It
        leaves the scaled gradients behind, as fused optimizers do. Nothing is left on the optimizer
        after the step::

            norm = clipper.clip_into(optimizer)
            optimizer.step()

        Args:
            optimizer: which steps just the parameters that are scaled here.
            scaler: given if it scaled the loss and has not unscaled the gradients since. The norm
                is divided by its scale, and its `step(optimizer)` must follow. After
                `scaler.unscale_(optimizer)`, leave it out. Default: None.

        Returns:
            The norm before clipping, of unscaled gradients `[]`. Zero if there are no gradients;
            then nothing is recorded.

        Raises:
            TypeError: `optimizer` is not torch's.
            ValueError: the optimizer does not read the scale, or steps other parameters; there are
                several groups; `nonfinite` is "zero", which has to write the gradients, or "skip"
                and there are parameters that another optimizer steps; or the scaler unscales this
                optimizer's gradients itself (Adagrad's in torch 2.11).
            RuntimeError: the norm is not finite and `nonfinite` is "raise", or `max_skips` steps
                in a row were to be skipped; nothing was changed. The optimizer has gradients and
                the clipper has none. Somebody else has set the optimizer's `grad_scale` or
                `found_inf`. Or a graph is being recorded. Later, from the step: it is not the one
                announced by `scaler`, or its closure computes new gradients.
        """
        grads = self._gradients()
        reason = self._why_not_into(optimizer, scaler, grads)
        self._refuse_replaced(optimizer, grads)
        if reason is not None:
            raise ValueError(
                f"clip_into cannot be used here: {reason}. Use clip() before the optimizer's step."
            )
        return self._clip_into(optimizer, scaler, grads)

    @torch.no_grad()
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
        self._refuse_recording()
        scaled = scaler is not None and scaler.is_enabled()
        record = self.percentile is None and not scaled
        [found] = self._measure(grads, scale=False, record=record)
        norms, coefficients = found.total_norm[None], found.coefficient[None]
        if scaler is not None and scaled:
            scale = scaler.scale(norms.new_ones(1, dtype=torch.float32))
            norms = norms / scale
            self._latest = [(names, each / scale) for names, each in self._latest]
            coefficients = clip_coefficient(norms, self._groups[0].max_norm)
        if has_value(norms):
            if not scaled:
                [found] = self._settle_by_kernel([found])
                coefficients = found.coefficient[None]
            if not found.recorded:
                [threshold] = self._settle(norms, coefficients)
            if self.nonfinite == "raise":
                refuse_nonfinite(norms[0], self.norm_type)
            self._refuse_more_skips()
            if self.percentile is not None and not found.recorded:
                coefficients = clip_coefficient(norms, threshold)
        grad_scale, found_inf = found.inverse, found.nonfinite
        if not found.recorded:
            grad_scale = coefficients[0].float().reciprocal()
            found_inf = norms[0].isfinite().logical_not().float()
        if norms.is_cpu and has_value(norms):
            grad_scale = None if coefficients.item() >= 1 else grad_scale
            found_inf = None if norms.isfinite().item() else found_inf
        step.arm(optimizer, grad_scale, found_inf if self.nonfinite == "skip" else None, scaled)
        return self._shaped(norms)

    @outside_graphs
    def step(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Clip, and run the optimizer's step; by :meth:`clip_into` where it can be used.

        Args:
            optimizer: any.
            scaler: which scaled the loss and has not unscaled the gradients; its `unscale_`, where
                needed, and `step` are called here, its `update()` is not. Default: None.
            closure: for LBFGS and others that compute the gradients themselves: clears the
                gradients, computes the loss, calls `backward`, and returns the loss. The gradients
                of each evaluation are clipped and recorded. Not together with a scaler. Default:
                None, the gradients are there.

        Returns:
            The norm before clipping, as :meth:`clip` returns it; of the last evaluation.

        Raises:
            TypeError: `optimizer` is not torch's, or is LBFGS and there is no closure.
            ValueError: there is a closure and a scaler, which takes none.
            RuntimeError: a norm is not finite and `nonfinite` is "raise"; or `max_skips` steps in a
                row were skipped; or the optimizer has gradients and the clipper has none. No step
                was taken. Or the optimizer has not called the closure.
        """
        if closure is not None:
            return self._step_with_closure(optimizer, scaler, closure)
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                f"{type(optimizer).__name__} computes gradients several times in a step; call "
                "clipper.step(optimizer, closure=closure)"
            )
        grads = self._gradients()
        into = self._why_not_into(optimizer, scaler, grads) is None
        self._refuse_replaced(optimizer, grads)
        if into:
            norm = self._clip_into(optimizer, scaler, grads)
        else:
            if scaler is not None:
                scaler.unscale_(optimizer)
            norm = self._clip(grads)
        try:
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.step()
        finally:
            if into:
                self._fused_steps[optimizer].disarm(optimizer)
        return norm

    def _step_with_closure(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None,
        closure: Callable[[], Any],
    ) -> Tensor:
        if scaler is not None and scaler.is_enabled():
            raise ValueError("a GradScaler takes no closure; compute the gradients before the step")
        norms: list[Tensor] = []

        def clipped() -> Any:
            loss = closure()
            grads = self._gradients()
            self._refuse_replaced(optimizer, grads)
            norms[:] = [self._clip(grads)]
            return loss

        optimizer.step(clipped)
        if not norms:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step has not called its closure, so nothing was "
                "clipped; compute the gradients before, and leave the closure out"
            )
        return norms[0]

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

    def nonfinite_names(self) -> list[str]:
        """Return the parameters whose norm was infinite or NaN in the latest step.

        Waits for the device. Empty where the norm of all together overflowed and none by itself.
        """
        return self._names(finite=False)

    def finite_names(self) -> list[str]:
        """Return the parameters whose norm was finite in the latest step. Waits for the device."""
        return self._names(finite=True)

    def _names(self, finite: bool) -> list[str]:
        return [
            name
            for names, norms in self._latest
            for name, is_finite in zip(names, norms.isfinite().tolist())
            if is_finite is finite
        ]

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

    @property
    def _size(self) -> int:
        """How many parameters there are."""
        return sum(len(group.parameters) for group in self._groups)

    def _measure(self, grads: list[list[Tensor]], scale: bool, record: bool) -> list[Clipped]:
        """Measure each group, and scale the plain ones if asked to.

        One without gradients has norm 0. The kernel may record the step by the way where there is
        but one group.
        """
        found = []
        self._latest = []
        device = next(group[0].device for group in grads if group)
        ring = self._ring.tensors_on if record and len(grads) == 1 else None
        for group, group_grads in zip(self._groups, grads):
            if not group_grads:
                found.append(_nothing(device))
            elif group.plain:
                names = group.names
                if len(group_grads) < len(names):
                    names = [n for n, p in zip(names, group.parameters) if p.grad is not None]
                found.append(self._clip_gradients(names, group_grads, group.max_norm, scale, ring))
            else:
                found.append(self._measure_parts(group, device))
        return found

    def _measure_parts(self, group: Group, device: torch.device) -> Clipped:
        """Measure a group of which some parameters are only measured, or do not count."""
        parts: dict[bool, tuple[list[str], list[Tensor]]] = {True: ([], []), False: ([], [])}
        for name, parameter, count in zip(group.names, group.parameters, group.counted):
            if parameter.grad is not None:
                names, grads = parts[count]
                names.append(name)
                grads.append(parameter.grad)
        found = _nothing(device)
        if parts[True][1]:
            found = self._clip_gradients(*parts[True], group.max_norm, scale=False)
        if parts[False][1]:
            uncounted = self._clip_gradients(*parts[False], math.inf, scale=False)
            if self.nonfinite != "keep":
                norm = found.total_norm + 0 * uncounted.total_norm.to(found.total_norm)
                zero = self.nonfinite == "zero"
                coefficient = clip_coefficient(norm, group.max_norm, zero)
                found = Clipped(norm, coefficient, found.norms)
        return found

    def _clip_gradients(
        self,
        names: list[str],
        grads: list[Tensor],
        max_norm: float,
        scale: bool,
        ring: Recorder | None = None,
    ) -> Clipped:
        clipped = clip_gradients(
            grads,
            max_norm,
            self.norm_type,
            scale=scale,
            zero_nonfinite=self.nonfinite == "zero",
            spare_nonfinite=self.nonfinite in ("raise", "skip"),
            norm_dtype=self.norm_dtype,
            ring=ring,
        )
        self._latest.append((names, clipped.norms))
        return clipped

    def _scale(
        self, group: Group, grads: list[Tensor], norm: Tensor, threshold: float | Tensor
    ) -> None:
        """Scale a measured group's gradients, those of them that are to be scaled."""
        zero = self.nonfinite == "zero"
        if not group.plain:
            pairs = [(p.grad, clip) for p, clip in zip(group.parameters, group.scaled)]
            grads = [grad for grad, clip in pairs if clip and grad is not None]
            measured = [grad for grad, clip in pairs if not clip and grad is not None]
            if zero and measured:
                scale_gradients(measured, norm, math.inf, zero)
        if grads:
            scale_gradients(grads, norm, threshold, zero)

    def _settle_by_kernel(self, found: list[Clipped]) -> list[Clipped]:
        """Let the device find the percentile and record the step, where the kernel has measured."""
        [first, *others], [group, *_] = found, self._groups
        if self.percentile is None or others or not group.plain:
            return found
        settled = settle_by_kernel(
            first,
            self.percentile,
            group.max_norm,
            self._ring.tensors_on,
            zero_nonfinite=self.nonfinite == "zero",
            spare_nonfinite=self.nonfinite in ("raise", "skip"),
        )
        return [settled or first]

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

    def _refuse_more_skips(self) -> None:
        if self.max_skips is None or not (row := self._ring.nonfinite_in_a_row(self.max_skips)):
            return
        names = ", ".join(self.nonfinite_names()) or "none by itself, only their sum"
        raise RuntimeError(
            f"the norm was not finite in {row} steps in a row, which were skipped; max_skips is "
            f"{self.max_skips}. Parameters with such gradients: {names}. Lower the learning rate, "
            "or look for the step that made their inputs or weights infinite"
        )

    def _refuse_recording(self) -> None:
        if (self.nonfinite in ("raise", "skip") or self.percentile is not None) and is_recorded():
            raise RuntimeError(
                "a graph is being recorded (make_fx, jit.trace, functorch), which cannot branch on "
                'the norm or keep a history; use nonfinite="keep" or "zero" and no percentile, or '
                "clip outside the graph"
            )

    def _refuse_replaced(self, optimizer: Optimizer, grads: list[list[Tensor]]) -> None:
        """Raise where the optimizer has gradients and the clipper has none; warn where it may."""
        found = sum(map(len, grads))
        if found and (found == self._found or found == self._size):
            return
        self._found = found
        ours = {id(p) for group in self._groups for p in group.parameters}
        theirs = [p for group in optimizer.param_groups for p in group["params"]]
        unknown = [p for p in theirs if p.grad is not None and id(p) not in ours]
        if not found and any(p.grad is not None for p in theirs):
            raise RuntimeError(
                f"none of the clipper's {self._size} parameters has a gradient, but some of the "
                f"optimizer's have: the step would not be clipped. {_REPLACED}"
            )
        if unknown and not ours <= set(map(id, theirs)):
            warnings.warn(
                f"the optimizer has gradients of {len(unknown)} parameters that the clipper does "
                f"not know, and the clipper has parameters without a gradient. {_REPLACED}",
                stacklevel=4,
            )

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
        [group], [ours] = self._groups, grads
        if not group.plain:
            if self.nonfinite == "skip":
                return 'nonfinite="skip" has to take away the gradients that are only measured'
            ours = [
                p.grad for p, c in zip(group.parameters, group.scaled) if c and p.grad is not None
            ]
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        theirs = {id(p.grad) for p in parameters if p.grad is not None}
        if theirs != set(map(id, ours)):
            return (
                f"the optimizer steps {len(theirs)} parameters that have gradients and the clipper "
                f"clips {len(ours)}, which are not the same"
            )
        return None

    def _shaped(self, norms: Tensor) -> Tensor:
        """Return norms [groups] as the user gets them."""
        return norms[0] if len(self._groups) == 1 else norms


_REPLACED = (
    "If the model's parameters were replaced after the clipper was created (fully_shard, to_empty, "
    "resized embeddings), create it after that."
)


def _nothing(device: torch.device) -> Clipped:
    """What is found where there are no gradients."""
    zero = torch.zeros((), device=device)
    return Clipped(zero, torch.ones_like(zero), zero[None][:0])


def _all_finite(norms: Tensor) -> bool:
    return all(map(math.isfinite, norms.tolist()))


def _vector(scalars: list[Tensor]) -> Tensor:
    """Return tensors of shape [] as one of shape [n], on the first one's device."""
    if len(scalars) == 1:
        return scalars[0][None]
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
