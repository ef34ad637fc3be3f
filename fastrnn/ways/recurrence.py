"""How one layer of the recurrence is computed and differentiated, whatever computes it.

A :class:`Path` computes a layer and its gradients without autograd; :class:`LSTMRecurrence`, the
``torch.autograd.Function``, makes any of them differentiable. The paths are those of step_loop.py
and fused.py; what dense.py, padded.py and rectangles.py call, torch differentiates. A backward that
is itself differentiated goes through differentiable operations.

16-bit inputs are computed in float32 and rounded once, at the output, where a path does not say
otherwise.

Notation as in cells/lstm.py; D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn.cells.lstm import LayerWeights, compute_dtype
from fastrnn.input.transforms import vectorized

# Compared with a device in every call: the name of its type is made anew each time, 3 us cold.
CPU = torch.device("cpu")


class LayerOutput(NamedTuple):
    """What a layer computes.

    Attributes:
        h: ``[N, D * P]`` outputs, the directions side by side.
        h_n: ``[D, S, P]`` final hidden states.
        c_n: ``[D, S, H]`` final cell states.
        c: ``[N, D * H]`` cell states, or None where nobody asked.
    """

    h: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None


Memory = Literal["save", "recompute"]
_MEMORIES = get_args(Memory)


def check_memory(name: str) -> None:
    """Refuse a setting of ``memory`` that does not exist.

    Raises:
        ValueError: with those that do.
    """
    if name not in _MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(_MEMORIES)}, got {name!r}")


def flatten_weights(weights: Sequence[LayerWeights]) -> list[Tensor]:
    """All tensors of all directions; :func:`unflatten_weights` undoes it."""
    return [tensor for direction in weights for tensor in direction if tensor is not None]


def unflatten_weights(
    flat: Sequence[Tensor], directions: int, *, bias: bool, projection: bool
) -> list[LayerWeights]:
    """The flat list of weights, by direction."""
    each = len(flat) // directions
    found = []
    for begin in range(0, len(flat), each):
        ih, hh, *rest = flat[begin : begin + each]
        bias_ih, bias_hh = (rest[0], rest[1]) if bias else (None, None)
        found.append(LayerWeights(ih, hh, bias_ih, bias_hh, rest[-1] if projection else None))
    return found


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """``[..., n, F]`` to ``[..., count, F]``, zeros behind; shares memory with nothing."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[-2]))


def side_by_side(states: Tensor | Sequence[Tensor]) -> Tensor:
    """``[D, N, F]`` to ``[N, D * F]``."""
    parts = list(states)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def columns(states: Tensor, index: int, width: int) -> Tensor:
    """A direction's part of ``[N, D * F]``."""
    return states[:, index * width : (index + 1) * width]


class OutputGradients(NamedTuple):
    """Gradients that reach a layer's outputs; None is zero."""

    h: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    c: Tensor | None

    def of_rows(self, valid: int) -> OutputGradients:
        """Those of the first rows alone."""
        h, c = (None if rows is None else rows[:valid] for rows in (self.h, self.c))
        return self._replace(h=h, c=c)

    def to_compute(self) -> OutputGradients:
        """In the dtype they are computed in."""
        return OutputGradients(*(None if g is None else to_compute(g)[0] for g in self))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on."""
    kind = "cpu" if device == CPU else device.type
    known = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inputs have been cast already; autocast must not cast what is computed inside."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def to_compute(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype they are computed in, without their history."""
    dtype = compute_dtype(tensors[0].dtype)
    if dtype == tensors[0].dtype:
        return [tensor.detach() for tensor in tensors]
    return [tensor.detach().to(dtype) for tensor in tensors]


class Path(Protocol):
    """A way to compute a layer. ``flat`` are all weights, of :func:`flatten_weights`."""

    def forward(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor], *, save: bool
    ) -> tuple[LayerOutput, Sequence[Tensor | None]]:
        """The output, and with ``save`` what backward needs besides the inputs."""

    def backward(
        self,
        grads: OutputGradients,
        rows: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        flat: Sequence[Tensor],
        saved: Sequence[Any],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of rows, h_0, c_0 and each weight, in their dtypes; ``needs`` likewise.

        Nothing that was saved is changed.
        """

    def composite(
        self, rows: Tensor, h_0: Tensor, c_0: Tensor, flat: Sequence[Tensor]
    ) -> LayerOutput:
        """The layer in operations that torch differentiates, twice too."""


class LSTMRecurrence(torch.autograd.Function):
    """All directions of one layer, by a :class:`Path`.

    Saved for backward: the inputs, and what the path says; none is written to, so a second backward
    gives the same gradients. Where backward itself is differentiated (``create_graph=True``) or
    vectorized (``is_grads_batched=True``) it goes through the path's differentiable operations.
    """

    @staticmethod
    def forward(
        ctx: Any, path: Path, rows: Tensor, h_0: Tensor, c_0: Tensor, *flat: Tensor
    ) -> LayerOutput:
        """``h``, ``h_n``, ``c_n`` and ``c`` of :class:`LayerOutput`."""
        output, saved = path.forward(rows, h_0, c_0, flat, save=True)
        ctx.path, ctx.weights = path, len(flat)
        ctx.save_for_backward(rows, h_0, c_0, *flat, *saved)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that need one."""
        grads = OutputGradients(*d_outputs)
        rows, h_0, c_0, *rest = ctx.saved_tensors
        flat, saved = rest[: ctx.weights], rest[ctx.weights :]
        needs = ctx.needs_input_grad[1:]
        if all(gradient is None for gradient in grads):
            return (None,) * (1 + len(needs))
        with outside_autocast(rows.device):
            if torch.is_grad_enabled() or vectorized(*grads):
                inputs = [rows, h_0, c_0, *flat]
                found = differentiate(ctx.path.composite, grads, inputs, needs)
            else:
                found = ctx.path.backward(grads, rows, h_0, c_0, flat, saved, needs)
        return (None, *found)


def run(
    path: Path,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    flat: Sequence[Tensor],
    *,
    needs_grad: bool | None = None,
) -> LayerOutput:
    """All directions of one layer by ``path``, with autograd where an input needs a gradient.

    Args:
        path: what computes it.
        rows: ``[N, I]``.
        h_0: ``[D, S, P]``.
        c_0: ``[D, S, H]``.
        flat: all weights.
        needs_grad: where it is known. Default: looked up.
    """
    if needs_grad is None:
        inputs = (rows, h_0, c_0, *flat)
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if needs_grad:
        return LayerOutput(*LSTMRecurrence.apply(path, rows, h_0, c_0, *flat))
    return path.forward(rows, h_0, c_0, flat, save=False)[0]


def differentiate(
    composite: Callable[..., Sequence[Tensor | None]],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a layer as functions of its inputs and ``grads``, to be differentiated again.

    Args:
        composite: the layer in differentiable operations, as :meth:`Path.composite`.
        grads: that reach its outputs; None is zero.
        inputs: rows, h_0, c_0 and each weight.
        needs: whether each gradient is wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a gradient reaches an input here only through this layer.
        views = [tensor.view_as(tensor) for tensor in inputs]
        rows, h_0, c_0, *flat = views
        outputs = composite(rows, h_0, c_0, flat)
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, grads, strict=True)
        if output is not None and gradient is not None and output.requires_grad
    ]
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if needed else None for needed in needs]
