"""How gradients are cut: every element once, in equal shares, at full lines of the cache."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn_kernels.gradient_table import (
    KINDS,
    LINE_BYTES,
    MAX_ELEMENTS,
    SEGMENT_BYTES,
    Extent,
    Segment,
    Table,
    Tables,
    is_dense,
    partition,
    share_out,
)

INT32 = 2**31


@st.composite
def lists_of_extents(draw: st.DrawFn) -> list[Extent]:
    """One behind another, at any multiple of their element's size; some empty, some of billions."""
    extents, address = [], 2**40
    sizes = st.one_of(st.integers(0, 40), st.integers(0, 10**6), st.integers(INT32, 2**36))
    for elements, itemsize, gap in draw(
        st.lists(st.tuples(sizes, st.sampled_from([2, 4]), st.integers(0, 300)), max_size=20)
    ):
        address += gap // itemsize * itemsize + address % itemsize
        extents.append(Extent(address, elements, itemsize))
        address = extents[-1].end
    return extents


@given(extents=lists_of_extents(), programs=st.integers(1, 700))
def test_every_element_is_in_one_segment(extents: list[Extent], programs: int) -> None:
    segments, _ = share_out(extents, programs, MAX_ELEMENTS)
    by_gradient = {
        gradient: list(group)
        for gradient, group in itertools.groupby(segments, lambda segment: segment.gradient)
    }
    assert list(by_gradient) == [i for i, extent in enumerate(extents) if extent.elements]
    for gradient, parts in by_gradient.items():
        address = extents[gradient].address
        for part in parts:
            assert part.address == address
            assert 0 < part.elements <= MAX_ELEMENTS < INT32
            address += part.elements * extents[gradient].itemsize
        assert address == extents[gradient].end


@given(extents=lists_of_extents(), programs=st.integers(1, 700))
def test_shares_are_equal(extents: list[Extent], programs: int) -> None:
    longest = max((extent.elements for extent in extents), default=0) + 1
    segments, shares = share_out(extents, programs, longest)
    assert len(shares) == programs + 1
    assert shares[0] == 0
    assert shares[-1] == len(segments)
    assert shares == sorted(shares)
    assert len(segments) <= len(extents) + programs - 1
    sizes = [segment.elements * extents[segment.gradient].itemsize for segment in segments]
    total = sum(sizes) + SEGMENT_BYTES * sum(1 for extent in extents if extent.elements)
    for first, last in itertools.pairwise(shares):
        # What is cut off at a line goes to the next; a part of a gradient costs its row again.
        assert sum(sizes[first:last]) <= total / programs + LINE_BYTES


@given(extents=lists_of_extents(), programs=st.integers(1, 700))
def test_cuts_are_at_full_lines(extents: list[Extent], programs: int) -> None:
    segments, _ = share_out(extents, programs, MAX_ELEMENTS)
    for before, segment in itertools.pairwise(segments):
        if before.gradient == segment.gradient:
            assert segment.address % LINE_BYTES == before.address % LINE_BYTES or (
                segment.address % LINE_BYTES == 0
            )


def test_a_small_example() -> None:
    extents = [Extent(1024, 4096, 4), Extent(20_000, 0, 4), Extent(30_002, 1, 2)]
    # Costs 8192 + 16384 and 8192 + 2: shares end at 10923 and 21846, that is 2731 and 13654 bytes
    # into the first gradient, rounded down to lines.
    segments, shares = share_out(extents, 3, MAX_ELEMENTS)
    assert segments == [
        Segment(0, 1024, 672),
        Segment(0, 1024 + 2688, 2720),
        Segment(0, 1024 + 13_568, 704),
        Segment(2, 30_002, 1),
    ]
    assert shares == [0, 1, 2, 4]


def test_a_table_is_what_the_kernel_reads() -> None:
    grads = [torch.ones(50), torch.ones(0), torch.ones(20, dtype=torch.bfloat16)]
    grads.append(torch.ones(3, dtype=torch.float16))
    table = Table.build(grads, programs=2)
    addresses = [grads[i].data_ptr() for i in (0, 2, 3)]
    sizes = [50 * 4 + 0, 20 * 4 + 1, 3 * 4 + 2]
    firsts = [0 * 4 + 0, 1 * 4 + 0, 1 * 4 + 1, 2 * 4 + 2, 3 * 4]
    assert (table.segments, table.gradients, table.programs) == (3, 4, 2)
    assert table.memory.tolist() == [*addresses, *sizes, *firsts, 0, 1, 3]


def test_programs_are_as_many_as_there_is_work_for() -> None:
    assert Table.build([torch.ones(5)]).programs == 1
    assert Table.build([torch.ones(0)]).programs == 1
    assert Table.build([torch.empty(10**6)]).programs == 123  # 4 MB in shares of 32 KB
    assert Table.build([torch.empty(10**7)]).programs == 4 * 132


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(()), True),
        (torch.ones(3, 4), True),
        (torch.ones(3, 4).t(), True),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.ones(3, 1, 4)[:, :, :].transpose(0, 1), True),
        (torch.ones(3, 4)[:, :1], False),
        (torch.ones(3, 4)[:1, :1], True),
        (torch.ones(3, 4)[:, :2], False),
        (torch.ones(3, 4)[1:], True),
        (torch.ones(8)[::2], False),
        (torch.ones(1).expand(3), False),
        (torch.ones(8).as_strided((2, 2), (1, 1)), False),
    ],
)
def test_is_dense(tensor: torch.Tensor, expected: bool) -> None:
    assert is_dense(tensor) is expected


def test_partition() -> None:
    memory = torch.ones(100)
    grads = [
        torch.ones(3),
        memory[50:],
        memory[::2],
        torch.ones(2, dtype=torch.complex64),
        memory[:60],
        torch.ones(0),
        torch.ones(0, dtype=torch.float64),
        torch.frombuffer(bytearray(41), dtype=torch.float32, count=10, offset=1),
    ]
    # memory[:60] begins first, so memory[50:] is the one that is left to torch.
    assert partition(grads) == ([0, 4, 5], [1, 2, 3, 6, 7])


def test_kinds_fit_two_bits() -> None:
    assert sorted(KINDS.values()) == list(range(len(KINDS)))
    assert max(KINDS.values()) < 4


class Streams:
    """What `Table.make_visible` does to streams."""

    def __init__(self) -> None:
        self.current = mock.Mock(cuda_stream=1)

    def use(self, cuda_stream: int, table: Table) -> mock.Mock:
        self.current = mock.Mock(cuda_stream=cuda_stream)
        with mock.patch("torch.cuda.current_stream", lambda device: self.current):
            table.make_visible()
        return self.current


def test_another_stream_waits_for_the_upload_once() -> None:
    memory, uploaded = mock.Mock(), mock.Mock()
    table = Table(memory, 1, 1, 1, [0], [], uploaded, {1})
    streams = Streams()
    assert not streams.use(1, table).wait_event.called
    streams.use(2, table).wait_event.assert_called_once_with(uploaded)
    memory.record_stream.assert_called_once_with(streams.current)
    assert not streams.use(2, table).wait_event.called
    assert not streams.use(1, table).wait_event.called


def test_the_least_recently_used_table_goes() -> None:
    tables = Tables(most=2)
    a, b, c = ([torch.ones(n)] for n in (1, 2, 3))
    kept = tables.add(a)
    tables.add(b)
    assert tables.find(a) is kept
    tables.add(c)
    assert tables.find(a) is kept
    assert tables.find(b) is None


def test_a_captured_table_stays() -> None:
    tables = Tables(most=1)
    a, b = [torch.ones(1)], [torch.ones(2)]
    table = tables.add(a)
    tables.keep(a, None, table)
    tables.add(b)
    assert tables.find(a) is table
