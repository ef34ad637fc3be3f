"""The forms an LSTM's input comes in, and the same form for its output.

A form flattens the input to ``[entries, I]``, tells the layout where each step stands in it, and
puts rows ``[N, F]`` back: zeros where the input had no valid step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import torch_private
from fastrnn.input.arguments import host_values
from fastrnn.input.blanking import blank_, blanked
from fastrnn.input.packing import (
    Cut,
    Layout,
    PackedLayout,
    RectangleLayout,
    ThereAndBack,
    cut_rows,
    dense_layout,
    ragged_layout,
    without_unused,
)
from fastrnn.input.transforms import is_traced, read, under_functorch, vectorized


def _into_rectangles(flat: Tensor, layout: RectangleLayout | ThereAndBack) -> Tensor:
    rows = flat.index_select(0, layout.gather)
    return blanked(rows, layout.valid) if vectorized(rows) else blank_(rows, layout.valid)


class _IntoRectangles(torch.autograd.Function):
    """:func:`into_rectangles` as autograd has it; each of the two is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: RectangleLayout | ThereAndBack) -> Tensor:
        ctx.layout = layout
        return _into_rectangles(flat, layout)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        return out_of_rectangles(d_rows, ctx.layout), None


class _OutOfRectangles(torch.autograd.Function):
    """:func:`out_of_rectangles` as autograd has it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: RectangleLayout | ThereAndBack) -> Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.spread)

    @staticmethod
    def backward(ctx: Any, d_flat: Tensor) -> tuple[Tensor, None]:
        return into_rectangles(d_flat, ctx.layout), None


def into_rectangles(flat: Tensor, layout: RectangleLayout | ThereAndBack) -> Tensor:
    """``[entries, F]`` to rows ``[N, F]``, zeros in the padding; one node where it can be."""
    if under_functorch() or not (torch.is_grad_enabled() and flat.requires_grad):
        return _into_rectangles(flat, layout)
    rows: Tensor = _IntoRectangles.apply(flat, layout)
    return rows


def out_of_rectangles(rows: Tensor, layout: RectangleLayout | ThereAndBack) -> Tensor:
    """Rows ``[N, F]``, the last of them zero, to ``[entries, F]``, zeros at invalid steps."""
    if under_functorch() or not (torch.is_grad_enabled() and rows.requires_grad):
        return rows.index_select(0, layout.spread)
    flat: Tensor = _OutOfRectangles.apply(rows, layout)
    return flat


def _spread(rows: Tensor, layout: Layout, entries: int) -> Tensor:
    """Rows back to their places in ``[entries, F]``; zeros elsewhere."""
    if isinstance(layout, RectangleLayout):
        return out_of_rectangles(rows, layout)
    assert isinstance(layout, PackedLayout)
    if layout.there_and_back is not None:
        return out_of_rectangles(rows, layout.there_and_back)
    assert layout.gather is not None
    spare = 0 if layout.exact else 1  # unused rows of a bounded layout go to a row cut off again
    flat = rows.new_zeros(entries + spare, rows.shape[1])
    if under_functorch():  # which has a rule for the copy alone
        return flat.index_copy(0, layout.gather, rows)[:entries]
    flat = flat.index_copy_(0, layout.gather, rows)
    return flat[:entries] if spare else flat  # a slice has a derivative, of two operations


def callers_own(output: Tensor) -> Tensor:
    """What a layer computed, as the caller may write to it: backward keeps the layer's own."""
    return output.clone() if output.requires_grad else output


def _collect(flat: Tensor, layout: Layout) -> Tensor:
    """The layout's rows out of ``[entries, F]``."""
    if isinstance(layout, RectangleLayout):
        return into_rectangles(flat, layout)
    if layout.gather is None:
        return flat
    assert isinstance(layout, PackedLayout)
    if layout.there_and_back is not None:
        return into_rectangles(flat, layout.there_and_back)
    if layout.exact:
        return flat.index_select(0, layout.gather)
    # Unused rows are zero: the products over all rows that follow would carry a NaN on.
    rows = flat.index_select(0, layout.gather.clamp(max=flat.shape[0] - 1))
    return rows.masked_fill((layout.gather == flat.shape[0]).unsqueeze(1), 0.0)


def _check_strided(x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(
            f"input must be a dense tensor (torch.strided), got {x.layout}; use input.to_dense()"
        )


def _axes(batch_first: bool) -> str:
    return f"{'[B, T]' if batch_first else '[T, B]'}, as batch_first says"


class Padded:
    """``[T, B, I]``, or ``[B, T, I]`` where ``batch_first``."""

    def __init__(self, x: Tensor, batch_first: bool) -> None:
        _check_strided(x)
        self.x = self.data = x
        self.time_major = not batch_first
        self.axes = _axes(batch_first)
        self.steps, self.batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
        self.entries = self.steps * self.batch
        self.device = x.device

    def own_lengths(self) -> Tensor | None:
        """None: every sequence has all T steps."""
        return None

    def layout(self, cut: Cut | None = None) -> Layout:
        """The layout where nothing says that a step is invalid; there is nothing to cut."""
        # In a graph of a GPU's operations a tensor on the host would keep CUDA graphs out.
        device = self.device if torch.compiler.is_compiling() else "cpu"
        return dense_layout(self.steps, self.batch, device)

    def flat_index(self, step: Tensor, element: Tensor) -> Tensor:
        """Where a step of a batch element stands in the flattened input."""
        return step * self.batch + element if self.time_major else element * self.steps + step

    def rows(self, layout: Layout) -> Tensor:
        """The layout's rows, ``[N, I]``."""
        x = self.x
        if layout.gather is None and not self.time_major:
            x = x.transpose(0, 1)
        return _collect(x.reshape(self.entries, x.shape[2]), layout)

    def restore(self, rows: Tensor, layout: Layout) -> Tensor:
        """Rows ``[N, F]`` in the form of the input."""
        if layout.gather is not None:
            rows = _spread(rows, layout, self.entries)
            return rows.view(self.x.shape[0], self.x.shape[1], rows.shape[1])
        output = callers_own(rows).view(self.steps, self.batch, rows.shape[1])
        return output if self.time_major else output.transpose(0, 1)


_BUILD_PACKED = "build it with torch.nn.utils.rnn.pack_padded_sequence"


def _sizes_of(x: PackedSequence) -> tuple[int, ...] | None:
    """``batch_sizes`` as numbers, checked, without steps that nobody reaches; None while tracing.

    nn.LSTM takes data that have more rows, and computes with some of them.
    """
    if is_traced(x.batch_sizes) or torch_private.tracing_state():
        return None
    if x.batch_sizes.dtype.is_floating_point or x.batch_sizes.dim() != 1:
        raise ValueError(
            "batch_sizes of a PackedSequence must be [T] integers, got "
            f"{x.batch_sizes.dtype} {list(x.batch_sizes.shape)}; {_BUILD_PACKED}"
        )
    sizes = host_values("batch_sizes of a PackedSequence", x.batch_sizes)
    if not sizes:
        raise ValueError(
            f"a PackedSequence must have a step, got one without batch_sizes; {_BUILD_PACKED}"
        )
    if sizes[-1] < 0 or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            "batch_sizes of a PackedSequence must not grow, nor be negative, got "
            f"{sizes}; {_BUILD_PACKED}"
        )
    if sum(sizes) != x.data.shape[0]:
        raise ValueError(
            f"data of a PackedSequence must have {sum(sizes)} rows (as many as its batch_sizes "
            f"add up to), got {x.data.shape[0]}; {_BUILD_PACKED}"
        )
    return without_unused(sizes)


class Packed:
    """A PackedSequence: the layout already, unless a mask or resets change it.

    Raises:
        ValueError: its parts do not fit each other.
    """

    def __init__(self, x: PackedSequence, batch_first: bool) -> None:
        _check_strided(x.data)
        self.x, self.data = x, x.data
        self.time_major = not batch_first
        self.axes = _axes(batch_first)
        self.entries = self.data.shape[0]
        self.device = self.data.device
        self.sizes = _sizes_of(x)
        self.steps = x.batch_sizes.shape[0]
        self.batch = read(lambda: x.batch_sizes[0]) if self.sizes is None else self.sizes[0]
        if self.sizes is not None:
            self._check_indices()

    def _check_indices(self) -> None:
        for name, indices in zip(("sorted_indices", "unsorted_indices"), self.x[2:], strict=True):
            if indices is not None and tuple(indices.shape) != (self.batch,):
                raise ValueError(
                    f"{name} of a PackedSequence must have shape [{self.batch}] (as "
                    f"batch_sizes[0] says), got {list(indices.shape)}; {_BUILD_PACKED}"
                )

    def own_lengths(self) -> Tensor | None:
        """``[B]``, in the caller's order."""
        sizes = self.x.batch_sizes
        sorted_lengths = (sizes > torch.arange(self.batch, device=sizes.device).unsqueeze(1)).sum(1)
        inverse = self.x.unsorted_indices
        return sorted_lengths if inverse is None else sorted_lengths[inverse.to(sizes.device)]

    def layout(self, cut: Cut | None = None) -> Layout:
        """The layout it is, and nothing is copied; or what ``cut`` makes of it."""
        inverse = self.x.unsorted_indices
        owner, leaves = self.x.sorted_indices, None if inverse is None else inverse.unsqueeze(0)
        if cut is not None:
            assert self.sizes is not None  # oneDNN is not asked while torch.compile traces
            layout = cut_rows(self.sizes, self.batch, cut)
            if layout is not None:
                return dataclasses.replace(layout, owner=owner, leaves=leaves)
        return PackedLayout(
            *(self.entries, self.batch, self.x.batch_sizes),
            owner=owner,
            leaves=leaves,
            sizes=self.sizes,
        )

    def flat_index(self, step: Tensor, element: Tensor) -> Tensor:
        """Where a step of a batch element stands in the flattened input."""
        sizes, inverse = self.x.batch_sizes.to(step.device), self.x.unsorted_indices
        rank = element if inverse is None else inverse.to(step.device)[element]
        return (sizes.cumsum(0) - sizes)[step] + rank

    def rows(self, layout: Layout) -> Tensor:
        """The layout's rows, ``[N, I]``."""
        return _collect(self.data, layout)

    def restore(self, rows: Tensor, layout: Layout) -> PackedSequence:
        """Rows ``[N, F]`` as a PackedSequence."""
        data = callers_own(rows) if layout.gather is None else _spread(rows, layout, self.entries)
        return PackedSequence(data, *self.x[1:])


class Jagged:
    """A nested tensor of layout ``torch.jagged``, ``[B, j, I]`` whatever ``batch_first`` says."""

    time_major = False
    axes = "[B, T], as of every jagged input, T its longest sequence"

    def __init__(self, x: Any) -> None:
        self.data: Tensor = x.values()
        self.offsets: Tensor = x.offsets()
        self.lengths: Tensor | None = x.lengths()
        self.batch = x.shape[0]
        self.steps = int(self.own_lengths().max()) if self.batch else 0
        self.entries = self.data.shape[0]
        self.device = x.device

    def layout(self, cut: Cut | None = None) -> Layout:
        """The layout of its own lengths."""
        layout = ragged_layout(self, cut=cut)
        assert isinstance(layout, Layout)
        return layout

    def own_lengths(self) -> Tensor:
        """``[B]``."""
        return self.offsets.diff() if self.lengths is None else self.lengths

    def flat_index(self, step: Tensor, element: Tensor) -> Tensor:
        """Where a step of a batch element stands in the flattened input."""
        return self.offsets.to(step.device)[element] + step

    def rows(self, layout: Layout) -> Tensor:
        """The layout's rows, ``[N, I]``."""
        return _collect(self.data, layout)

    def restore(self, rows: Tensor, layout: Layout) -> Tensor:
        """Rows ``[N, F]`` in the form of the input."""
        flat = _spread(rows, layout, self.entries)
        return torch.nested.nested_tensor_from_jagged(
            flat, self.offsets, self.lengths, max_seqlen=self.steps
        )


Form: TypeAlias = Padded | Packed | Jagged
