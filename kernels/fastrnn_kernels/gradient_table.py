"""Which program works on which part of which gradient: the table that the norm's kernel reads.

Gradients are laid one after another, cut into as many equal shares as there are programs, and a
share is a list of segments, each a part of one gradient. How they are cut depends on sizes and
dtypes only, which a training loop does not change: it is worked out once, a `Plan`, and kept on the
host. Where the gradients lie changes at nearly every step. Each launch gets their addresses, the
plan, and the barrier's counter, zero, by one copy from pinned memory; nothing lies on the
device between launches that somebody could lose, and no gradient is kept alive.

Limits: this needs torch but not Triton; gradients of one device.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .tiling import Chip, ceil_div

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Programs per multiprocessor: see gradient_norm.py, where registers are limited for twice as many.
# A grid that needs every register of the chip is refused as soon as anything else is resident.
PROGRAMS_PER_MULTIPROCESSOR = 2
# What a segment costs besides its bytes (its row of the table, a reduction), in bytes that could be
# read meanwhile; and the least share worth a program of its own. Guesses, not measured.
SEGMENT_BYTES = 8_192
SHARE_BYTES = 32_768
# Cuts are at full lines of the cache; offsets inside a segment are int32.
LINE_BYTES = 128
COUNTER = 1  # word of a table
MAX_ELEMENTS = 2**30
# Plans kept; a training loop needs one for each list of parameters that it clips.
MAX_PLANS = 32

_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")


class Segment(NamedTuple):
    """A part of gradient `gradient`: `elements` of them, from byte `offset` on."""

    gradient: int
    offset: int
    elements: int


def share_out(
    sizes: Sequence[tuple[int, int]], programs: int, max_elements: int
) -> tuple[list[Segment], list[int]]:
    """Cuts gradients into shares of equal cost, a whole number of cache lines from their beginning.

    Args:
        sizes: elements of each gradient, and bytes of an element.
        programs: how many shares.
        max_elements: the longest segment.

    Returns:
        All segments, in the order of the gradients and of their memory; and where the segments of
        each share begin [programs + 1].
    """
    total = _cost(sizes)
    segments: list[Segment] = []
    shares = [0]

    def append(gradient: int, start: int, end: int, itemsize: int) -> None:
        step = max_elements * itemsize
        while end - start > step:
            segments.append(Segment(gradient, start, max_elements))
            start += step
        segments.append(Segment(gradient, start, (end - start) // itemsize))

    cost = 0
    for gradient, (elements, itemsize) in enumerate(sizes):
        if not elements:
            continue
        start, end = 0, elements * itemsize
        before = cost + SEGMENT_BYTES
        cost = before + end
        while len(shares) < programs and (border := len(shares) * total // programs) < cost:
            at = (border - before) // LINE_BYTES * LINE_BYTES
            if at > start:
                append(gradient, start, at, itemsize)
                start = at
            shares.append(len(segments))
        append(gradient, start, end, itemsize)
    shares += [len(segments)] * (programs + 1 - len(shares))
    return segments, shares


def _cost(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(SEGMENT_BYTES + elements * itemsize for elements, itemsize in sizes if elements)


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
class Plan:
    """How gradients of certain sizes and dtypes are shared out, and which of them.

    Attributes:
        template: int64 on the host, a table without addresses, one after another:
            the barrier's counter, an int32, and another that nobody uses [1], zero,
            address of each gradient [gradients], still zero,
            first byte of each segment in its gradient [segments],
            gradient of each segment * 2**32 + its elements * 4 + kind [segments],
            first segment of each gradient * 4 + its kind, and the number of segments * 4
            [gradients + 1],
            first segment of each share [programs + 1].
        segments: how many.
        gradients: how many the kernel works on.
        programs: how many shares.
        own: which gradients of the list these are.
        others: which are left to torch.
        dtypes: of all gradients of the list.
        bytes: of each gradient that has elements, in the order of `own` [n] int64.
        filled: which of `own` these are [n] int64; None: all.
        misaligned: bits of an address that an element's size forbids [n] int64.
        spare: pinned memory for a table that a CUDA graph reads; None where there is no GPU.
        fitting: the addresses that were last seen to fit.
    """

    template: Tensor
    segments: int
    gradients: int
    programs: int
    own: list[int]
    others: list[int]
    dtypes: frozenset[torch.dtype]
    bytes: Tensor
    filled: Tensor | None
    misaligned: Tensor
    spare: Tensor | None = None
    fitting: Tensor | None = None

    @staticmethod
    def build(
        grads: Sequence[Tensor], own: list[int], others: list[int], programs: int | None = None
    ) -> Plan:
        """Works out the shares of gradients `own` of the list."""
        device = grads[0].device
        kept = [grads[i] for i in own]
        sizes = [(g.numel(), g.dtype.itemsize) for g in kept]
        if programs is None:
            most = Chip.of(device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
            programs = max(1, min(most, ceil_div(_cost(sizes), SHARE_BYTES)))
        segments, shares = share_out(sizes, programs, MAX_ELEMENTS)
        kinds = [KINDS[grad.dtype] for grad in kept]
        firsts = [0] * (len(own) + 1)
        for segment in segments:
            firsts[segment.gradient + 1] += 1
        for gradient in range(len(own)):
            firsts[gradient + 1] += firsts[gradient]
        rows = [segment.offset for segment in segments]
        rows += [s.gradient * 2**32 + s.elements * 4 + kinds[s.gradient] for s in segments]
        rows += [first * 4 + kind for first, kind in zip(firsts, [*kinds, 0], strict=True)]
        rows += shares
        filled = [index for index, (elements, _) in enumerate(sizes) if elements]
        template = _words([0] * (COUNTER + len(own)) + rows)
        return Plan(
            template,
            len(segments),
            len(own),
            programs,
            own,
            others,
            frozenset(map(_dtype, grads)),
            _words([sizes[i][0] * sizes[i][1] for i in filled]),
            _words(filled) if len(filled) < len(own) else None,
            _words([sizes[i][1] - 1 for i in filled]),
            template.pin_memory() if device.type == "cuda" else None,
        )

    def table(self, grads: Sequence[Tensor]) -> Tensor:
        """Returns the table of gradients, `own` of the list, on the host."""
        own = [grads[i] for i in self.own] if self.others else grads
        addresses = array("q", map(Tensor.data_ptr, own))
        table = self.template.clone()
        begin, length = addresses.buffer_info()
        ctypes.memmove(table.data_ptr() + COUNTER * table.itemsize, begin, length * table.itemsize)
        return table

    def addresses(self, table: Tensor) -> Tensor:
        """Those in a table."""
        return table[COUNTER : COUNTER + self.gradients]

    def fits(self, addresses: Tensor) -> bool:
        """Whether gradients at these addresses `[own]` share no memory, and are aligned."""
        if self.fitting is not None and torch.equal(addresses, self.fitting):
            return True
        begins = addresses if self.filled is None else addresses[self.filled]
        ordered, order = begins.sort()
        overlaps = (ordered + self.bytes[order])[:-1] > ordered[1:]
        if overlaps.any() or (begins & self.misaligned).any():
            return False
        self.fitting = addresses
        return True

    def upload(self, table: Tensor, device: torch.device, capturing: bool = False) -> Tensor:
        """Returns a table on the device; nobody waits for the copy.

        Raises:
            RuntimeError: a CUDA graph is being captured, which needs memory of its own.
        """
        if device.type != "cuda":
            return table
        if not capturing:
            if self.spare is None:
                self.spare = self.template.pin_memory()
            return table.pin_memory().to(device, non_blocking=True)
        if self.spare is None:
            raise RuntimeError(COLD)
        pinned, self.spare = self.spare.copy_(table), None
        _captured.append(pinned)
        return pinned.to(device, non_blocking=True)


COLD = (
    "a CUDA graph is being captured and gradients of these sizes have not been clipped since the "
    "start, or the last capture: there is no pinned memory for their table. Clip them once before"
)
# Read at every replay of a graph, and nobody says which will be the last.
_captured: list[Tensor] = []


def _words(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Plans:
    """The plans used last, found by sizes, dtypes and layouts."""

    def __init__(self, most: int = MAX_PLANS) -> None:
        self.most = most
        self.plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        # To compare long keys costs half of what their hashes do.
        self.latest: tuple[tuple[object, ...], Plan] | None = None
        self.lock = threading.Lock()

    def find(self, grads: Sequence[Tensor], programs: int | None = None) -> Plan | None:
        """The plan of gradients like these, if it is there."""
        return self._get(_key(grads, programs))

    def locate(
        self,
        grads: Sequence[Tensor],
        programs: int | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> tuple[Plan, Tensor]:
        """The plan of these gradients, and their table on the host.

        A plan that is new is made after `check()`, which may raise.
        """
        key = _key(grads, programs)
        plan = self._get(key)
        if plan is None:
            check()
            plan = self._add(key, Plan.build(grads, *partition(grads), programs))
        table = plan.table(grads)
        if not plan.fits(plan.addresses(table)):  # some share memory, which they did not
            own, others = partition(grads)
            key = (*key, tuple(own))
            plan = self._get(key) or self._add(key, Plan.build(grads, own, others, programs))
            table = plan.table(grads)
        return plan, table

    def _get(self, key: tuple[object, ...]) -> Plan | None:
        latest = self.latest
        if latest is not None and latest[0] == key:
            return latest[1]
        with self.lock:
            plan = self.plans.get(key)
            if plan is not None:
                self.plans.move_to_end(key)
                self.latest = key, plan
            return plan

    def _add(self, key: tuple[object, ...], plan: Plan) -> Plan:
        with self.lock:
            self.plans[key] = plan
            self.latest = key, plan
            while len(self.plans) > self.most:
                self.plans.popitem(last=False)
        return plan


def _key(grads: Sequence[Tensor], programs: int | None) -> tuple[object, ...]:
    """All that a plan depends on, but for gradients that share memory."""
    layouts = None
    if not all(map(Tensor.is_contiguous, grads)):
        layouts = (*map(_shape, grads), *map(Tensor.stride, grads))
    device = grads[0].device
    return (
        programs,
        device,
        Chip.of(device).multiprocessors,  # a limit may have come since
        tuple(map(Tensor.numel, grads)),
        tuple(map(_dtype, grads)),
        layouts,
    )
