"""A cooperative interpreter: Triton kernels whose programs wait for each other, run on a CPU.

Triton's own interpreter (TRITON_INTERPRET=1) runs the programs of a grid one after another, so a
barrier among them would spin for ever. Here each program is a greenlet that gives way at every
atomic operation, before and after it, and a `Schedule` says who goes on. What a kernel must not
depend on, the order in which its programs come to run, is so put to the test, reproducibly; a wait
that nobody will ever end is reported as a `Deadlock`, with who waits for what.

    with cooperative(RandomOrder(seed=3)):
        kernel[grid](...)

It also mends three things of Triton's interpreter that would blur a comparison: `tl.dot` of
bfloat16 (it multiplies the bit patterns as integers), rounding to bfloat16 (not to nearest even; it
can lose a carry), and comparisons (the result keeps the operands' type, so that a broadcast makes
integers of it, which are no mask to Triton 3.9).

Limits: memory is sequentially consistent here and stores become visible at once, in program order.
A missing acquire or release cannot show; the offline gate looks for them in the machine code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

import greenlet
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

# All that is used here, or by tests through here, of what Triton promises to nobody. No other file
# imports Triton's interpreter; test_interpreter.py says which are gone.
RELIED_ON = {
    "GridExecutor": ("__call__", "_init_args_hst", "_restore_args_dev"),
    "InterpreterBuilder": (
        "binary_op",
        "cast_impl",
        "create_atomic_cas",
        "create_atomic_rmw",
        "create_dot",
        "create_masked_load",
        "create_masked_store",
        "set_grid_dim",
        "set_grid_idx",
    ),
    "TensorHandle": (),
    "interpreter_builder": ("options",),
    "_implicit_cvt": (),
    "_interpreter": ("load",),
    "_patch_lang": (),
}

# A program that polled this often while nothing changed anywhere is waiting, not merely slow to
# look.
POLLS_BEFORE_STUCK = 3


class Deadlock(RuntimeError):
    """No program can go on. The message says who waits, on which word, and what it reads."""


@dataclass
class Program:
    """One program of the grid, and what it waits for when it polls."""

    index: tuple[int, int, int]
    greenlet: greenlet.greenlet
    polls: int = 0  # polls in a row that changed nothing and saw nothing new
    polled: tuple[int, Any] | None = None  # address and value of the last one


class Schedule(Protocol):
    """Chooses which of the programs that are still alive goes on, at every switch."""

    def choose(self, alive: list[Program]) -> Program: ...


@dataclass
class RoundRobin:
    """Every program in turn; `backwards` from the last to the first."""

    backwards: bool = False
    turn: int = field(default=0, repr=False)

    def choose(self, alive: list[Program]) -> Program:
        self.turn += 1
        program = alive[self.turn % len(alive)]
        return alive[-1 - self.turn % len(alive)] if self.backwards else program


@dataclass
class RandomOrder:
    """A seeded random program at every switch."""

    seed: int
    random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def choose(self, alive: list[Program]) -> Program:
        return self.random.choice(alive)


@dataclass
class RunAhead:
    """Adversarial: one program runs until it can only wait, then the next.

    The favourite is as far ahead of the others as the barriers allow, so that it overwrites what
    they still need and reads what they have not yet written, if the kernel lets it.
    """

    favourite: int = 0

    def choose(self, alive: list[Program]) -> Program:
        order = alive[self.favourite :] + alive[: self.favourite]
        for program in order:
            if program.polls < 2:
                return program
        return min(order, key=lambda program: program.polls)


@dataclass
class Starve:
    """Adversarial: one program of the grid runs only when all others can do nothing but wait."""

    victim: int

    def choose(self, alive: list[Program]) -> Program:
        victim = alive[self.victim % len(alive)]
        others = [program for program in alive if program is not victim]
        able = [program for program in others if program.polls < 2]
        return able[0] if able else min([victim, *others], key=lambda program: program.polls)


def schedules() -> list[Schedule]:
    """One of each kind, and three seeds; make them anew for each run, they have state."""
    return [
        RoundRobin(),
        RoundRobin(backwards=True),
        RandomOrder(1),
        RandomOrder(2),
        RandomOrder(3),
        RunAhead(0),
        RunAhead(-1),
        Starve(0),
        Starve(-1),
    ]


@dataclass
class Trace:
    """What a run did, so that a test can tell that it exercised something."""

    launches: int = 0
    programs: int = 0
    switches: int = 0


class _Scheduler:
    def __init__(self, schedule: Schedule, trace: Trace, patience: int) -> None:
        self.schedule = schedule
        self.trace = trace
        self.patience = patience
        self.alive: list[Program] = []
        self.running: Program | None = None
        self.regions: list[tuple[str, int, int]] = []

    def run(self, fn: Any, arguments: dict[str, Any], grid: tuple[int, int, int]) -> None:
        hub = greenlet.getcurrent()
        builder = triton_interpreter.interpreter_builder

        def program() -> None:
            # NumPy keeps this setting by context, and each greenlet has one of its own.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                fn(**arguments)

        for index in np.ndindex(*grid):
            worker = greenlet.greenlet(program, parent=hub)
            self.alive.append(Program(tuple(int(i) for i in index), worker))
        self.trace.launches += 1
        self.trace.programs += len(self.alive)
        try:
            while self.alive:
                self.running = self.schedule.choose(self.alive)
                builder.set_grid_idx(*self.running.index)
                self.trace.switches += 1
                self.running.greenlet.switch()
                if self.running.greenlet.dead:
                    self.alive.remove(self.running)
                    self.something_changed()
                elif all(program.polls >= self.patience for program in self.alive):
                    raise Deadlock(self.describe())
        finally:
            self.running = None
            stuck, self.alive = self.alive, []
            for program in stuck:
                program.greenlet.throw(greenlet.GreenletExit)

    def something_changed(self) -> None:
        for program in self.alive:
            program.polls = 0

    def around_atomic(self, pointers: Any, operation: Any) -> Any:
        program = self.running
        if program is None:
            return operation()
        hub = program.greenlet.parent
        hub.switch()
        before = operation()
        address = int(pointers.data.flat[0])
        value = before.data.copy()
        after = _word_at(address, value)
        if after != value.flat[0]:
            self.something_changed()
            program.polled = None
        elif program.polled == (address, value.flat[0]):
            program.polls += 1
        else:
            program.polls = 1
            program.polled = (address, value.flat[0])
        hub.switch()
        return before

    def describe(self) -> str:
        lines = [f"{len(self.alive)} programs wait for ever:"]
        for program in self.alive:
            address, value = program.polled or (0, "?")
            lines.append(f"  program {program.index} reads {self.name_of(address)} = {value}")
        return "\n".join(lines)

    def name_of(self, address: int) -> str:
        for name, start, size in self.regions:
            if start <= address < start + size:
                return f"{name} + {address - start} bytes"
        return hex(address)


def _word_at(address: int, like: np.ndarray) -> Any:
    pointers = np.full(like.shape, address, dtype=np.uint64)
    mask = np.ones(like.shape, dtype=bool)
    other = np.zeros_like(like)
    loaded = triton_interpreter._interpreter.load(pointers, mask, other, like.dtype)
    return loaded.flat[0]


def _float32_of(handle: Any) -> np.ndarray:
    """The values of a tensor as float32; bfloat16 lies in memory as the upper half of one."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


@contextlib.contextmanager
def cooperative(
    schedule: Schedule | None = None, patience: int = POLLS_BEFORE_STUCK
) -> Iterator[Trace]:
    """Kernels launched inside run all programs of their grid at once, interleaved by `schedule`.

    `patience` is how often all of them may poll in vain; give more where a wait is to give up.

    Raises:
        Deadlock: every program that is still alive waits, and nothing can change any more.
    """
    schedule = RoundRobin() if schedule is None else schedule
    trace = Trace()
    current: list[_Scheduler] = []
    executor = triton_interpreter.GridExecutor
    builder = triton_interpreter.InterpreterBuilder
    original_call = executor.__call__
    original_rmw, original_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    original_cast, original_dot = builder.cast_impl, builder.create_dot
    original_binary = builder.binary_op
    original_patch = triton_interpreter._patch_lang

    def call(self: Any, *arguments: Any, **keywords: Any) -> None:
        # What Triton's own executor does, but for its loop over the grid.
        names = inspect.getfullargspec(self.fn).args
        keywords = {name: value for name, value in keywords.items() if name in names}
        host_arguments, host_keywords = self._init_args_hst(arguments, keywords)
        # Each call of a device function would patch the language that its module sees once more,
        # which takes most of the time, and would leave it so. Here each module's is patched once.
        patches: dict[int, Any] = {}

        def patch_once(function: Any) -> None:
            key = id(function.__globals__)
            if key not in patches:
                patches[key] = original_patch(function)

        triton_interpreter._patch_lang = patch_once
        patch_once(self.fn)
        scheduler = _Scheduler(schedule, trace, patience)
        current.append(scheduler)
        try:
            bound = inspect.getcallargs(self.fn, *host_arguments, **host_keywords)
            for name, value in bound.items():
                if isinstance(value, torch.Tensor) and value.numel():
                    size = value.numel() * value.element_size()
                    scheduler.regions.append((name, value.data_ptr(), size))
            converted = {
                name: value if name in self.constexprs else triton_interpreter._implicit_cvt(value)
                for name, value in bound.items()
            }
            grid = self.grid(converted) if callable(self.grid) else self.grid
            grid = (*grid, 1, 1)[:3]
            triton_interpreter.interpreter_builder.set_grid_dim(*grid)
            scheduler.run(self.fn, converted, grid)
        finally:
            current.pop()
            triton_interpreter._patch_lang = original_patch
            for patch in reversed(patches.values()):
                if patch is not None:
                    patch.restore()
        self._restore_args_dev(arguments, host_arguments, keywords, host_keywords)

    def rmw(self: Any, operation: Any, pointers: Any, *rest: Any) -> Any:
        return current[-1].around_atomic(
            pointers, lambda: original_rmw(self, operation, pointers, *rest)
        )

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        return current[-1].around_atomic(pointers, lambda: original_cas(self, pointers, *rest))

    def cast(self: Any, source: Any, target: Any) -> Any:
        wide, narrow = tl.float32, tl.bfloat16
        if (source.dtype.scalar, target.scalar) == (narrow, wide):
            return triton_interpreter.TensorHandle(_float32_of(source), wide)
        if (source.dtype.scalar, target.scalar) == (wide, narrow):
            return triton_interpreter.TensorHandle(_bfloat16_bits(source.data), narrow)
        return original_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        product = np.matmul(_float32_of(a), _float32_of(b), dtype=c.data.dtype)
        return triton_interpreter.TensorHandle(product + c.data, c.dtype.scalar)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        result = original_binary(self, left, right, operation)
        if result.data.dtype == np.bool_:
            return triton_interpreter.TensorHandle(result.data, tl.int1)
        return result

    instance = triton_interpreter.interpreter_builder
    original_options = instance.options
    # A check of each integer operation that costs a third of the time; sizes here are small.
    instance.options = dataclasses.replace(original_options, sanitize_overflow=False)
    executor.__call__ = call
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    builder.cast_impl, builder.create_dot = cast, dot
    builder.binary_op = binary
    try:
        yield trace
    finally:
        instance.options = original_options
        executor.__call__ = original_call
        builder.create_atomic_rmw, builder.create_atomic_cas = original_rmw, original_cas
        builder.cast_impl, builder.create_dot = original_cast, original_dot
        builder.binary_op = original_binary
