"""Lists of gradients for the norm kernel, and what torch makes of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastrnn_kernels import gradient_norm as gradient_norm_module
from tests.interpreter import Schedule, cooperative, triton_interpreter

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GUARD = 3.0  # what lies around a gradient, and must stay
INF = math.inf


class Memory:
    """Gradients, each in a buffer of its own in which `GUARD` surrounds it."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def add(self, values: Tensor, offset: int = 0, permuted: bool = False) -> Memory:
        """A gradient with these values, `offset` elements behind a boundary of 64 bytes."""
        buffer = torch.full((values.numel() + 128,), GUARD, dtype=values.dtype)
        line = 64 // values.element_size()
        start = 16 + (-(buffer.data_ptr() // values.element_size() + 16)) % line + offset
        flat = buffer[start : start + values.numel()]
        grad = flat.view(values.shape[::-1]).permute(*range(values.dim())[::-1])
        grad = grad if permuted else flat.view(values.shape)
        grad.copy_(values)
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside[start : start + values.numel()] = True
        self.grads.append(grad)
        self.buffers.append((buffer, inside))
        return self

    def assert_guarded(self) -> None:
        for buffer, inside in self.buffers:
            assert buffer[~inside].eq(GUARD).all(), "memory around a gradient was written to"


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def several(dtype: torch.dtype) -> Memory:
    """Long and short, empty, of one element, at unaligned addresses."""
    memory = Memory()
    memory.add(random(700, dtype=dtype), 1)
    memory.add(random(3, dtype=dtype), 2)
    memory.add(random(0, dtype=dtype))
    memory.add(random(33, 21, dtype=dtype), permuted=True)
    memory.add(random(1, dtype=dtype), 3)
    memory.add(random(5, 7, 3, dtype=dtype))
    return memory


def mixed() -> Memory:
    """All dtypes in one call."""
    memory = Memory()
    for index, dtype in enumerate((F32, BF16, F16, F32, F16)):
        memory.add(random(40 + 130 * index, dtype=dtype), index)
    return memory


def many() -> Memory:
    """More gradients than programs, so that some programs have several whole ones."""
    memory = Memory()
    for index in range(30):
        memory.add(random(1 + 5 * index % 37, dtype=(F32, BF16)[index % 2], seed=index), index % 5)
    return memory


def without_empty(memory: Memory) -> Memory:
    """torch has no norm of order inf for an empty gradient."""
    kept = [i for i, grad in enumerate(memory.grads) if grad.numel()]
    memory.grads = [memory.grads[i] for i in kept]
    return memory


PROBLEMS: dict[str, Callable[[], Memory]] = {
    "float32": lambda: several(F32),
    "bfloat16": lambda: several(BF16),
    "float16": lambda: several(F16),
    "mixed": mixed,
    "many": many,
}


@dataclass
class Accesses:
    """What launches did to gradients, by gradient and first byte, in their order.

    stores: of one element or more.
    misaligned: whole blocks that do not begin at a multiple of 16 bytes. The kernel promises the
        compiler that they do, which then takes 16 bytes at a time.
    """

    stores: list[tuple[int, int]] = field(default_factory=list)
    misaligned: list[tuple[int, int]] = field(default_factory=list)


@contextlib.contextmanager
def watched(grads: Sequence[Tensor]) -> Iterator[Accesses]:
    """Records what launches inside do to gradients."""
    builder = triton_interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    accesses = Accesses()

    def record(pointers: Any, mask: Any, into: list[tuple[int, int]] | None) -> None:
        wanted = mask.data
        if not wanted.any():
            return
        first = int(pointers.data[wanted].flat[0])
        for index, grad in enumerate(grads):
            place = first - grad.data_ptr()
            if 0 <= place < grad.nbytes:
                if pointers.data.size > 16 and first % 16:
                    accesses.misaligned.append((index, place))
                if into is not None:
                    into.append((index, place))

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        record(pointers, mask, None)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record(pointers, mask, accesses.stores)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
    ):
        yield accesses


def run(
    grads: Sequence[Tensor],
    max_norm: float = 1.0,
    norm_type: float = 2.0,
    schedule: Schedule | None = None,
    module: ModuleType = gradient_norm_module,
    programs: int | None = 5,
    **options: Any,
) -> Any:
    """The launcher, interpreted, with blocks so small that these gradients have several."""
    with (
        mock.patch.object(module, "BLOCK_BYTES", 256),
        mock.patch.object(module, "COMBINE_BLOCK", 8),
        cooperative(schedule),
        watched(grads) as accesses,
    ):
        result = module.clip_gradients(grads, max_norm, norm_type, programs=programs, **options)
    assert not accesses.misaligned
    return result


def run_by_torch(
    grads: Sequence[Tensor], max_norm: float, norm_type: float
) -> tuple[Tensor, list[Tensor]]:
    """What `torch.nn.utils.clip_grad_norm_` returns, and makes of copies of the gradients."""
    parameters = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.empty_like(grad))
        parameter.grad = grad.clone()
        parameters.append(parameter)
    total_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    return total_norm, [parameter.grad for parameter in parameters]


def exact_norm(grads: Sequence[Tensor], norm_type: float) -> float:
    """In float64, without any rounding on the way."""
    return float(
        torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), norm_type)
    )


def torch_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """torch's own operations, from the total norm on."""
    return torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)


def scaled(grad: Tensor, coefficient: Tensor) -> Tensor:
    """Multiplied in float32 and rounded once, as torch does on the CPU."""
    return (grad.float() * coefficient.float()).to(grad.dtype)


def assert_equal(name: str, actual: Tensor, expected: Tensor, rtol: float = 0.0) -> None:
    """Same dtype, shape and values; NaN equals NaN."""
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def by_a_rounding(dtype: torch.dtype) -> float:
    """How far norms may be apart whose sums were added up in another order."""
    return max(1e-6, 1.01 * torch.finfo(dtype).eps)


def check_clip(
    memory: Memory, max_norm: float = 1.0, norm_type: float = 2.0, **options: Any
) -> Any:
    """Runs the kernel; raises AssertionError unless norms, coefficient and gradients are torch's.

    Norms may differ by the order of sums, which can turn one rounding to 16 bits. From the total
    norm on everything must be equal bit by bit.
    """
    grads = memory.grads
    before = [grad.clone() for grad in grads]
    total_norm, _ = run_by_torch(grads, max_norm, norm_type)
    result = run(grads, max_norm, norm_type, **options)
    memory.assert_guarded()
    dtype = total_norm.dtype
    assert_equal("total norm", result.total_norm, total_norm, by_a_rounding(dtype))
    if all(grad.dtype == F32 for grad in grads) and math.isfinite(total_norm):
        exact = exact_norm(before, norm_type)
        assert abs(float(result.total_norm) - exact) <= 5e-7 * exact
    assert result.norms.shape == (len(grads),)
    for index, grad in enumerate(before):
        norm = torch.linalg.vector_norm(grad, norm_type).to(dtype)
        assert_equal(f"norm {index}", result.norms[index], norm, by_a_rounding(grad.dtype))
    coefficient = torch_coefficient(result.total_norm, max_norm)
    assert_equal("coefficient", result.coefficient, coefficient)
    for index, (grad, old) in enumerate(zip(grads, before, strict=True)):
        assert_equal(f"gradient {index}", grad, scaled(old, coefficient))
    return result
