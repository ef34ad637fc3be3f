"""What the proof in kernels/README.md, 'The barrier', takes for granted of the PTX.

The proof speaks of ordinary loads that come after an acquire. PTX has loads of which it would not
hold: non-coherent ones (`ld.global.nc`) may return what a cache has kept since before, and those of
the asynchronous proxy (`cp.async.bulk`, tensor copies) need a fence of their own. And a compiler
may move a load. So of every compiled kind:

- no load of the exchange can be reached from the kernel's start, or from an arrival, but through an
  acquire;
- none is non-coherent;
- nothing is copied by the asynchronous proxy;
- between a store to shared memory and a product that reads it by that proxy (Hopper's `wgmma`,
  Blackwell's `tcgen05.mma`) there is a proxy fence.

Limits: text, not semantics: what is computed from the exchange's address is found by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_LABEL = re.compile(r"(\$\w+):")
_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_ACQUIRE = re.compile(r"\b(?:ld|atom)[\w.]*\.acquire\.")
_RELEASE = re.compile(r"\b(?:red|atom)[\w.]*\.release\.")
_GLOBAL_LOAD = re.compile(
    r"\bld\.(?:volatile\.|relaxed\.)?global[\w.]*.*\[\s*(%rd\d+)"
    r"|\bcp\.async[\w.]*\.shared(?:::\w+)?\.global[\w.:]*\s*\[[^\]]*\],\s*\[\s*(%rd\d+)"
)
_COMPUTED = re.compile(
    r"(?:@!?%p\d+\s+)?(?!ld|st|atom|red|cp\.|bra|setp)[a-z][\w.]*\s+(%rd\d+),(.*)"
)
_ASYNC_PRODUCT = re.compile(r"\bwgmma\.mma|\btcgen05\.mma")


def exchange_faults(ptx: str, exchange: int) -> list[str]:
    """What is wrong with how a kernel loads the exchange, its parameter of this number."""
    lines = _code(ptx)
    addresses = _derived(lines, rf"_param_{exchange}\]")
    loads = {
        i
        for i, line in enumerate(lines)
        if (found := _GLOBAL_LOAD.search(line)) and (found[1] or found[2]) in addresses
        if not _ACQUIRE.search(line)
    }
    if not loads:
        return ["no load of the exchange was found"]
    faults = []
    begins = [0, *(i + 1 for i, line in enumerate(lines) if _RELEASE.search(line))]
    if any(loads & set(reached_from(lines, begin, _ACQUIRE)) for begin in begins):
        faults.append("the exchange is loaded before the wait")
    if any(".nc" in lines[i] for i in loads):
        faults.append("the exchange is loaded by the non-coherent path")
    return faults


def proxy_faults(ptx: str) -> list[str]:
    """What is wrong with a kernel's use of the asynchronous proxy."""
    faults = []
    if re.search(r"\bcp\.(?:reduce\.)?async\.bulk", ptx):
        faults.append("the asynchronous proxy copies")
    if _unfenced(_code(ptx)):
        faults.append("no proxy fence between shared memory's stores and a product")
    return faults


def _code(ptx: str) -> list[str]:
    return [line.split("//")[0].strip() for line in ptx.splitlines()]


def reached_from(
    lines: list[str], start: int, stop: re.Pattern[str] | None = None
) -> Iterator[int]:
    """Lines of PTX from one on as control flow comes to them, up to those that match `stop`."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    ahead, seen = [start], set()
    while ahead:
        at = ahead.pop(0)
        while at < len(lines) and at not in seen:
            seen.add(at)
            yield at
            if stop is not None and stop.search(lines[at]):
                break
            if (jump := _JUMP.search(lines[at])) is not None:
                ahead.append(labels[jump[1]])
                if not lines[at].startswith("@"):
                    break
            at += 1


def _derived(lines: list[str], parameter: str) -> set[str]:
    """Registers that hold an address computed from a parameter, by any path."""
    found = {
        line.split()[1].rstrip(",")
        for line in lines
        if line.startswith("ld.param") and re.search(parameter, line)
    }
    computed = [match for line in lines if (match := _COMPUTED.match(line))]
    before = -1
    while before < len(found):
        before = len(found)
        found |= {match[1] for match in computed if found & set(re.findall(r"%rd\d+", match[2]))}
    return found


def _unfenced(lines: list[str]) -> bool:
    """Whether a product may read by the asynchronous proxy what was stored by the other."""
    stored = False
    for line in lines:
        if re.search(r"\bst\.shared|\bstmatrix", line):
            stored = True
        elif "fence.proxy.async" in line:
            stored = False
        elif stored and _ASYNC_PRODUCT.search(line):
            return True
    return False
