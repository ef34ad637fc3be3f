"""Which program works on which part of which gradient: the table that the norm's kernel reads.

Gradients are laid one after another, cut into as many equal shares as there are programs, and a
share is a list of segments, each a part of one gradient. The table depends on addresses, sizes and
dtypes only. It is kept on the device until one of them changes, and holds addresses, so it keeps no
gradient alive.

Limits: this needs torch but not Triton; gradients of one device.
"""

from __future__ import annotations

import operator
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .tiling import Chip, ceil_div

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Programs per multiprocessor: see gradient_norm.py, where registers are limited for it.
PROGRAMS_PER_MULTIPROCESSOR = 4
# What a segment costs besides its bytes (its row of the table, a reduction), in bytes that could be
# read meanwhile; and the least share worth a program of its own. Guesses, not measured.
SEGMENT_BYTES = 8_192
SHARE_BYTES = 32_768
# Shares begin at full lines of the cache; offsets inside a segment are int32.
LINE_BYTES = 128
MAX_ELEMENTS = 2**30
# Tables kept; a training loop needs one, or a few where the allocator alternates.
MAX_TABLES = 32

_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")


class Extent(NamedTuple):
    """The memory of a gradient: where it begins, how many elements of what size it has."""

    address: int
    elements: int
    itemsize: int

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.elements * self.itemsize


class Segment(NamedTuple):
    """A part of gradient `gradient`."""

    gradient: int
    address: int
    elements: int


def share_out(
    extents: Sequence[Extent], programs: int, max_elements: int
) -> tuple[list[Segment], list[int]]:
    """Cuts gradients into shares of equal cost, at full lines of the cache.

    Args:
        extents: memory of each gradient.
        programs: how many shares.
        max_elements: the longest segment.

    Returns:
        All segments, in the order of the gradients and of their memory; and where the segments of
        each share begin [programs + 1].
    """
    total = _cost(extents)
    segments: list[Segment] = []
    shares = [0]

    def append(gradient: int, start: int, end: int, itemsize: int) -> None:
        step = max_elements * itemsize
        while end - start > step:
            segments.append(Segment(gradient, start, max_elements))
            start += step
        segments.append(Segment(gradient, start, (end - start) // itemsize))

    cost = 0
    for gradient, (start, elements, itemsize) in enumerate(extents):
        if not elements:
            continue
        end = start + elements * itemsize
        to_address = start - cost - SEGMENT_BYTES
        cost += SEGMENT_BYTES + end - start
        while len(shares) < programs and (border := len(shares) * total // programs) < cost:
            at = (border + to_address) // LINE_BYTES * LINE_BYTES
            if at > start:
                append(gradient, start, at, itemsize)
                start = at
            shares.append(len(segments))
        append(gradient, start, end, itemsize)
    shares += [len(segments)] * (programs + 1 - len(shares))
    return segments, shares


def _cost(extents: Sequence[Extent]) -> int:
    return sum(SEGMENT_BYTES + e.elements * e.itemsize for e in extents if e.elements)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def partition(grads: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Indices of the gradients for the kernel, and of those that must be left to torch.

    The second are of another dtype, have gaps or overlaps, or share memory with one of the first: a
    gradient that comes twice is scaled twice, and not by two programs at once.
    """
    own: list[int] = []
    others: list[int] = []
    addresses = [grad.data_ptr() for grad in grads]
    end = 0
    for index in sorted(range(len(grads)), key=addresses.__getitem__):
        grad, address = grads[index], addresses[index]
        dtype = grad.dtype
        if dtype not in KINDS or address % dtype.itemsize or not is_dense(grad):
            others.append(index)
        elif (elements := grad.numel()) == 0:
            own.append(index)
        elif address < end:
            others.append(index)
        else:
            own.append(index)
            end = address + elements * dtype.itemsize
    return sorted(own), sorted(others)


@dataclass
class Table:
    """Segments, gradients and shares of one list of gradients.

    Attributes:
        memory: on the device, int64, one after another:
            addresses of the segments [segments],
            their elements * 4 + kind [segments],
            first segment of each gradient * 4 + its kind, and the number of segments * 4
            [gradients + 1],
            first segment of each share [programs + 1].
        segments: how many.
        gradients: how many the kernel works on.
        programs: how many shares.
        own: which gradients of the list these are.
        others: which it must leave to torch.
        uploaded: recorded once `memory` is filled; None on the CPU.
        streams: those on which `memory` is known to be filled.
    """

    memory: Tensor
    segments: int
    gradients: int
    programs: int
    own: list[int]
    others: list[int]
    uploaded: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set)

    @staticmethod
    def build(grads: Sequence[Tensor], programs: int | None = None) -> Table:
        """Makes the table and uploads it from pinned memory, on the current stream."""
        device = grads[0].device
        own, others = partition(grads)
        kept = [grads[i] for i in own]
        extents = [Extent(g.data_ptr(), g.numel(), g.dtype.itemsize) for g in kept]
        if programs is None:
            most = Chip.of(device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
            programs = max(1, min(most, ceil_div(_cost(extents), SHARE_BYTES)))
        segments, shares = share_out(extents, programs, MAX_ELEMENTS)
        kinds = [KINDS[grad.dtype] for grad in kept]
        firsts = [0] * (len(own) + 1)
        for segment in segments:
            firsts[segment.gradient + 1] += 1
        for gradient in range(len(own)):
            firsts[gradient + 1] += firsts[gradient]
        rows = [segment.address for segment in segments]
        rows += [segment.elements * 4 + kinds[segment.gradient] for segment in segments]
        rows += [first * 4 + kind for first, kind in zip(firsts, [*kinds, 0], strict=True)]
        rows += shares
        sizes = len(segments), len(own), programs
        memory = torch.frombuffer(array("q", rows), dtype=torch.int64)
        if device.type != "cuda":
            return Table(memory, *sizes, own, others)
        stream = torch.cuda.current_stream(device)
        memory = memory.pin_memory().to(device, non_blocking=True)
        uploaded = torch.cuda.Event()
        uploaded.record(stream)
        return Table(memory, *sizes, own, others, uploaded, {stream.cuda_stream})

    def make_visible(self) -> None:
        """Lets the current stream wait for the upload, if it was another that made it."""
        if self.uploaded is None:
            return
        stream = torch.cuda.current_stream(self.memory.device)
        if stream.cuda_stream not in self.streams:
            stream.wait_event(self.uploaded)
            self.memory.record_stream(stream)
            self.streams.add(stream.cuda_stream)


class Tables:
    """The tables used last. One that a CUDA graph was captured with is kept for good.

    A graph reads its table at every replay, and nobody says when it will be replayed last.
    """

    def __init__(self, most: int = MAX_TABLES) -> None:
        self.most = most
        self.tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
        self.captured: dict[tuple[object, ...], Table] = {}
        self.lock = threading.Lock()

    def find(self, grads: Sequence[Tensor], programs: int | None = None) -> Table | None:
        """The table of these gradients, if it is there. It may not be filled for this stream."""
        key = _key(grads, programs)
        with self.lock:
            table = self.tables.get(key)
            if table is None:
                return self.captured.get(key)
            self.tables.move_to_end(key)
            return table

    def add(self, grads: Sequence[Tensor], programs: int | None = None) -> Table:
        """Builds the table of these gradients."""
        table = Table.build(grads, programs)
        with self.lock:
            self.tables[_key(grads, programs)] = table
            while len(self.tables) > self.most:
                self.tables.popitem(last=False)
        return table

    def keep(self, grads: Sequence[Tensor], programs: int | None, table: Table) -> None:
        """Keeps a table for good."""
        with self.lock:
            self.captured[_key(grads, programs)] = table


def _key(grads: Sequence[Tensor], programs: int | None) -> tuple[object, ...]:
    """All that a table depends on."""
    layouts = None
    if not all(map(Tensor.is_contiguous, grads)):
        layouts = (*map(_shape, grads), *map(Tensor.stride, grads))
    return (
        programs,
        grads[0].device,
        tuple(map(Tensor.data_ptr, grads)),
        tuple(map(Tensor.numel, grads)),
        tuple(map(_dtype, grads)),
        layouts,
    )
