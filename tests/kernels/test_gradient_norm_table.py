"""How gradients are cut: every element once, in equal shares, at full lines of the cache."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn_kernels.gradient_table import (
    KINDS,
    LINE_BYTES,
    MAX_ELEMENTS,
    SEGMENT_BYTES,
    Plan,
    Plans,
    Segment,
    is_dense,
    partition,
    share_out,
)
from fastrnn_kernels.tiling import CHIPS, Chip

INT32 = 2**31


@st.composite
def lists_of_sizes(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Elements, some none and some billions, and bytes of an element."""
    elements = st.one_of(st.integers(0, 40), st.integers(0, 10**6), st.integers(INT32, 2**36))
    return draw(st.lists(st.tuples(elements, st.sampled_from([2, 4])), max_size=20))


@given(sizes=lists_of_sizes(), programs=st.integers(1, 700))
def test_every_element_is_in_one_segment(sizes: list[tuple[int, int]], programs: int) -> None:
    segments, _ = share_out(sizes, programs, MAX_ELEMENTS)
    by_gradient = {
        gradient: list(group)
        for gradient, group in itertools.groupby(segments, lambda segment: segment.gradient)
    }
    assert list(by_gradient) == [i for i, (elements, _) in enumerate(sizes) if elements]
    for gradient, parts in by_gradient.items():
        elements, itemsize = sizes[gradient]
        offset = 0
        for part in parts:
            assert part.offset == offset
            assert 0 < part.elements <= MAX_ELEMENTS < INT32
            offset += part.elements * itemsize
        assert offset == elements * itemsize


@given(sizes=lists_of_sizes(), programs=st.integers(1, 700))
def test_shares_are_equal(sizes: list[tuple[int, int]], programs: int) -> None:
    longest = max((elements for elements, _ in sizes), default=0) + 1
    segments, shares = share_out(sizes, programs, longest)
    assert len(shares) == programs + 1
    assert shares[0] == 0
    assert shares[-1] == len(segments)
    assert shares == sorted(shares)
    assert len(segments) <= len(sizes) + programs - 1
    in_bytes = [segment.elements * sizes[segment.gradient][1] for segment in segments]
    total = sum(in_bytes) + SEGMENT_BYTES * sum(1 for elements, _ in sizes if elements)
    for first, last in itertools.pairwise(shares):
        # What is cut off at a line goes to the next; a part of a gradient costs its row again.
        assert sum(in_bytes[first:last]) <= total / programs + LINE_BYTES


@given(sizes=lists_of_sizes(), programs=st.integers(1, 700))
def test_cuts_are_at_full_lines(sizes: list[tuple[int, int]], programs: int) -> None:
    segments, _ = share_out(sizes, programs, MAX_ELEMENTS)
    assert all(segment.offset % LINE_BYTES == 0 for segment in segments)


def test_a_small_example() -> None:
    # Costs 8192 + 16384 and 8192 + 2: shares end at 10923 and 21846, that is 2731 and 13654 bytes
    # into the first gradient, rounded down to lines.
    segments, shares = share_out([(4096, 4), (0, 4), (1, 2)], 3, MAX_ELEMENTS)
    assert segments == [
        Segment(0, 0, 672),
        Segment(0, 2688, 2720),
        Segment(0, 13_568, 704),
        Segment(2, 0, 1),
    ]
    assert shares == [0, 1, 2, 4]


def test_a_plan_does_not_outlive_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, grads = Plans(), [torch.ones(2**20)]
    chip = CHIPS["sm_90"]
    for multiprocessors in (8, 3, 8):
        limited = dataclasses.replace(chip, multiprocessors=multiprocessors)
        monkeypatch.setattr(Chip, "of", staticmethod(lambda device, limited=limited: limited))
        assert plans.locate(grads)[0].programs == 2 * multiprocessors
    assert len(plans.plans) == 2


def test_a_table_is_what_the_kernel_reads() -> None:
    grads = [torch.ones(50), torch.ones(0), torch.ones(20, dtype=torch.bfloat16)]
    grads.append(torch.ones(3, dtype=torch.float16))
    plan, table = Plans().locate(grads, programs=2)
    sizes = [50 * 4 + 0, (2 << 32) + 20 * 4 + 1, (3 << 32) + 3 * 4 + 2]
    firsts = [0 * 4 + 0, 1 * 4 + 0, 1 * 4 + 1, 2 * 4 + 2, 3 * 4]
    assert (plan.segments, plan.gradients, plan.programs) == (3, 4, 2)
    assert table.tolist() == [
        0,
        *(grad.data_ptr() for grad in grads),
        *(0, 0, 0),
        *sizes,
        *firsts,
        *(0, 1, 3),
    ]
    assert plan.upload(table, torch.device("cpu")) is table


def programs_for(*sizes: int) -> int:
    return Plans().locate([torch.empty(size) for size in sizes])[0].programs


def test_programs_are_as_many_as_there_is_work_for() -> None:
    assert programs_for(5) == 1
    assert programs_for(0) == 1
    assert programs_for(10**6) == 123  # 4 MB in shares of 32 KB
    assert programs_for(10**7) == 2 * 132


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


def test_the_least_recently_used_plan_goes() -> None:
    plans = Plans(most=2)
    a, b, c = ([torch.ones(n)] for n in (1, 2, 3))
    kept, _ = plans.locate(a)
    plans.locate(b)
    assert plans.find(a) is kept
    plans.locate(c)
    assert plans.find(a) is kept
    assert plans.find(b) is None


def plan_of(*grads: torch.Tensor) -> Plan:
    return Plan.build(grads, [*range(len(grads))], [], 1)


@given(data=st.data())
def test_fits_is_whether_no_two_share_memory(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    begins = data.draw(st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)))
    plan = plan_of(*(torch.empty(size) for size in sizes))
    places = [set(range(begin, begin + size)) for begin, size in zip(begins, sizes, strict=True)]
    apart = len(set().union(*places)) == sum(sizes)
    assert plan.fits(4 * torch.tensor(begins)) == apart


def test_fits_is_also_whether_addresses_are_multiples_of_the_size() -> None:
    plan = plan_of(torch.empty(3), torch.empty(3, dtype=torch.bfloat16), torch.empty(0))
    assert plan.fits(torch.tensor([400, 202, 1]))
    assert not plan.fits(torch.tensor([402, 202, 1]))
    assert not plan.fits(torch.tensor([400, 201, 1]))
