"""Compiles the kernels for GPUs that are not here, and examines the machine code.

    python -m fastrnn_kernels.offline --help

For every tile that tiling.py can choose on a grid of hidden sizes, batch sizes, directions and
dtypes, and for each chip, Triton's compiler runs without a GPU and the result is held against these
rules:

- no local memory and no register spills;
- shared memory, and Blackwell's tensor memory, within the chip's limit and within what tiling.py
  reckons with;
- matrix instructions of the chip's kind, Hopper's HGMMA where BLOCK_B >= 64;
- the exchange is loaded 16 bytes at a time (cp.async counts), if a thread has so many of a block;
- the barrier's arrival is a release, its wait an acquire, with a barrier of the program's threads
  on either side;
- no load of the exchange between a program's arrival and its wait, in the compiler's last
  tile-level form and along every path of the PTX;
- none of it by a path for which the memory model promises nothing (see memory_rules.py);
- W_hh is not read inside the loop over steps when it is resident;
- no floating-point atomics.

One case of each kind is compiled (see `kinds`), a few of them with --quick, and the whole grid with
--every. The outcome is a table; --snapshot writes it to a file to keep under version control, and
--check holds it against one and fails if they differ. A run that was cut off and is begun again
compiles nothing twice: Triton's cache has it, and what remains is a fifth of a second a case.

What this cannot tell is whether the code is fast, or right: see tests/interpreter.py for the
second.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import difflib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .lstm_backward import lstm_backward_kernel
from .lstm_forward import lstm_forward_kernel
from .memory_rules import exchange_faults, proxy_faults, reached_from
from .tiling import (
    CHIPS,
    Chip,
    Pass,
    Tile,
    backward_tile,
    forward_tile,
    parts_of,
    round_up,
    shared_memory,
    tensor_memory,
)

BATCH_SIZES = (16, 64, 128, 1024)
# Multiples of 8, for fastrnn's layers ask for no others. Besides the usual ones, those it takes to
# have each kind of tile (see `kind_of`) that the rule chooses, with these batch sizes, for any
# multiple of 8 up to 2048; tests/kernels/test_offline.py sees to it. Most are odd multiples of 8,
# of which the last block of units or of K is partly empty.
HIDDEN_SIZES = (
    *(8, 24, 40, 64, 72, 128, 136, 184, 208, 256, 264, 296, 328, 424, 512, 552, 600, 648, 680),
    *(776, 904),
    *(1000, 1024, 1160, 1256, 1608, 2040, 2048),
)
# Without 512 in float32, whose products of 64 rows take the compiler a quarter of a minute each.
QUICK_HIDDEN_SIZES = {"bf16": (64, 104, 256, 512, 2048), "fp32": (64, 104, 256, 2048)}
QUICK_BATCH_SIZES = (16, 128)
QUICK_CHIPS = tuple(name for name, chip in CHIPS.items() if chip.generation == name)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    name: GPUTarget("hip", name, chip.warp_size)
    if name.startswith("gfx")
    else GPUTarget("cuda", int(name.removeprefix("sm_")), chip.warp_size)
    for name, chip in CHIPS.items()
}
# Names in a kernel's signature whose pointers are not of the tensors' dtype.
INDEX_POINTERS = {"batch_sizes_ptr": "*i64", "offsets_ptr": "*i64"}
INDEX_POINTERS |= {"arrivals_ptr": "*i32", "failed_ptr": "*i32"}


@dataclass(frozen=True)
class Case:
    """One compilation."""

    chip: str
    which: Pass
    dtype: str
    H: int
    D: int
    tile: Tile
    input_precision: str

    @property
    def name(self) -> str:
        """A line's beginning in the table and the snapshot."""
        tile = self.tile
        precision = f" {self.input_precision}" if self.dtype == "fp32" else ""
        return (
            f"{self.chip:6} {self.which:8} {self.dtype}{precision:7} H{self.H:<5}D{self.D} "
            f"{tile.residency:8} B{tile.BLOCK_B:<3}H{tile.BLOCK_H:<4}K{tile.BLOCK_K:<4}"
            f"w{tile.num_warps} g{tile.groups} f{tile.in_flight:<2}"
        )


@dataclass
class Report:
    """What the machine code of one case uses, and which rules it breaks."""

    case: Case
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: str = ""
    wide_loads: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line of the table."""
        verdict = "; ".join(self.faults) if self.faults else "ok"
        return (
            f"{self.case.name} reg {self.registers:<4}spill {self.spills:<4}shared {self.shared:<7}"
            f"{self.matrix:12}ld16 {self.wide_loads:<4}{verdict}"
        )


def cases(
    chips: Iterable[str],
    hidden_sizes: Iterable[int],
    batch_sizes: Iterable[int],
    dtypes: Iterable[str],
) -> list[Case]:
    """Each tile that the rule chooses on the grid, once per hidden size and chip."""
    found: dict[Case, None] = {}
    for chip in chips:
        for dtype in dtypes:
            for H in hidden_sizes:
                for D in (1, 2):
                    for S in batch_sizes:
                        for case in _cases_of(chip, dtype, S, H, D):
                            found[case] = None
    return list(found)


def _cases_of(chip: str, dtype: str, S: int, H: int, D: int) -> Iterator[Case]:
    choosers: tuple[tuple[Pass, Any], ...] = (
        ("forward", forward_tile),
        ("backward", backward_tile),
    )
    precisions = ("tf32", "tf32x3") if dtype == "fp32" else ("tf32",)
    if chip.startswith("gfx"):
        precisions = ("ieee",)
    for which, choose in choosers:
        for precision in precisions:
            try:
                tile = choose(S, H, D, DTYPES[dtype], CHIPS[chip], precision)
            except ValueError:  # none fits, and the layer is refused
                continue
            # The number of batch programs is a grid size: it is not compiled in.
            values = {**vars(tile), "batch_programs": 1}
            yield Case(chip, which, dtype, H, D, Tile(**values), precision)


def _kernel(case: Case) -> Any:
    return lstm_forward_kernel if case.which == "forward" else lstm_backward_kernel


def source(case: Case) -> ASTSource:
    """The kernel with the signature that its launcher gives it, pointers aligned to 16 bytes."""
    kernel = _kernel(case)
    options = case.tile.options()
    constants: dict[str, object] = {
        "H": case.H,
        "H_PADDED": case.tile.padded(case.H),
        "D": case.D,
        "WEIGHT_STRIDE": round_up(case.H, 16 // DTYPES[case.dtype].itemsize),
        "INPUT_PRECISION": case.input_precision,
        "SAVE_GATES": True,
        "SAVE_CELLS": True,
        "HAS_D_C": True,
        **{name: v for name, v in case.tile.constants().items() if name not in options},
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = INDEX_POINTERS.get(name, f"*{case.dtype}")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    compiled_in = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    return ASTSource(fn=kernel, signature=signature, constexprs=compiled_in, attrs=attributes)


def examine(case: Case) -> Report:
    """Compiles one case and applies the rules."""
    report = Report(case)
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            source(case), target=TARGETS[case.chip], options=case.tile.options()
        )
    except Exception as error:
        reason = str(error).strip().splitlines()
        report.faults.append(f"does not compile: {type(error).__name__} {reason[-1:]}")
        return report
    report.seconds = time.perf_counter() - start
    report.shared = compiled.metadata.shared
    chip = CHIPS[case.chip]
    dtype = DTYPES[case.dtype]
    parts = parts_of(dtype, case.input_precision)
    reckoned = shared_memory(case.tile, case.which, case.H, dtype.itemsize, parts)
    if report.shared > chip.shared_memory:
        report.faults.append(f"shared memory exceeds {chip.shared_memory}")
    if report.shared > reckoned:
        report.faults.append(f"tiling.py reckons with {reckoned} bytes of shared memory only")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if chip.tensor_memory is not None and columns > chip.tensor_memory:
        report.faults.append(f"tensor memory exceeds {chip.tensor_memory} columns")
    if columns > (reckoned := tensor_memory(case.tile, case.which, case.H)):
        report.faults.append(f"tiling.py reckons with {reckoned} columns of tensor memory only")
    if "cubin" in compiled.asm:
        _examine_nvidia(report, compiled.asm, chip)
    else:
        _examine_amd(report, compiled.asm)
    _examine_loop(report, compiled.asm["ttgir"])
    return report


def _run_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


class NvidiaCode(NamedTuple):
    """The machine code of a kernel, and bytes of stack and local memory that it uses."""

    registers: int
    stack: int
    local: int
    sass: str

    @property
    def spills(self) -> int:
        """0 where nothing is spilled."""
        return self.stack + self.local + len(re.findall(r"\b(?:LDL|STL)\b", self.sass))


def disassemble(cubin: bytes) -> NvidiaCode | None:
    """What cuobjdump says of a kernel; None where it does not report the registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        sass = _run_tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    return None if found is None else NvidiaCode(*map(int, found.groups()), sass)


def _examine_nvidia(report: Report, asm: dict[str, Any], chip: Chip) -> None:
    tile, faults = report.case.tile, report.faults
    code = disassemble(asm["cubin"])
    if code is None:
        faults.append("cuobjdump does not report the registers")
        return
    report.registers, stack, local, sass = code
    report.spills = code.spills
    if report.spills:
        faults.append(f"spills: {stack} bytes of stack, {local} of local memory")

    counts = {name: len(re.findall(rf"\b{name}", sass)) for name in ("HGMMA", "HMMA", "UTCHMMA")}
    report.matrix = " ".join(f"{name} {n}" for name, n in counts.items() if n)
    if chip.wgmma and tile.BLOCK_B >= 64 and not counts["HGMMA"]:
        faults.append("no HGMMA")
    if not sum(counts.values()):
        faults.append("no matrix instructions")

    report.wide_loads = len(
        re.findall(r"\bLDG\.E\.128|\bLDGSTS\.E\.(?:BYPASS\.)?(?:LTC128B\.)?128", sass)
    )
    if tile.residency != "whole":
        faults += barrier_faults(asm["ptx"], sass)
        faults += exchange_faults(asm["ptx"], _kernel(report.case).arg_names.index("exchange_ptr"))
        if _has_16_bytes_a_thread(report.case, chip):
            _examine_exchange(report, asm["ptx"])
    faults += proxy_faults(asm["ptx"]) + atomics_faults(asm["ptx"])


def atomics_faults(text: str) -> list[str]:
    """What is wrong with a kernel's atomics, in PTX or AMD's code: floating-point ones."""
    nvidia = r"\b(?:red|atom)\.[\w.:]*(?:f16|f32|bf16)"
    amd = r"\b(?:global|flat|buffer)_atomic_(?:pk_)?add_(?:f|bf)"
    return ["floating-point atomics"] if re.search(f"{nvidia}|{amd}", text) else []


def barrier_faults(ptx: str, sass: str) -> list[str]:
    """What is wrong with a kernel's arrivals and waits in NVIDIA's code."""
    faults = []
    lines = [line.strip() for line in ptx.splitlines()]
    arrivals = [
        i for i, line in enumerate(lines) if re.search(r"(?:red|atom)[\w.]*\.release\.", line)
    ]
    waits = _waits(lines)
    if not arrivals or any(".gpu." not in lines[i] for i in arrivals):
        faults.append("the arrival is not a release at GPU scope")
    if not waits or any(".gpu." not in lines[i] for i in waits):
        faults.append("the wait is not an acquire at GPU scope")
    synchronised = re.compile(r"bar(?:rier)?\.(?:cta\.)?sync")
    near = 12
    if not all(any(map(synchronised.search, lines[max(0, i - near) : i])) for i in arrivals):
        faults.append("no barrier of the threads before the arrival")
    if not all(any(map(synchronised.search, lines[i : i + near])) for i in waits):
        faults.append("no barrier of the threads after the wait")
    if "STRONG.GPU" not in sass:
        faults.append("the wait is not a strong load")
    return faults


def _waits(lines: list[str]) -> list[int]:
    return [i for i, line in enumerate(lines) if re.search(r"(?:ld|atom)[\w.]*\.acquire\.", line)]


def _has_16_bytes_a_thread(case: Case, chip: Chip) -> bool:
    """Not where the stages of streamed weights leave no room for blocks so wide (see tiling.py)."""
    block = case.tile.BLOCK_B * case.tile.BLOCK_K * DTYPES[case.dtype].itemsize
    return block >= 16 * case.tile.num_warps * chip.warp_size


def _examine_exchange(report: Report, ptx: str) -> None:
    # Its first loads follow the wait: they must be 16 bytes wide.
    lines = [line.strip() for line in ptx.splitlines()]
    loads = re.compile(r"\bld\.global\b|\bcp\.async\.c[ag]\.shared\.global\b")
    wide = re.compile(r"ld\.global[\w.]*\.v4\.b32|cp\.async\.cg\.shared\.global .*0x10, ")
    for wait in _waits(lines):
        after = (lines[i] for i in reached_from(lines, wait + 1) if loads.search(lines[i]))
        if not wide.search(next(after, "")):
            report.faults.append("the exchange is not loaded 16 bytes at a time")


def _examine_amd(report: Report, asm: dict[str, Any]) -> None:
    text, faults = asm["amdgcn"], report.faults
    report.registers, spilled, scratch = amd_usage(text)
    report.spills = spilled + scratch
    if report.spills:
        faults.append(f"spills: {spilled} registers, {scratch} bytes of scratch")
    matrix = len(re.findall(r"\bv_mfma", text))
    report.matrix = f"MFMA {matrix}"
    if not matrix:
        faults.append("no matrix instructions")
    report.wide_loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text))
    if report.case.tile.residency != "whole":
        if not report.wide_loads:
            faults.append("the exchange is not loaded 16 bytes at a time")
        faults += amd_barrier_faults(text, report.case.chip)
    faults += atomics_faults(text)


def amd_usage(text: str) -> tuple[int, int, int]:
    """Vector registers that a kernel uses, those that it spills, and bytes of scratch memory.

    Scalar registers are spilled to lanes of vector registers, not to memory; that is no fault.
    """

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return (
        number("vgpr_count"),
        number("vgpr_spill_count"),
        number("private_segment_fixed_size"),
    )


def amd_barrier_faults(text: str, architecture: str) -> list[str]:
    """What is wrong with a kernel's arrivals and waits in AMD's code.

    An acquire invalidates the nearest cache, a release waits until all stores have arrived; where
    multiprocessors do not share one L2 it also writes that one back (LLVM's AMDGPU memory model).
    """
    acquire, release = r"buffer_inv sc1", r"buffer_wbl2 sc1"
    if architecture == "gfx90a":
        acquire = r"buffer_wbinvl1_vol"
        release = r"s_waitcnt vmcnt\(0\)(?: lgkmcnt\(0\))?\s+global_atomic_add "
    faults = []
    if not re.search(acquire, text):
        faults.append("the wait is not an acquire at agent scope")
    if not re.search(release, text):
        faults.append("the arrival is not a release at agent scope")
    return faults


def _examine_loop(report: Report, ttgir: str) -> None:
    """Checks what the loop over steps reads, and when, in the compiler's last tile-level form."""
    lines = ttgir.splitlines()
    waits = [i for i, line in enumerate(lines) if "tt.atomic_rmw" in line and ", acquire," in line]
    products = [i for i, line in enumerate(lines) if re.search(r"tt\.dot |_dot |gen5_mma ", line)]
    inside = waits if report.case.tile.residency != "whole" else products[:1]
    if len(inside) != 1:
        report.faults.append("the loop over steps was not found")
        return
    first, last = _innermost_loop(lines, inside[0])
    weight, exchange = _derived(lines, "%weight_ptr"), _derived(lines, "%exchange_ptr")
    body = range(first, last)
    reads = re.compile(r"tt\.load |buffer_load|async_copy_global_to_local |async_load")
    if report.case.tile.residency != "streamed" and _uses(lines, body, reads, weight):
        report.faults.append("W_hh is read inside the loop over steps")
    if report.case.tile.residency == "whole":
        return
    released = [i for i in body if "tt.atomic_rmw" in lines[i] and ", release," in lines[i]]
    loads = _uses(lines, body, reads, exchange)
    stores = _uses(lines, body, re.compile(r"tt\.store |buffer_store"), exchange)
    if len(released) != 1 or not loads or not stores:
        report.faults.append("arrival, or loads or stores of the exchange, not found in the loop")
        return
    wait, arrival = inside[0], released[0]
    if min(loads) < wait or wait < arrival < max(loads):
        report.faults.append("the exchange is read between arrival and wait")
    if max(stores) > arrival:
        report.faults.append("the exchange is written after the arrival")


def _innermost_loop(lines: list[str], inside: int) -> tuple[int, int]:
    """First and last line of the innermost loop around a line; MLIR indents what it holds."""

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    level, first = depth(lines[inside]), inside
    while not (depth(lines[first]) < level and "scf.for" in lines[first]):
        level = min(level, depth(lines[first]))
        first -= 1
    last = next(
        i
        for i in range(first + 1, len(lines))
        if lines[i].strip() and depth(lines[i]) == depth(lines[first])
    )
    return first, last


def _derived(lines: list[str], pointer: str) -> set[str]:
    """Names of the values computed from a pointer argument, what is loaded through it excepted."""
    names = {pointer}
    for line in lines:
        code = line.split(" loc(")[0]
        for carried, initial in re.findall(r"(%[\w$.-]+) = (%[\w$.-]+)(?:#\d+)?", code):
            if initial in names:
                names.add(carried)
        found = re.match(r"\s*(%[\w$.-]+)(?::\d+)? = (tt\.\w+|ttg\.\w+|arith\.select) (.*)", code)
        if found is None or re.search(r"load|atomic|dot", found[2]):
            continue
        if names & set(re.findall(r"%[\w$.-]+", found[3])):
            names.add(found[1])
    return names


def _uses(lines: list[str], body: range, operation: re.Pattern[str], names: set[str]) -> list[int]:
    """Lines of the body with such an operation on one of these values."""
    return [
        i
        for i in body
        if operation.search(lines[i])
        and names & set(re.findall(r"%[\w$.-]+", lines[i].split(" = ", 1)[-1]))
    ]


def kind_of(case: Case) -> tuple[object, ...]:
    """What cases of a kind have in common: all but H, D, and in_flight, which depends on H."""
    tile = case.tile
    cut = (tile.residency, tile.BLOCK_B, tile.BLOCK_H, tile.BLOCK_K, tile.num_warps, tile.groups)
    return (case.chip, case.which, case.dtype, case.input_precision, *cut)


def kinds(chips: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    """Of the cases of the grid one of each kind: with the largest H, so with most in registers."""
    chosen: dict[tuple[object, ...], Case] = {}
    for case in cases(chips, HIDDEN_SIZES, BATCH_SIZES, dtypes):
        kind = kind_of(case)
        if kind not in chosen or chosen[kind].H < case.H:
            chosen[kind] = case
    return list(chosen.values())


def quick(chips: Iterable[str]) -> list[Case]:
    """A part that represents the whole: each chip, pass and residency, few sizes."""
    chosen: dict[tuple[object, ...], Case] = {}
    for chip in chips:
        for dtype in ("bf16", "fp32") if chip == "sm_90" else ("bf16",):
            for case in cases([chip], QUICK_HIDDEN_SIZES[dtype], QUICK_BATCH_SIZES, [dtype]):
                key = (chip, dtype, case.which, case.tile.residency, case.tile.BLOCK_B >= 64)
                chosen.setdefault(key, case)
    return list(chosen.values())


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn_kernels.offline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chip", action="append", choices=list(TARGETS), help="only this chip")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a representative part")
    extent.add_argument("--every", action="store_true", help="the whole grid, over three thousand")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at the same time (1)")
    parser.add_argument("--list", action="store_true", help="name the cases, compile nothing")
    parser.add_argument("--snapshot", type=Path, help="write the table to this file")
    parser.add_argument("--check", type=Path, help="fail if the table differs from this file's")
    given = parser.parse_args(arguments)
    chips = given.chip or list(QUICK_CHIPS if given.quick else TARGETS)
    dtypes = given.dtype or list(DTYPES)
    if given.quick:
        chosen = [case for case in quick(chips) if case.dtype in dtypes]
    elif given.every:
        chosen = cases(chips, HIDDEN_SIZES, BATCH_SIZES, dtypes)
    else:
        chosen = kinds(chips, dtypes)
    if given.list:
        print("\n".join(case.name for case in chosen))
        return 0
    return report_all(chosen, examine, given, part_of(chips, dtypes))


def part_of(chips: Iterable[str], dtypes: Iterable[str]) -> Callable[[str], bool]:
    """Whether a snapshot's line is of one of these chips, and of one of these dtypes."""

    def is_of_them(line: str) -> bool:
        chip, _, dtype = line.split()[:3]
        return chip in chips and dtype in dtypes

    return is_of_them


def report_all(
    chosen: Sequence[Any],
    examine: Callable[[Any], Any],
    given: argparse.Namespace,
    is_asked_for: Callable[[str], bool],
) -> int:
    """Examines cases, prints the table, writes the snapshot, compares with another.

    Args:
        chosen: the cases.
        examine: what gives the report of one, with `line`, `faults` and `seconds`.
        given: `jobs`, `snapshot` and `check` of the command line.
        is_asked_for: whether a snapshot's line is to be compared with.

    Returns:
        The command's exit status: 1 if a rule is broken, or the table has changed.
    """
    lines, faulty = [], 0
    with contextlib.ExitStack() as stack:
        # Line by line, so that a long run that is cut off leaves what it has seen.
        snapshot = stack.enter_context(given.snapshot.open("w")) if given.snapshot else None
        if snapshot:
            print(f"triton {triton.__version__}", file=snapshot, flush=True)
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(given.jobs))
        for report in pool.map(examine, chosen):
            lines.append(report.line)
            faulty += bool(report.faults)
            print(f"{report.line}  ({report.seconds:.1f} s)", flush=True)
            if snapshot:
                print(report.line, file=snapshot, flush=True)
    print(f"{len(chosen)} cases, {faulty} faulty")
    changes = difference(given.check, lines, is_asked_for) if given.check else []
    print("\n".join(changes), end="\n" if changes else "")
    return 1 if faulty or changes else 0


def difference(snapshot: Path, lines: list[str], is_asked_for: Callable[[str], bool]) -> list[str]:
    """How the table differs from the part of a snapshot that was asked for, as a diff.

    Another version of Triton makes other code: nothing is compared then, and nothing differs.
    """
    version, *kept = snapshot.read_text().splitlines()
    if version != f"triton {triton.__version__}":
        print(f"{snapshot} is of {version}, this is {triton.__version__}: not compared")
        return []
    expected = list(filter(is_asked_for, kept))
    return list(difflib.unified_diff(expected, lines, str(snapshot), "now", n=0, lineterm=""))


if __name__ == "__main__":
    sys.exit(main())
