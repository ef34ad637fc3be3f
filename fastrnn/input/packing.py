"""Everything ragged becomes one layout of rows: a :class:`PackedLayout`.

Rows are valid time steps only, time-major, with the sequences sorted by decreasing length: the
order of :class:`torch.nn.utils.rnn.PackedSequence`. Step ``t`` owns ``batch_sizes[t]`` consecutive
rows. Lengths, masks with holes and resets differ only in which steps of the input those rows are,
so everything behind this module sees one form.

Where oneDNN will run them the rows are a little more. A :class:`RectangleLayout` has those of
:class:`Rectangle` after rectangle, each a dense batch of its own, with padding at its sequences'
ends; the valid rows among them are in the same order. A :class:`PaddedLayout` has no rows: the
padded batch stays as it is.

Notation: B batch, T steps of the input, S sequences of the layout (B, or more when resets cut a
sequence into segments), N rows, D directions.

Two regimes, one algorithm. Where lengths, mask and resets are on the CPU the layout is *exact*: N
is the number of valid steps. Under ``torch.compile``, or when they live on an accelerator, nothing
may depend on their values without a synchronisation, so the layout is *bounded*: N = B * T rows are
allocated, and those past ``batch_sizes.sum()`` are unused.

Limits: a layout is built anew at every call (0.1 to 0.2 ms); it knows nothing of the LSTM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fastrnn.input.arguments import (
    KnownLengths,
    Lengths,
    assert_within,
    check_device,
    check_flags,
    host_values,
    known_lengths,
)
from fastrnn.input.constants import constant
from fastrnn.input.transforms import is_batched, is_traced
from fastrnn.input.upload import upload

# What rounding the steps of a padded batch up may add to them.
MOST_ADDED = 0.02


class Rectangle(NamedTuple):
    """Steps ``[first, last)`` of the first ``sequences`` sequences, sorted by decreasing length."""

    first: int
    last: int
    sequences: int


# Where to cut, by the number of sequences active at each step; None: pack instead.
Cut: TypeAlias = Callable[[tuple[int, ...]], Sequence[Rectangle] | None]


class Layout:
    """What the layouts have in common: rows out of the input, and where states enter and leave.

    Attributes:
        rows: N, rows allocated.
        sequences: S, sequences of the layout, sorted by decreasing length.
        gather: ``[N]`` int64, each row's place in the flattened input. None: the rows are the
            flattened input as it is.
        owner: ``[S]`` int64, the batch element each sequence belongs to. None: the identity.
        enters: ``[2, S]`` bool, forward and reverse: whether the batch element's initial state
            enters this sequence; else it starts from zero. None: always.
        leaves: ``[1 or 2, B]`` int64, forward and reverse, or one for both: the sequence whose end
            state is the batch element's. None: the identity.
    """

    rows: int
    sequences: int
    gather: Tensor | None
    owner: Tensor | None
    enters: Tensor | None
    leaves: Tensor | None

    def enter(self, initial: Tensor, directions: int) -> Tensor:
        """Initial states of the batch to those of the sequences.

        Args:
            initial: ``[L * D, B, F]``, of all layers.
            directions: D.

        Returns:
            ``[L * D, S, F]``.
        """
        if self.owner is None:
            return initial
        states = initial.index_select(1, self.owner)
        if self.enters is None:
            return states
        enters = self.enters[:directions].unsqueeze(-1)
        layers: Tensor = states.unflatten(0, (-1, directions))
        return torch.where(enters, layers, 0.0).flatten(0, 1)

    def leave(self, final: Tensor, directions: int) -> Tensor:
        """Final states of the sequences, ``[L * D, S, F]``, to those of the batch, B for S."""
        if self.leaves is None:
            return final
        if self.leaves.shape[0] == 1 or directions == 1:
            return final.index_select(1, self.leaves[0])
        layers: Tensor = final.unflatten(0, (-1, directions))
        # Not gather, whose derivative on a GPU is not deterministic.
        left = [
            states.index_select(1, leaves)
            for states, leaves in zip(layers.unbind(1), self.leaves, strict=True)
        ]
        return torch.stack(left, 1).flatten(0, 1)


class ThereAndBack(NamedTuple):
    """Steps of the flattened input to rows, and rows to steps.

    Attributes:
        gather: ``[N]`` int64, each row's place in the flattened input; any where it is unused.
        spread: ``[entries]`` int64, the row of each step of the flattened input; of an invalid one
            the last row, which is unused then.
        valid: ``[N, 1]`` bool, rows that are used.
    """

    gather: Tensor
    spread: Tensor
    valid: Tensor


class Steps(NamedTuple):
    """Which rows are whose: step t owns ``offsets[t]`` and the ``sizes[t] - 1`` that follow.

    Attributes:
        sizes: ``[steps]`` int64, sequences active at each step, never growing.
        offsets: ``[steps]`` int64, the first row of each.
    """

    sizes: Tensor
    offsets: Tensor


def steps_of(batch_sizes: Tensor) -> Steps:
    """The steps of ``batch_sizes``, on its device."""
    return Steps(batch_sizes, batch_sizes.cumsum(0) - batch_sizes)


@dataclass(frozen=True, eq=False)
class PackedLayout(Layout):
    """Rows are valid steps: which step of the input each is, and where states enter and leave.

    Attributes:
        rows: N, rows allocated; all are valid in an exact layout.
        sequences: see :class:`Layout`.
        batch_sizes: ``[steps]`` int64, sequences active at each step; on the CPU in an exact
            layout.
        gather: see :class:`Layout`; one past the input's end for an unused row of a bounded layout.
        owner: see :class:`Layout`.
        enters: see :class:`Layout`.
        leaves: see :class:`Layout`.
        exact: whether N is exact, and ``batch_sizes`` on the host.
        sizes: ``batch_sizes`` as Python's numbers, where they are known without looking: a tensor
            of them has no values under a fake mode. None: look.
        there_and_back: ``gather`` with its inverse, where that is known.
    """

    rows: int
    sequences: int
    batch_sizes: Tensor
    gather: Tensor | None = None
    owner: Tensor | None = None
    enters: Tensor | None = None
    leaves: Tensor | None = None
    exact: bool = True
    sizes: tuple[int, ...] | None = None
    there_and_back: ThereAndBack | None = None
    _steps: dict[torch.device, Steps] = field(default_factory=dict, init=False, repr=False)

    def steps_on(self, device: torch.device) -> Steps:
        """The steps on the device, put there once for all layers."""
        if device not in self._steps:
            self._steps[device] = self._make_steps(device)
        return self._steps[device]

    def keep_steps(self, device: torch.device, steps: Steps) -> None:
        """The steps, where they are on the device already."""
        self._steps[device] = steps

    @property
    def dense(self) -> bool:
        """Whether every sequence has all steps, as far as is known without looking."""
        return self.exact and self.rows == self.batch_sizes.shape[0] * self.sequences

    @property
    def batch(self) -> int:
        """B; S sequences are as many, or an upper bound where resets cut."""
        return self.sequences if self.leaves is None else self.leaves.shape[1]

    def _make_steps(self, device: torch.device) -> Steps:
        """A dense batch's are made on the device, not copied there."""
        if self.batch_sizes.device == device:
            return steps_of(self.batch_sizes)
        if not self.dense or not self.rows:
            sizes, offsets = upload(device, *steps_of(self.batch_sizes))
            assert sizes is not None and offsets is not None
            return Steps(sizes, offsets)
        steps = self.batch_sizes.shape[0]
        sizes = torch.full((steps,), self.sequences, dtype=torch.int64, device=device)
        return Steps(sizes, torch.arange(0, self.rows, self.sequences, device=device))


class PaddedLayout(NamedTuple):
    """Where a padded batch on the CPU, which stays as it is, holds no sequence.

    Attributes:
        carry: ``[T', B, 1]`` float32, the carry feature of onednn.py: 1 where it does not. T' is
            :func:`common_steps` of T.
        valid: ``[T', B, 1]`` bool, where it does.
        last: ``[1, B, 1]`` int64, the last valid step of each sequence.
    """

    carry: Tensor
    valid: Tensor
    last: Tensor


@dataclass(frozen=True, eq=False)
class RectangleLayout(Layout):
    """Rows are those of rectangles one after the other, and a last one that is padding.

    Everything is on the CPU. Not all sequences need have a step.

    Attributes:
        rows: N, of all rectangles and one more.
        sequences: see :class:`Layout`.
        sizes: sequences active at each step.
        rectangles: in the order of time; they cover all valid steps.
        gather: see :class:`Layout`; any place for padding.
        spread: ``[entries]`` int64, the row of each step of the flattened input; the last row for
            invalid ones.
        empty: ``[N]`` bool, rows that are padding.
        last: ``[sizes[0]]`` int64, the row of each sequence's last valid step.
        step: ``[N]`` int64, of each row.
        sequence: ``[N]`` int64, of each row.
        lengths: ``[S]`` int64, of the sequences.
        owner: see :class:`Layout`.
        enters: see :class:`Layout`.
        leaves: see :class:`Layout`.
    """

    rows: int
    sequences: int
    sizes: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]
    gather: Tensor
    spread: Tensor
    empty: Tensor
    last: Tensor
    step: Tensor
    sequence: Tensor
    lengths: Tensor
    owner: Tensor | None
    enters: Tensor | None
    leaves: Tensor | None

    @property
    def has_padding(self) -> bool:
        """Whether a rectangle holds a step that is not valid."""
        return self.rows - 1 > sum(self.sizes)

    @cached_property
    def valid(self) -> Tensor:
        """``[N, 1]`` bool, rows that are valid steps."""
        return ~self.empty.unsqueeze(-1)

    @cached_property
    def carry(self) -> Tensor:
        """``[N, 1]`` float32, the carry feature of onednn.py."""
        return self.empty.unsqueeze(-1).float()

    @cached_property
    def valid_rows(self) -> Tensor:
        """int64, rows that are valid steps, ascending: the order of a :class:`PackedLayout`."""
        return torch.nonzero_static(self.valid.flatten(), size=sum(self.sizes)).squeeze(1)

    @cached_property
    def mirror(self) -> Tensor:
        """``[N]`` int64, for each row that of its sequence's opposite step; itself for padding."""
        mirror = torch.arange(self.rows, device="cpu")
        step, sequence = (
            part.index_select(0, self.valid_rows) for part in (self.step, self.sequence)
        )
        opposite = self.lengths.index_select(0, sequence) - 1 - step
        first_rows = torch.tensor(_first_rows(self.rectangles), device="cpu")
        mirror[self.valid_rows] = first_rows.index_select(0, opposite) + sequence
        return mirror


def _first_rows(rectangles: Sequence[Rectangle]) -> list[int]:
    """The first row of each step that the rectangles cover."""
    first_rows: list[int] = []
    begin = 0
    for first, last, sequences in rectangles:
        end = begin + (last - first) * sequences
        first_rows.extend(range(begin, end, sequences))
        begin = end
    return first_rows


class Places(Protocol):
    """Where the steps of a batch stand in the flattened input."""

    batch: int
    steps: int
    entries: int
    device: torch.device

    def flat_index(self, step: Tensor, element: Tensor) -> Tensor:
        """Where step ``step`` of batch element ``element`` stands in the flattened input."""


class Addressing(Places, Protocol):
    """What the layout must know of an input's form (see forms.py)."""

    time_major: bool
    axes: str  # of a mask or resets, and who says so

    def own_lengths(self) -> Tensor | None:
        """``[B]`` lengths the form itself carries; None where every sequence has all T steps."""


# What makes a bounded layout of a padded batch, of lengths, mask and resets on its device. None: it
# cannot.
Bounded: TypeAlias = Callable[
    [Addressing, Tensor | None, Tensor | None, Tensor | None], PackedLayout | None
]


class _Segments(NamedTuple):
    """Runs of consecutive valid steps that share a state; ``[S]`` each, unsorted."""

    owner: Tensor
    begin: Tensor
    length: Tensor
    first: Tensor
    last: Tensor
    keeps_initial: Tensor


def dense_layout(steps: int, batch: int, device: torch.device | str = "cpu") -> PackedLayout:
    """The layout of a padded batch in which every sequence has all T steps.

    Args:
        steps: T.
        batch: B.
        device: of ``batch_sizes``. Default: the host.
    """
    sizes = torch.full((steps,), batch, dtype=torch.int64, device=device)
    # A graph of torch.compile holds for every number of steps.
    known = None if torch.compiler.is_compiling() else (batch,) * steps
    return PackedLayout(steps * batch, batch, sizes, sizes=known)


def padded_layout(steps: int, lengths: Tensor) -> PaddedLayout:
    """The layout of a padded batch that is not worth packing.

    Args:
        steps: T.
        lengths: ``[B]`` int64 on the CPU, each in [1, T].
    """
    ends = lengths.view(1, -1, 1)
    valid = _steps(common_steps(steps)) < ends
    return PaddedLayout(valid.logical_not().float(), valid, ends - 1)


def common_steps(steps: int) -> int:
    """T rounded up, by less than 2 %, to a number that other batches have too.

    oneDNN compiles code for every shape it has not met, and keeps it: about 0.2 MiB a shape.
    """
    grain = 1 << (int(MOST_ADDED * steps) + 1).bit_length() - 1
    return -(-steps // grain) * grain


@constant(maxsize=64)
def _steps(count: int) -> Tensor:
    """``[T, 1, 1]``: 0, 1, ..., for batches of T steps that come again."""
    return torch.arange(count, device="cpu").view(-1, 1, 1)


def ragged_layout(
    form: Addressing,
    lengths: Lengths | int | KnownLengths | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    cut: Cut | None = None,
    wait: bool = False,
    bounded: Bounded | None = None,
) -> PackedLayout | RectangleLayout:
    """The layout of a batch of which only some steps are valid.

    Args:
        form: the input's form.
        lengths: ``[B]`` integers in [0, T], the leading steps of each sequence that are valid; at
            most those that the form itself carries. Default: all.
        mask: bool, True = valid, anywhere; ``[T, B]``, or ``[B, T]`` where the form is batch first.
            Default: all True.
        resets: bool, True = the state is zeroed before this step; shaped as ``mask``. On a masked
            step it holds for the sequence's next valid step.
        cut: where to cut an exact layout into rectangles. Default: pack.
        wait: make an exact layout, for which this waits for a device that holds the lengths, the
            mask or the resets. Default: False.
        bounded: what makes a bounded layout of a padded batch. Default: operations of torch.

    Returns:
        An exact layout where everything is on the host and nothing is being traced, else a bounded
        one. Cut into rectangles where ``cut`` says so.

    Raises:
        ValueError: a shape or a length that does not fit the input.
        TypeError: a dtype that is not integral (lengths) or bool (mask, resets).
    """
    steps, batch = form.steps, form.batch
    own = form.own_lengths()
    if wait:
        own, mask, resets = (None if v is None else v.cpu() for v in (own, mask, resets))
        lengths = lengths.cpu() if isinstance(lengths, Tensor) else lengths
    given = {
        "the input's lengths": own,
        "lengths": lengths.tensor if isinstance(lengths, KnownLengths) else lengths,
        "mask": mask,
        "resets": resets,
    }
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    values = tensors.values()
    exact = not is_traced(*values) and all(v.is_cpu and not is_batched(v) for v in values)
    if not exact:
        for name, value in tensors.items():
            check_device(name, value, form.device)
    device = torch.device("cpu") if exact else form.device

    known = None
    if lengths is not None:
        if isinstance(lengths, KnownLengths):
            known = lengths
        else:
            known = known_lengths(lengths, batch, steps, exact, own)
        own = known.tensor
    if mask is not None:
        mask = _flags("mask", mask, form)
    if resets is not None:
        resets = _flags("resets", resets, form)
    brought = form.own_lengths() if known is not None and not exact else None
    own, mask, resets = upload(device, own, mask, resets)
    if bounded is not None and not exact and form.entries == steps * batch > 0:
        layout = bounded(form, own, mask, resets)
        if layout is not None:
            return layout
    if known is not None and own is not None and not exact:
        assert_within(own, steps, brought)
    if own is None:
        valid_lengths = torch.full((batch,), steps, dtype=torch.int64, device=device)
    else:
        valid_lengths = own
    places = None  # [B, T] the step at which a sequence's k-th valid step stands; None: the k-th
    if mask is not None:
        valid = mask & (torch.arange(steps, device=device) < valid_lengths.unsqueeze(1))
        valid_lengths = valid.sum(1)
        places = torch.argsort(~valid, dim=1, descending=False, stable=True)
    segments = None
    length = valid_lengths
    if resets is not None:
        segments = _cut(resets, places, valid_lengths, exact)
        length = segments.length

    length, order = torch.sort(length, descending=True, stable=True)
    owner = order if segments is None else segments.owner.index_select(0, order)
    found = _Sorted(form, length, order, owner, segments, places)
    if not exact:
        return _bounded(found)
    if known is not None and known.values is not None and mask is None and resets is None:
        descending = sorted(known.values, reverse=True)
    else:
        descending = host_values("lengths, mask and resets", length)
    sizes = staircase(descending)
    rectangles = cut(tuple(sizes)) if cut is not None and sizes else None
    if rectangles:
        return _in_rectangles(found, descending, sizes, tuple(rectangles))
    return _packed(found, sizes, sum(descending))


def _flags(name: str, flags: Tensor, form: Addressing) -> Tensor:
    """A mask or resets as ``[B, T]``, checked."""
    shape = [form.steps, form.batch] if form.time_major else [form.batch, form.steps]
    checked = check_flags(name, flags, shape, form.axes)
    return checked.t() if form.time_major else checked


class _PackedRows:
    """The rows of an exact :class:`PackedLayout`, as an input of their own."""

    device = torch.device("cpu")

    def __init__(self, sizes: Sequence[int], sequences: int) -> None:
        self.batch, self.steps, self.entries = sequences, len(sizes), sum(sizes)
        offsets = [0, *itertools.accumulate(sizes)]
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device=self.device)

    def flat_index(self, step: Tensor, element: Tensor) -> Tensor:
        """The row of a step of a sequence."""
        return self.offsets.index_select(0, step) + element


def cut_rows(sizes: Sequence[int], sequences: int, cut: Cut) -> RectangleLayout | None:
    """How the rows of an exact :class:`PackedLayout` go into rectangles; None where they do not.

    Args:
        sizes: sequences active at each step.
        sequences: S; those without a step count.
        cut: where to cut.
    """
    rectangles = cut(tuple(sizes)) if sizes else None
    if not rectangles:
        return None
    lengths = staircase(sizes)
    lengths += [0] * (sequences - len(lengths))
    order = torch.arange(sequences, device="cpu")
    length = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    found = _Sorted(_PackedRows(sizes, sequences), length, order, order, None, None)
    return _in_rectangles(found, lengths, list(sizes), tuple(rectangles))


class _Sorted(NamedTuple):
    """The sequences of a batch by decreasing length, and where their steps stand in the input.

    Attributes:
        form: the input's form.
        length: ``[S]``.
        order: ``[S]``, which they were before they were sorted.
        owner: ``[S]``, the batch element each belongs to.
        segments: what resets cut the batch into, unsorted; None without resets.
        places: ``[B, T]``, the step at which a batch element's k-th valid step stands; None: the
            k-th.
    """

    form: Places
    length: Tensor
    order: Tensor
    owner: Tensor
    segments: _Segments | None
    places: Tensor | None

    def flat_index(self, step: Tensor, sequence: Tensor, unused: Tensor | None = None) -> Tensor:
        """Where these steps of these sequences stand in the flattened input.

        Where ``unused``, whatever is in range.
        """
        element = self.owner.index_select(0, sequence)
        if self.segments is not None:
            begin = self.segments.begin.index_select(0, self.order)
            step = step + begin.index_select(0, sequence)
        if unused is not None:
            step = step.masked_fill(unused, 0)
        if self.places is not None:
            step = self.places[element, step]
        return self.form.flat_index(step, element)

    def enters(self) -> Tensor | None:
        """See :class:`Layout`."""
        if self.segments is None:
            return None
        first, last, keeps_initial = (
            flag.index_select(0, self.order)
            for flag in (self.segments.first, self.segments.last, self.segments.keeps_initial)
        )
        return torch.stack([first & keeps_initial, last])

    def leaves(self) -> Tensor:
        """See :class:`Layout`."""
        batch, device = self.form.batch, self.order.device
        if self.segments is None:
            leaves = torch.empty_like(self.order)
            leaves = leaves.scatter(0, self.order, torch.arange(batch, device=device)).unsqueeze(0)
        else:
            ends = self.segments.last, self.segments.first
            leaves = torch.stack(
                [_where_owned(end.index_select(0, self.order), self.owner, batch) for end in ends]
            )
        return leaves


def _packed(found: _Sorted, sizes: list[int], rows: int) -> PackedLayout:
    """The exact layout."""
    batch_sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    stops = batch_sizes.cumsum(0)
    # Row n is step `step` of sequence n - (first row of that step).
    row = torch.arange(rows, device="cpu")
    step = torch.searchsorted(stops, row, right=True)
    sequence = row - (stops - batch_sizes).index_select(0, step)
    device, offsets = found.form.device, stops - batch_sizes
    gather = found.flat_index(step, sequence)
    # The steps as well, which only the kernels need: in the same copy they cost nothing.
    there = upload(
        device, batch_sizes, offsets, gather, found.owner, found.enters(), found.leaves()
    )
    sequences = found.owner.shape[0]
    layout = PackedLayout(
        rows, sequences, batch_sizes, there[2], there[3], there[4], there[5], sizes=tuple(sizes)
    )
    if there[0] is not None and there[1] is not None:
        layout.keep_steps(device, Steps(there[0], there[1]))
    return layout


def _bounded(found: _Sorted) -> PackedLayout:
    """The layout of a batch whose lengths nobody may look at."""
    form, length, sequences = found.form, found.length, found.owner.shape[0]
    device, steps, rows = length.device, form.steps, form.steps * form.batch
    # Sequences longer than t, from the histogram of the lengths.
    ending = torch.zeros(steps + 1, dtype=torch.int64, device=device)
    ending = ending.scatter_add(0, length, torch.ones_like(length))
    batch_sizes = sequences - ending.cumsum(0)[:-1]
    stops = batch_sizes.cumsum(0)
    row = torch.arange(rows, device=device)
    step = torch.searchsorted(stops, row, right=True)
    unused = step == steps
    step = step.clamp(max=steps - 1)
    sequence = row - (stops - batch_sizes).index_select(0, step)
    sequence = torch.where(unused, 0, sequence)
    gather = torch.where(unused, form.entries, found.flat_index(step, sequence, unused))
    return PackedLayout(
        rows,
        sequences,
        batch_sizes,
        gather,
        found.owner,
        found.enters(),
        found.leaves(),
        exact=False,
    )


def _in_rectangles(
    found: _Sorted, lengths: list[int], sizes: list[int], rectangles: tuple[Rectangle, ...]
) -> RectangleLayout:
    """The exact layout, cut; everything is on the CPU."""
    first_rows = _first_rows(rectangles)
    widths = [width for first, last, width in rectangles for _ in range(first, last)]
    first_rows.append(sum(widths))  # the spare row: of a step that no sequence has
    widths.append(1)
    rows, entries = first_rows[-1] + 1, found.form.entries
    device = torch.device("cpu")  # whatever the default device
    first_row, width = torch.tensor([first_rows, widths], device=device).unbind()
    step = torch.arange(len(widths), device=device).repeat_interleave(width, output_size=rows)
    row = torch.arange(rows, device=device)
    sequence = row - first_row.index_select(0, step)
    empty = step >= found.length.index_select(0, sequence)
    place = found.flat_index(step, sequence, empty)
    spread = torch.full((entries + 1,), rows - 1, device=device)
    spread.scatter_(0, place.masked_fill(empty, entries), row)
    last = [first_rows[length - 1] + index for index, length in enumerate(lengths) if length]
    return RectangleLayout(
        rows=rows,
        sequences=found.owner.shape[0],
        sizes=tuple(sizes),
        rectangles=rectangles,
        gather=place,
        spread=spread[:entries],
        empty=empty,
        last=torch.tensor(last, device=device),
        step=step,
        sequence=sequence,
        lengths=found.length,
        owner=found.owner,
        enters=found.enters(),
        leaves=found.leaves(),
    )


def staircase(lengths: Sequence[int]) -> list[int]:
    """Of lengths sorted from long to short, how many are longer than 0, 1, 2, ...

    Of those numbers it gives the lengths again, without the zeros.
    """
    sizes: list[int] = []
    alive, steps = len(lengths), 0
    for length in reversed(lengths):
        if length > steps:
            sizes += [alive] * (length - steps)
            steps = length
        alive -= 1
    return sizes


def without_unused(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sequences active at each step, without the steps that none reaches."""
    last = len(sizes)
    while last and sizes[last - 1] == 0 and sizes[0] > 0:
        last -= 1
    return tuple(sizes[:last])


def _cut(reset: Tensor, places: Tensor | None, valid_lengths: Tensor, exact: bool) -> _Segments:
    """Cut each sequence of valid steps before every reset; ``reset`` is ``[B, T]``.

    A sequence without a valid step keeps one segment of length zero, so that its state passes
    through.
    """
    batch, steps = reset.shape
    resets_so_far = reset.cumsum(1)
    if places is not None:
        resets_so_far = resets_so_far.gather(1, places)
    valid = torch.arange(steps, device=reset.device) < valid_lengths.unsqueeze(1)
    differs = resets_so_far[:, 1:] != resets_so_far[:, :-1]
    starts = torch.cat([torch.ones_like(valid[:, :1]), differs & valid[:, 1:]], 1).flatten()

    if exact:
        position = starts.nonzero().squeeze(1)
        real = torch.ones_like(position, dtype=torch.bool)
    else:  # as many slots as there are steps; those past the real segments have length zero
        position = torch.argsort(~starts, stable=True)
        real = torch.arange(batch * steps, device=reset.device) < starts.sum()
    owner, begin = position // steps, position % steps
    length = torch.zeros_like(position).scatter_add(
        0, starts.cumsum(0) - 1, valid.flatten().to(torch.int64)
    )
    keeps_initial = resets_so_far[:, 0] == 0
    return _Segments(
        owner,
        begin,
        length,
        first=(begin == 0) & real,
        last=(begin + length == valid_lengths.index_select(0, owner)) & real,
        keeps_initial=(keeps_initial | (valid_lengths == 0)).index_select(0, owner),
    )


def _where_owned(flag: Tensor, owner: Tensor, batch: int) -> Tensor:
    """``[B]``: the one sequence of each batch element at which ``flag`` is set."""
    target = torch.where(flag, owner, batch)
    sequence = torch.arange(owner.shape[0], device=owner.device)
    return torch.zeros(batch + 1, dtype=torch.int64, device=owner.device).scatter(
        0, target, sequence
    )[:batch]
