"""Compiles the norm kernel for GPUs that are not here, and examines the machine code.

    python -m fastrnn_kernels.offline_norm --help

It is to offline.py what gradient_norm.py is to the LSTM's kernels. The rules:

- no register spills and no local memory;
- registers and shared memory of twice as many programs as gradient_table.py takes to be resident,
  so that what else runs does not keep a grid out;
- gradients of each dtype are loaded, and stored, 16 bytes at a time;
- all loads of a block that is summed come before the first use of one (NVIDIA; in the rescaling
  the compiler of Triton 3.6 mixes them);
- the barrier's arrivals are releases, its waits acquires, with a barrier of the program's threads
  on either side;
- no floating-point atomics.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from .gradient_kernel import gradient_norm_kernel
from .gradient_norm import BLOCK_BYTES, COMBINE_BLOCK, THREADS, launch_options
from .gradient_table import KINDS, PROGRAMS_PER_MULTIPROCESSOR
from .gradient_threshold import BLOCK as THRESHOLD_BLOCK
from .gradient_threshold import launch_options as threshold_options
from .gradient_threshold import threshold_kernel
from .offline import (
    QUICK_CHIPS,
    TARGETS,
    amd_barrier_faults,
    amd_usage,
    atomics_faults,
    barrier_faults,
    disassemble,
    report_all,
)
from .tiling import CHIPS

POINTERS = {"table_ptr": "*i64", "counts_ptr": "*i64", "failed_ptr": "*i32"}
POINTERS |= {f"{name}_ptr": "*fp32" for name in ("partials", "inverse", "nonfinite", "rows")}
UNALIGNED = gradient_norm_kernel.do_not_specialize_on_alignment
PROGRAMS = 2 * PROGRAMS_PER_MULTIPROCESSOR
REGISTERS_OF_A_MULTIPROCESSOR = 65_536
REGISTERS_OF_AN_AMD_LANE = 512  # of each of the four vector units
BLOCK_LOADS = BLOCK_BYTES // (16 * THREADS)  # of 16 bytes, by a thread
LOADS = len(KINDS) * BLOCK_LOADS


@dataclass(frozen=True)
class NormCase:
    """One compilation; gradients may have all dtypes in each, `dtype` is the norm's."""

    chip: str
    norm: str
    dtype: str
    rounds: bool
    scale: bool
    nonfinite: str

    @property
    def name(self) -> str:
        """A line's beginning in the table and the snapshot."""
        otherwise = self.nonfinite, self.nonfinite != "scale"
        options = ("rounds", self.rounds), ("scale", self.scale), otherwise
        words = " ".join(f"{name if given else '-':6}" for name, given in options)
        return f"{self.chip:6} norm-{self.norm:3} {self.dtype:5}{words}"


@dataclass
class NormReport:
    """What the machine code of one case uses, and which rules it breaks."""

    case: NormCase | ThresholdCase
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line of the table."""
        verdict = "; ".join(self.faults) if self.faults else "ok"
        return (
            f"{self.case.name} reg {self.registers:<4}spill {self.spills:<4}shared {self.shared:<7}"
            f"ld16 {self.wide_loads:<4}st16 {self.wide_stores:<4}{verdict}"
        )


@dataclass(frozen=True)
class ThresholdCase:
    """One compilation of the kernel that finds a percentile."""

    chip: str
    dtype: str

    @property
    def name(self) -> str:
        """A line's beginning in the table and the snapshot."""
        return f"{self.chip:6} percentile {self.dtype:22}"


def cases(chips: Iterable[str], *, quick: bool = False) -> list[NormCase | ThresholdCase]:
    """Each norm and each way to round it, for each chip; with `quick` the longest kernel of each.

    sm_90 has the others as well then. And the percentile's kernel for each chip.
    """
    chosen: list[NormCase | ThresholdCase] = []
    for chip in chips:
        chosen.append(ThresholdCase(chip, "bf16"))
        chosen.append(NormCase(chip, "2", "bf16", True, True, "zero"))
        if not quick or chip == "sm_90":
            chosen.append(NormCase(chip, "2", "fp32", False, True, "spare"))
            chosen.append(NormCase(chip, "inf", "fp32", True, True, "scale"))
        if not quick:
            chosen.append(NormCase(chip, "1", "fp16", True, True, "scale"))
            chosen.append(NormCase(chip, "inf", "fp16", True, True, "zero"))
            chosen.append(NormCase(chip, "2", "fp32", False, False, "scale"))
    return chosen


def source(case: NormCase) -> ASTSource:
    """The kernel with the signature that its launcher gives it."""
    constants: dict[str, object] = {
        "NORM": case.norm,
        "ROUND_NORMS": case.rounds,
        "SCALE": case.scale,
        "NONFINITE": case.nonfinite,
        "RECORD": case.nonfinite != "zero",
        "BLOCK_BYTES": BLOCK_BYTES,
        "COMBINE_BLOCK": COMBINE_BLOCK,
    }
    signature, attributes = {}, {}
    for index, name in enumerate(gradient_norm_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{case.dtype}")
            if name not in UNALIGNED:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "max_norm" else "i32"
    names = gradient_norm_kernel.arg_names
    compiled_in = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    return ASTSource(
        fn=gradient_norm_kernel, signature=signature, constexprs=compiled_in, attrs=attributes
    )


def _examine_threshold(case: ThresholdCase) -> NormReport:
    """It has one program and no barrier: nothing may be spilled, and no sum be atomic."""
    report = NormReport(case)
    pointers = {"counts_ptr": "*i64", "total_ptr": f"*{case.dtype}"}
    pointers |= {"coefficient_ptr": f"*{case.dtype}"}
    signature, compiled_in = {}, {}
    for index, name in enumerate(threshold_kernel.arg_names):
        if name in ("NONFINITE", "BLOCK"):
            signature[name] = "constexpr"
            compiled_in[(index,)] = "spare" if name == "NONFINITE" else THRESHOLD_BLOCK
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "i32" if name == "capacity" else "fp32"
    chip = CHIPS[case.chip]
    options = threshold_options(chip.warp_size)
    ast = ASTSource(fn=threshold_kernel, signature=signature, constexprs=compiled_in)
    start = time.perf_counter()
    try:
        compiled = triton.compile(ast, target=TARGETS[case.chip], options=options)
    except Exception as error:
        reason = str(error).strip().splitlines()
        report.faults.append(f"does not compile: {type(error).__name__} {reason[-1:]}")
        return report
    report.seconds = time.perf_counter() - start
    report.shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        code = disassemble(compiled.asm["cubin"])
        if code is None:
            report.faults.append("cuobjdump does not report the registers")
            return report
        report.registers, report.spills = code.registers, code.spills
        report.faults += atomics_faults(compiled.asm["ptx"])
    else:
        report.registers, spilled, scratch = amd_usage(compiled.asm["amdgcn"])
        report.spills = spilled + scratch
        report.faults += atomics_faults(compiled.asm["amdgcn"])
    if report.spills:
        report.faults.append("spills")
    return report


def examine(case: NormCase | ThresholdCase) -> NormReport:
    """Compiles one case and applies the rules."""
    if isinstance(case, ThresholdCase):
        return _examine_threshold(case)
    report = NormReport(case)
    chip = CHIPS[case.chip]
    options = launch_options(chip.warp_size, is_nvidia=chip.architecture.startswith("sm_"))
    start = time.perf_counter()
    try:
        compiled = triton.compile(source(case), target=TARGETS[case.chip], options=options)
    except Exception as error:
        reason = str(error).strip().splitlines()
        report.faults.append(f"does not compile: {type(error).__name__} {reason[-1:]}")
        return report
    report.seconds = time.perf_counter() - start
    report.shared = compiled.metadata.shared
    if report.shared * PROGRAMS > chip.shared_memory:
        report.faults.append("shared memory of too few programs")
    if "cubin" in compiled.asm:
        _examine_nvidia(report, compiled.asm)
    else:
        _examine_amd(report, compiled.asm["amdgcn"])
    if report.spills:
        report.faults.append("spills")
    phases = 1 + case.scale
    if report.wide_loads < phases * LOADS:
        report.faults.append("gradients are not loaded 16 bytes at a time")
    if report.wide_stores < case.scale * LOADS:
        report.faults.append("gradients are not stored 16 bytes at a time")
    return report


def _examine_nvidia(report: NormReport, asm: dict[str, Any]) -> None:
    code = disassemble(asm["cubin"])
    if code is None:
        report.faults.append("cuobjdump does not report the registers")
        return
    report.registers, report.spills, sass = code.registers, code.spills, code.sass
    # They are given out to a warp by the 256, that is 8 a thread.
    registers = -(-report.registers // 8) * 8 * THREADS
    if registers * PROGRAMS > REGISTERS_OF_A_MULTIPROCESSOR:
        report.faults.append("registers of too few programs")
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", sass, re.M)
    report.wide_loads = sum(name.startswith("LDG.E.128") for name in instructions)
    report.wide_stores = sum(name.startswith("STG.E.128") for name in instructions)
    arithmetic = re.compile(r"F(?:FMA|MUL|ADD|MNMX)|V?IMNMX")
    order = "".join(
        "L" if name.startswith("LDG.E.128") else "." if arithmetic.match(name) else ""
        for name in instructions
    )
    runs = [len(run) for run in re.findall("L+", order)][: len(KINDS)]
    if runs != [BLOCK_LOADS] * len(KINDS):
        report.faults.append("a block is used before it is loaded as a whole")
    report.faults += barrier_faults(asm["ptx"], sass)
    report.faults += atomics_faults(asm["ptx"])


def _examine_amd(report: NormReport, text: str) -> None:
    report.registers, spilled, scratch = amd_usage(text)
    report.spills = spilled + scratch
    warps = THREADS // CHIPS[report.case.chip].warp_size
    if report.registers * warps * PROGRAMS > 4 * REGISTERS_OF_AN_AMD_LANE:
        report.faults.append("registers of too few programs")
    report.wide_loads = len(re.findall(r"\b(?:global|buffer|flat)_load_dwordx4", text))
    report.wide_stores = len(re.findall(r"\b(?:global|buffer|flat)_store_dwordx4", text))
    report.faults += amd_barrier_faults(text, report.case.chip) + atomics_faults(text)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn_kernels.offline_norm")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chip", action="append", choices=list(TARGETS), help="only this chip")
    parser.add_argument("--quick", action="store_true", help="a representative part")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at the same time (1)")
    parser.add_argument("--snapshot", type=Path, help="write the table to this file")
    parser.add_argument("--check", type=Path, help="fail if the table differs from this file's")
    given = parser.parse_args(arguments)
    chips = given.chip or list(QUICK_CHIPS if given.quick else TARGETS)
    chosen = cases(chips, quick=given.quick)
    names = tuple(case.name for case in chosen)
    return report_all(chosen, examine, given, lambda line: line.startswith(names))


if __name__ == "__main__":
    sys.exit(main())
