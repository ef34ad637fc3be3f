"""A Triton driver that says it is a GPU, and writes down what it is asked to launch.

All of Triton's launch path is real: arguments are bound and specialised, a variant of the kernel is
compiled (or, to count variants only, is not), loaded, and checked as the launcher in C would check.
Nothing is computed.

    with stand_in("sm_90") as driver:
        lstm(torch.zeros(10, 4, 64, device="meta"))
    driver.launches, driver.variants

Tensors of the device "meta" stand for a GPU's: operations on them start and compute nothing, and
whatever would wait for their values is an error. `counting` counts the operations on them.

Limits: one device; no streams and no graphs. Triton's C launcher and CUDA are not called.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":  # read when triton is imported
    pytest.skip("launches nothing where kernels are interpreted", allow_module_level=True)

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastrnn.choosing import backends
from fastrnn.input import transforms, upload
from fastrnn_kernels.offline import disassemble
from fastrnn_kernels.tiling import CHIPS, Chip

GPU = torch.device("meta")
_numbers = itertools.count(1000)
_RANGES = {f"{sign}{bits}": bits for sign in "iu" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, besides the chip."""

    name: str
    constants: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, str], ...]
    unaligned: frozenset[str]  # pointers not known to be multiples of 16 bytes
    num_warps: int


@dataclass
class Launch:
    """What the driver was asked to start, and what a GPU would have refused it for."""

    variant: Variant
    grid: tuple[int, int, int]
    cooperative: bool
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    problems: list[str] = field(default_factory=list)
    # Whether memory that the programs of a launch share was zero, where it can be read.
    zero_at_launch: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.variant.name


class StandIn(DriverBase):
    """A driver of this chip."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.number = next(_numbers)  # kernels compiled for another driver are not found
        self.launches: list[Launch] = []
        self.variants: list[Variant] = []
        self.on_launch: list[Any] = []
        self.codes: list[Any] = []
        self.launcher_cls = self._launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": chip.shared_memory,
                "multiprocessor_count": chip.multiprocessors,
                "warpSize": chip.warp_size,
            },
            load_binary=self._load,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.chip.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        code = disassemble(binary)
        assert code is not None
        self.codes.append(code)
        return None, len(self.codes) - 1, code.registers, code.spills, 1024

    def variant(self, source: ASTSource, num_warps: int) -> Variant:
        """Of a kernel's source; kept once."""
        names = source.fn.arg_names
        aligned = {names[path[0]] for path, found in source.attrs.items() if found}
        types = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
        found = Variant(
            source.fn.__name__,
            tuple((names[path[0]], value) for path, value in source.constants.items()),
            tuple(types.items()),
            frozenset(name for name, kind in types.items() if kind[0] == "*") - aligned,
            num_warps,
        )
        if found not in self.variants:
            self.variants.append(found)
        return found

    def _launcher(self, source: ASTSource, metadata: Any) -> Any:
        variant = self.variant(source, metadata.num_warps)

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            _, _, _, _, *arguments = rest
            made = Launch(variant, (x, y, z), bool(metadata.launch_cooperative_grid))
            if function is not None:
                code = self.codes[function]
                made.registers, made.spills = code.registers, code.spills
                made.shared = metadata.shared
            made.zero_at_launch = {
                name: not value.any()
                for name, value in zip(source.signature, arguments, strict=True)
                if name in ("exchange_ptr", "arrivals_ptr") and value.device != GPU
            }
            made.problems = [*_problems(source, arguments), *self._too_much(made)]
            self.launches.append(made)
            for hook in self.on_launch:
                hook(made)

        return launch

    def _too_much(self, launch: Launch) -> Iterator[str]:
        if launch.registers is None or launch.shared is None:
            return
        warps = launch.variant.num_warps
        held = min(
            65_536 // (-(-launch.registers // 8) * 8 * 32 * warps),
            (self.chip.shared_memory + 1024) // (launch.shared + 1024),
        )
        programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        if launch.cooperative and programs > held * self.chip.multiprocessors:
            yield f"{programs} programs wait for each other, {held} a multiprocessor are resident"
        if launch.spills:
            yield f"spills {launch.spills}"


def _problems(source: ASTSource, arguments: list[Any]) -> Iterator[str]:
    """What Triton's launcher would refuse, or a GPU trip over."""
    aligned = {source.fn.arg_names[path[0]] for path, found in source.attrs.items() if found}
    for (name, kind), value in zip(source.signature.items(), arguments, strict=True):
        if kind == "constexpr":
            continue
        if kind[0] == "*":
            if not isinstance(value, torch.Tensor):
                yield f"{name} is {value!r}, not a tensor"
            elif name in aligned and value.data_ptr() % 16:
                yield f"{name} is compiled for multiples of 16 bytes"
        elif kind in _RANGES:
            bits = _RANGES[kind] - (kind[0] == "i")
            if not isinstance(value, int) or not -(kind[0] == "i") << bits <= value < 1 << bits:
                yield f"{name} = {value!r} does not fit {kind}"


class _NotCompiled:
    """A kernel of which only the variant is of interest."""

    function = packed_metadata = None
    n_spills = 0

    def __init__(self, driver: StandIn, source: ASTSource, options: Any) -> None:
        self.name = source.fn.__name__
        self.run = driver.launcher_cls(source, options)

    def launch_metadata(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def stand_in(chip: str = "sm_90", *, compiles: bool = False) -> Iterator[StandIn]:
    """Kernels launched inside go to a driver of this chip; tensors of any device will do."""
    driver, active = StandIn(CHIPS[chip]), triton.runtime.driver
    before = active._active

    def remember(self, key, signature, device, constexprs, options, attrs, warmup):  # type: ignore[no-untyped-def]
        source = ASTSource(self, signature, constexprs, attrs)
        kernel = self.device_caches[device][0][key] = _NotCompiled(driver, source, options)
        return kernel

    active.set_active(driver)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(backends, "_device_reason", lambda *_: None))
            # A meta tensor stands for one on the GPU, which has data.
            stack.enter_context(mock.patch.object(transforms, "_has_data", lambda _: True))
            stack.enter_context(mock.patch.object(Chip, "of", lambda _: CHIPS[chip]))
            if not compiles:
                stack.enter_context(mock.patch.object(JITFunction, "_do_compile", remember))
            yield driver
    finally:
        active._active = before


class Counting(TorchDispatchMode):
    """Names of the operations on the GPU that start something, launches and copies among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[str] = []
        self.staged: set[int] = set()

    def stage(self, size: int, device: torch.device) -> torch.Tensor:
        """In place of upload's own: no memory can be pinned here."""
        staging = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.staged.add(staging.untyped_storage()._cdata)
        return staging

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        here = [t.device == GPU for t in (*given, *made)]
        if any(here) and not all(here) and name in ("_to_copy", "copy_"):
            [host] = [t for t in given if t.device != GPU]
            pinned = host.untyped_storage()._cdata in self.staged
            self.copies.append("pinned" if pinned else "pageable")
        elif any(here) and not _is_free(func, name):
            self.names.append(name)
        return result


def _is_free(func: Any, name: str) -> bool:
    """Whether an operation starts no kernel: views, and memory that is not filled."""
    views = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    return views or "empty" in name or name in ("_unsafe_view", "detach", "lift_fresh")


@contextlib.contextmanager
def counting(driver: StandIn) -> Iterator[Counting]:
    """Counts what is started inside."""
    mode = Counting()
    hook = lambda launch: mode.names.append(launch.name)  # noqa: E731
    driver.on_launch.append(hook)
    try:
        with mock.patch.object(upload, "_staging", mode.stage), mode:
            yield mode
    finally:
        driver.on_launch.remove(hook)
