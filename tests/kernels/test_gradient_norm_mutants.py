"""A test that could not fail is a defect: each of these mutants of the norm kernel must be caught.

A mutant is a copy of the package with one piece of text replaced. It is caught when `check`, on a
few lists of gradients under several schedules, finds a wrong result or a deadlock; an error of any
other kind is a mutant that was made wrongly.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from tests.interpreter import Deadlock, RandomOrder, RunAhead, Starve
from tests.kernels.gradient_problems import (
    BF16,
    F16,
    F32,
    INF,
    Memory,
    assert_equal,
    check_clip,
    exact_norm,
    mixed,
    random,
    run,
    scaled,
    several,
    watched,
    without_empty,
)
from tests.kernels.mutants import mutated

pytestmark = pytest.mark.interpreter

KERNEL, TABLE, BARRIER = "gradient_kernel.py", "gradient_table.py", "grid_barrier.py"


@dataclass(frozen=True)
class Mutant:
    """`old` stands `count` times in `file`, and becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    count: int = 1


WAIT = "wait(arrivals_ptr, programs, failed_ptr)"
SECOND_WAIT = WAIT.replace("programs", "2 * programs")
AGAIN_EARLY = WAIT.replace("programs", "2 * programs - 1")
PARTIAL = "        tl.store(partials_ptr + segment, partial)\n    count_arrival(arrivals_ptr)\n"
EDGES = "offsets < tl.where(in_head, head, elements)"
MUTANTS = [
    # the barrier
    Mutant("no barrier", KERNEL, WAIT, "pass"),
    Mutant("one arrival too few", KERNEL, WAIT, WAIT.replace("programs", "programs - 1")),
    Mutant("one arrival too many", KERNEL, WAIT, WAIT.replace("programs", "programs + 1")),
    Mutant("no second barrier", KERNEL, SECOND_WAIT, "pass"),
    Mutant(
        "second barrier one too few",
        KERNEL,
        SECOND_WAIT,
        AGAIN_EARLY,
    ),
    Mutant("second barrier is the first", KERNEL, SECOND_WAIT, WAIT),
    Mutant("arrivals are not counted", BARRIER, "arrivals_ptr, 1,", "arrivals_ptr, 0,"),
    Mutant(
        "the second counter of the barrier",
        KERNEL,
        "tl.pointer_type(tl.int32))",
        "tl.pointer_type(tl.int32)) + 2",
    ),
    Mutant("the counter is not zero", TABLE, "_words([0] *", "_words([1] *"),
    # partial results
    Mutant(
        "a partial stored after the arrival",
        KERNEL,
        PARTIAL,
        "        if segment + 1 < last:\n"
        "            tl.store(partials_ptr + segment, partial)\n"
        "    count_arrival(arrivals_ptr)\n"
        "    if first < last:\n"
        "        tl.store(partials_ptr + last - 1, partial)\n",
    ),
    Mutant(
        "partials read before the barrier",
        KERNEL,
        f"    {WAIT}\n",
        "    early = fold_partials(partials_ptr, 0, segments, NORM, COMBINE_BLOCK)\n"
        f"    {WAIT}\n"
        "    partials_ptr += 0 * early.to(tl.int32)\n"
        "    tl.store(partials_ptr + segments - 1, early)\n",
    ),
    Mutant(
        "a race on the partials",
        KERNEL,
        "tl.store(partials_ptr + segment, partial)",
        "tl.store(partials_ptr + program, partial)",
    ),
    Mutant(
        "a norm of the last gradient's segments only",
        KERNEL,
        "partials_ptr, (row // 4).to(tl.int32), (next_row",
        "partials_ptr, (next_row // 4 - 1).to(tl.int32), (next_row",
    ),
    Mutant(
        "a gradient's norm that nobody computes",
        KERNEL,
        "in range(program, gradients, programs)",
        "in range(program + 1, gradients, programs)",
    ),
    Mutant(
        "the last partial left out",
        KERNEL,
        "fold_partials(partials_ptr, 0, segments, NORM",
        "fold_partials(partials_ptr, 0, segments - 1, NORM",
    ),
    # elements
    Mutant("forgotten head", KERNEL, EDGES, "offsets < tl.where(in_head, 0, elements)"),
    Mutant("forgotten tail", KERNEL, EDGES, "offsets < tl.where(in_head, head, head + body)"),
    Mutant("tail too long", KERNEL, EDGES, "offsets < tl.where(in_head, head, elements + 1)"),
    Mutant("head counted twice", KERNEL, "head, (elements - head)", "head * 0, (elements - head)"),
    Mutant("misaligned blocks", KERNEL, "((-address) & 15)", "(address & 15)"),
    Mutant(
        "the body of the sum is a vector short",
        KERNEL,
        "        values = tl.load(body_ptr + offsets, mask=offsets < body, other=0.0).to",
        "        values = tl.load(body_ptr + offsets, mask=offsets < body - VECTOR, other=0.0).to",
    ),
    Mutant(
        "the body is stored a vector too far",
        KERNEL,
        "scale_block(body_ptr + offsets, offsets < body,",
        "scale_block(body_ptr + offsets, offsets < body + VECTOR,",
    ),
    Mutant(
        "float16 for bfloat16 in the sum",
        KERNEL,
        "tl.bfloat16, NORM, BLOCK_BYTES)",
        "tl.float16, NORM, BLOCK_BYTES)",
    ),
    Mutant(
        "float16 for bfloat16 in the rescaling",
        KERNEL,
        "tl.bfloat16,\n                    NONFINITE",
        "tl.float16,\n                    NONFINITE",
    ),
    # the rescaling
    Mutant("blind to a NaN coefficient", KERNEL, "not (coefficient >= 1.0)", "(coefficient < 1.0)"),
    Mutant(
        "NaN clamped to one",
        KERNEL,
        "tl.where(coefficient >= 1.0, 1.0, coefficient)",
        "tl.where(coefficient < 1.0, coefficient, 1.0)",
    ),
    Mutant("written whether clipped or not", KERNEL, "SCALE and wanted:", "SCALE:"),
    Mutant(
        "a segment scaled twice",
        KERNEL,
        "in range(last - first)",
        "in range(last - first + (first > 0).to(tl.int32))",
    ),
    Mutant(
        "the first segment not scaled",
        KERNEL,
        "in range(last - first)",
        "in range(1, last - first)",
    ),
    Mutant(
        "the first block not scaled",
        KERNEL,
        "for block in range(blocks)",
        "for block in range(1, blocks)",
    ),
    Mutant(
        "non-finite values kept",
        KERNEL,
        "wanted = mask & is_finite",
        "wanted = mask",
    ),
    # the norm
    Mutant(
        "blind to NaN in inf norms",
        KERNEL,
        "added = tl.abs(x).to(",
        "added = tl.where(x == x, tl.abs(x), 0.0).to(",
    ),
    Mutant("norms of float16 not rounded", KERNEL, "elif kind == 2:\n", "elif kind == 3:\n"),
    Mutant(
        "coefficient not rounded",
        KERNEL,
        "(reciprocal * max_norm).to(norm_dtype)",
        "(reciprocal * max_norm)",
    ),
    Mutant("no 1e-6", KERNEL, "(total + 1e-6).to(", "(total + 0.0).to("),
    Mutant(
        "torch's norms left out",
        KERNEL,
        "            total += of_others",
        "            total += 0.0",
    ),
    # what is recorded
    Mutant("the ring does not turn", KERNEL, "steps % capacity * 3", "0 * 3"),
    Mutant("the threshold is not recorded", KERNEL, "row_ptr + 1, max_norm", "row_ptr + 1, total"),
    Mutant("a row of two", KERNEL, "steps % capacity * 3", "steps % capacity * 2"),
    Mutant("steps are not counted", KERNEL, "counts_ptr, steps + 1", "counts_ptr, steps"),
    Mutant(
        "not finite ones are not counted",
        KERNEL,
        "(counts_ptr + 1) + nonfinite",
        "(counts_ptr + 1)",
    ),
    Mutant(
        "the row does not end", KERNEL, "(counts_ptr + 2) + 1) * nonfinite", "(counts_ptr + 2) + 1)"
    ),
    Mutant("everybody records", KERNEL, "    if program == 0:\n", "    if program >= 0:\n"),
    Mutant("the coefficient for its inverse", KERNEL, "tl.div_rn(1.0, coefficient)", "coefficient"),
    Mutant("nothing is spared", KERNEL, "wanted = wanted & is_finite", "wanted = wanted"),
    Mutant(
        "what is spared is recorded as scaled",
        KERNEL,
        'tl.where(is_finite, coefficient, float("nan"))',
        "coefficient",
    ),
    # the table
    Mutant("addresses without offsets", KERNEL, " + tl.load(offsets_ptr + segment)", ""),
    Mutant("segments overlap", TABLE, "                start = at\n", ""),
    Mutant(
        "memory that is shared later goes unnoticed",
        TABLE,
        "if not plan.fits(plan.addresses(table))",
        "if False",
    ),
    Mutant("dtypes are no part of the key", TABLE, "        tuple(map(_dtype, grads)),\n", ""),
    Mutant("layouts are no part of the key", TABLE, "        layouts,\n", ""),
    Mutant(
        "shared memory goes unnoticed",
        TABLE,
        "elif address < end:",
        "elif False:",
    ),
]


def check(module: ModuleType) -> None:
    """Raises if this module's kernel does something wrong, or nothing."""
    check_clip(mixed(), module=module)
    check_clip(several(F32), module=module, schedule=RunAhead(0))
    check_clip(several(BF16), 0.7, module=module, schedule=RunAhead(-1))
    check_clip(without_empty(mixed()), 1.0, INF, module=module)
    check_clip(Memory().add(torch.full((999,), 3e3, dtype=F16)).add(random(5)), module=module)
    check_clip(Memory().add(random(90)).add(torch.tensor([float("nan")])), module=module)
    check_clip(Memory().add(random(9)).add(torch.tensor([float("nan")])), 1.0, INF, module=module)
    check_clip(Memory().add(torch.ones(1)), module=module)
    check_options(module)
    check_ring(module)
    check_tables(module)
    for index in (0, -1):
        check_clip(several(F32), module=module, schedule=Starve(index))
        check_clip(mixed(), module=module, schedule=Starve(index))
    check_clip(mixed(), module=module, schedule=RandomOrder(1))


def check_options(module: ModuleType) -> None:
    memory = mixed()
    memory.grads[1][7] = INF
    run(memory.grads, module=module, zero_nonfinite=True)
    assert all(grad.eq(0).all() for grad in memory.grads)
    grads = mixed().grads
    with watched(grads) as accesses:
        run(grads, 1e4, module=module)
    assert not accesses.stores


def check_ring(module: ModuleType) -> None:
    ring = module.Ring(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    for step, value in enumerate((1.0, INF, float("nan"), 2.0)):
        grads = [random(40), torch.tensor([value]), random(30, dtype=F16)]
        before = [grad.clone() for grad in grads]
        result = run(grads, 1.0 + step, ring=ring, spare_nonfinite=True, module=module)
        assert_equal("inverse", result.inverse, result.coefficient.float().reciprocal())
        spared = step in (1, 2)
        recorded = torch.tensor(float("nan")) if spared else result.coefficient.float()
        row = torch.stack((result.total_norm.float(), torch.tensor(1.0 + step), recorded))
        assert_equal("row", ring.rows[step % 2], row)
        for grad, old in zip(grads, before, strict=True):
            assert_equal("gradient", grad, old if spared else scaled(old, result.coefficient))
        assert ring.counts.tolist() == [step + 1, min(step, 2), (0, 1, 2, 0)[step]]


def check_tables(module: ModuleType) -> None:
    def check_norm(*grads: torch.Tensor) -> None:
        result = run(grads, scale=False, module=module, norm_dtype=F32)
        exact = exact_norm(grads, 2.0)
        assert abs(float(result.total_norm) - exact) <= 1e-6 * exact

    check_norm(random(40, 2)[:, 0], random(70))
    words = random(64, dtype=F16)
    check_norm(words)
    check_norm(words.view(BF16))
    square = random(6, 6)
    check_norm(square)
    check_norm(square.as_strided((6, 6), (1, 1)))
    check_norm(square, square[1])
    # Two programs would scale it at the same time, and the interpreter has no such thing.
    assert module._plans.locate((square, square[1]), 5)[0].others == [1]
    apart = random(50), random(50)
    assert module._plans.locate(apart, 5)[0].others == []
    line = random(80)
    assert module._plans.locate((line[:50], line[30:]), 5)[0].others == [1]


def test_the_kernel_itself_passes() -> None:
    check(importlib.import_module("fastrnn_kernels.gradient_norm"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_caught(mutant: Mutant) -> None:
    change = (mutant.file, mutant.old, mutant.new, mutant.count)
    with (
        mutated(*change, module="gradient_norm") as module,
        pytest.raises((AssertionError, Deadlock)),
    ):
        check(module)
