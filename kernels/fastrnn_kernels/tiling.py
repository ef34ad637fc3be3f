"""How a recurrence is cut into programs: a `Tile`, chosen by an analytical rule.

The rule lists the tiles that fit a chip (shared memory, registers, all programs resident at once),
estimates the cycles of one time step for each, and takes the cheapest. Its constants are published
rates and round guesses; none has been measured by this project, and they only rank tiles. A caller
who has measured something better passes its own `Tile`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .compiler_options import compiler_options

Residency = Literal["whole", "split", "streamed"]
Pass = Literal["forward", "backward"]

# Loops over steps or K blocks are pipelined by hand, or for streamed weights by this many stages of
# shared memory.
STREAM_STAGES = 3
STREAM_STAGE_BYTES = 32_768
# Bytes of the exchange each thread may have under way: 48 of its 255 registers; 64 spill at times.
BYTES_IN_FLIGHT = 192
# Hidden units times rows per thread, in 16 bits: each lives with four gates, the next step's four,
# c and h; 16 spill. Half as many where rows do not begin at multiples of 16 bytes, for each then
# has an address of its own (at times fewer still, see _num_warps); half in float32; and half
# again in tf32x3.
CELLS_PER_THREAD = 8
MOST_WARPS = 8
# With 4 warps ptxas spills a few registers of grouped products for sm_100, and for no other chip.
SM_100_WARPS = 8
# Warps, groups and the most blocks in flight of tiles of (architecture, pass, residency, bytes of
# an element, BLOCK_B, BLOCK_H, BLOCK_K), tf32x3 aside. With what the rule would give them (half the
# warps, but for sm_100) the ptxas of Triton 3.7.1 spills one or two addresses at some H. In this
# order: 424 to 776 and 1000 to 1608 in float16, 2040, 680, 680, 1000 and 1024, 1160, 600.
EXCEPTIONS = {
    ("sm_80", "forward", "split", 2, 64, 16, 64): (8, 4, 3),
    ("sm_80", "forward", "streamed", 2, 64, 16, 64): (8, 1, 6),
    ("sm_80", "forward", "streamed", 2, 16, 64, 64): (8, 1, 12),
    ("sm_90", "backward", "split", 2, 32, 32, 64): (8, 4, 6),
    ("sm_90", "forward", "split", 2, 32, 16, 128): (8, 8, 3),
    ("sm_90", "forward", "split", 4, 16, 16, 64): (8, 4, 6),
    ("sm_100", "backward", "split", 2, 16, 16, 128): (8, 8, 9),
    ("sm_100", "backward", "split", 2, 32, 16, 128): (8, 8, 4),
}
# Cells of a program whose product is made in groups: each group has its own accumulators. 1024
# spill.
GROUP_CELLS = 512
# Hidden units up to which tf32x3 keeps W_hh on chip, forward: the two parts of more blocks spill,
# and backward of any.
SPLIT_TF32X3 = 128
# Columns of Blackwell's tensor memory. A product of 64 rows has its result there, in half as many
# columns as it has itself; each product that is written out in the code has its own.
TENSOR_MEMORY = 512
# All that a thread can address. Left alone, ptxas at times stops at 128 and spills a few.
REGISTERS = 255
# What the compiler needs besides the buffers counted here: reductions, the barrier's broadcast,
# alignment.
SHARED_MEMORY_SLACK = 4096

# The model's rates, per multiprocessor and cycle. Not measured.
EXCHANGE_BYTES = 64  # from L2
SHARED_BYTES = 128
MATRIX_FMA = {"mma": 1024, "wgmma": 2048}  # 16-bit; tf32 is half of it
MATRIX_LATENCY = 33  # cycles from one mma to the next that adds to its result
BARRIER_CYCLES = 2000  # store, release, acquire, first load
CELL_CYCLES = 60  # instructions per cell, divided over 128 lanes


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple that is not below a."""
    return ceil_div(a, multiple) * multiple


@dataclass(frozen=True)
class Chip:
    """What a tile must fit.

    Attributes:
        architecture: "sm_90", "gfx942", ...
        multiprocessors: how many programs are sure to be resident at the same time.
        shared_memory: bytes that one program can have.
        warp_size: threads of a warp.
    """

    architecture: str
    multiprocessors: int
    shared_memory: int
    warp_size: int = 32

    @property
    def generation(self) -> str:
        """The architecture whose tiles these are: of chips alike but for their sizes the first."""
        alike = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}
        return alike.get(self.architecture, self.architecture)

    @property
    def wgmma(self) -> bool:
        """Whether products of 64 rows and more go to Hopper's warpgroup instruction."""
        return self.architecture == "sm_90"

    @property
    def tensor_memory(self) -> int | None:
        """Columns of tensor memory, where products of 64 rows and more have their results there."""
        return TENSOR_MEMORY if self.generation == "sm_100" else None

    @staticmethod
    def of(device: torch.device) -> Chip:
        """The chip behind a torch device; for a CPU, where kernels are interpreted, an H100."""
        if device.type != "cuda":
            return CHIPS["sm_90"]
        index = torch.cuda.current_device() if device.index is None else device.index
        chip = _chip_of_gpu(index)
        if _most_multiprocessors is None or chip.multiprocessors <= _most_multiprocessors:
            return chip
        return replace(chip, multiprocessors=_most_multiprocessors)


# What the offline gate compiles for, and so where kernels may run. A GPU may have fewer
# multiprocessors than the one of its architecture that is named here: large layers have no tile
# there.
CHIPS = {
    "sm_80": Chip("sm_80", multiprocessors=108, shared_memory=166_912),  # A100
    "sm_86": Chip("sm_86", multiprocessors=82, shared_memory=101_376),  # RTX 3090
    "sm_89": Chip("sm_89", multiprocessors=128, shared_memory=101_376),  # RTX 4090
    "sm_90": Chip("sm_90", multiprocessors=132, shared_memory=232_448),  # H100
    "sm_100": Chip("sm_100", multiprocessors=148, shared_memory=232_448),  # B200
    "sm_103": Chip("sm_103", multiprocessors=148, shared_memory=232_448),  # B300
    "sm_120": Chip("sm_120", multiprocessors=170, shared_memory=101_376),  # RTX 5090
    "sm_121": Chip("sm_121", multiprocessors=48, shared_memory=101_376),  # GB10
    "gfx90a": Chip("gfx90a", multiprocessors=104, shared_memory=65_536, warp_size=64),  # MI210
    "gfx942": Chip("gfx942", multiprocessors=304, shared_memory=65_536, warp_size=64),  # MI300X
}


_most_multiprocessors: int | None = None


def limit_multiprocessors(n: int | None) -> None:
    """Lets a launch take at most n multiprocessors of a GPU; None: all that the driver reports.

    Raises:
        ValueError: n is not positive.
    """
    global _most_multiprocessors
    if n is not None and n < 1:
        raise ValueError(f"n must be a positive number of multiprocessors or None, got {n}")
    _most_multiprocessors = n


def architecture_of(index: int | None) -> str:
    """The architecture of a GPU, the current one by default, as CHIPS names it."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _chip_of_gpu(index: int) -> Chip:
    properties, architecture = torch.cuda.get_device_properties(index), architecture_of(index)
    if torch.version.hip is not None:
        shared_memory, warp_size = properties.shared_memory_per_block, properties.warp_size
        return Chip(architecture, properties.multi_processor_count, shared_memory, warp_size)
    shared_memory = properties.shared_memory_per_block_optin
    return Chip(architecture, properties.multi_processor_count, shared_memory)


@dataclass(frozen=True)
class Tile:
    """How one launch is cut. Letters as in the kernels.

    Attributes:
        residency: where W_hh is during the loop over steps. "whole": in one program, which then
            needs no barrier; "split": each program has its slice on chip; "streamed": read from L2
            at each step.
        BLOCK_B: sequences of a batch tile.
        BLOCK_H: hidden units of a program.
        BLOCK_K: columns of the exchange loaded, and multiplied, at a time.
        unit_programs: programs that share a batch tile, ceil(H / BLOCK_H).
        batch_programs: batch tiles under way at the same time; each is followed by the one
            `batch_programs` later.
        num_warps: warps of a program.
        groups: parts of K multiplied apart, each by its own warp; 1 for none (see
            primitives.grouped_range).
        in_flight: blocks of the exchange requested before the first is multiplied.
        max_registers: the compiler's limit per thread; None for AMD's, which has no such option.
    """

    residency: Residency
    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    unit_programs: int
    batch_programs: int
    num_warps: int = 4
    groups: int = 1
    in_flight: int = 1
    max_registers: int | None = REGISTERS

    def check(self, S: int, H: int) -> None:
        """Raises ValueError unless this tile covers a recurrence of S sequences and H units."""
        if self.unit_programs != ceil_div(H, self.BLOCK_H):
            raise ValueError(
                f"tile.unit_programs must be {ceil_div(H, self.BLOCK_H)} "
                f"(H {H} / BLOCK_H {self.BLOCK_H}), got {self.unit_programs}"
            )
        if (
            self.residency == "whole"
            and not self.unit_programs == 1 <= self.BLOCK_H == self.BLOCK_K
        ):
            raise ValueError(
                f"residency 'whole' needs BLOCK_K = BLOCK_H >= H, got {self} for H {H}"
            )
        if self.BLOCK_K % self.groups:
            raise ValueError(f"tile.BLOCK_K must be a multiple of groups, got {self}")
        if not 1 <= self.batch_programs <= ceil_div(S, self.BLOCK_B):
            raise ValueError(
                f"tile.batch_programs must be between 1 and the batch tiles, got {self}"
            )
        if not 1 <= self.in_flight <= self.padded(H) // self.BLOCK_K:
            raise ValueError(f"tile.in_flight must be between 1 and H / BLOCK_K, got {self}")

    def padded(self, H: int) -> int:
        """Units in the exchange: whole blocks as they are written (BLOCK_H) and read (BLOCK_K)."""
        return round_up(H, max(self.BLOCK_H, self.BLOCK_K))

    def grid(self, D: int) -> tuple[int, int, int]:
        """The launch grid: unit programs, batch programs, directions."""
        return self.unit_programs, self.batch_programs, D

    def constants(self) -> dict[str, object]:
        """What the kernels' launch takes from a tile."""
        return {
            "RESIDENCY": self.residency,
            "BLOCK_B": self.BLOCK_B,
            "BLOCK_H": self.BLOCK_H,
            "BLOCK_K": self.BLOCK_K,
            "GROUPS": self.groups,
            "IN_FLIGHT": self.in_flight,
            "STAGES": STREAM_STAGES,
            **self.options(),
        }

    def options(self) -> dict[str, object]:
        """The compiler's options.

        Without a cooperative launch a grid that does not fit would start in part, and that part
        would wait for ever for the rest; with it, the launch fails. num_stages is 1 because the
        loop over steps must not be pipelined: its loads may not move up past the barrier.
        """
        return compiler_options(
            self.num_warps,
            num_stages=1,
            cooperative=self.residency != "whole",
            max_registers=self.max_registers,
        )


def forward_tile(
    S: int, H: int, D: int, dtype: torch.dtype, chip: Chip, input_precision: str = "tf32x3"
) -> Tile:
    """The tile for a forward pass over S sequences, H units, D directions."""
    return _choose("forward", S, H, D, dtype.itemsize, chip, parts_of(dtype, input_precision))


def backward_tile(
    S: int, H: int, D: int, dtype: torch.dtype, chip: Chip, input_precision: str = "tf32x3"
) -> Tile:
    """The tile for a backward pass over S sequences, H units, D directions."""
    return _choose("backward", S, H, D, dtype.itemsize, chip, parts_of(dtype, input_precision))


def parts_of(dtype: torch.dtype, input_precision: str) -> int:
    """Copies of an operand that a product keeps: tf32x3 splits it into a large and a small part."""
    return 2 if dtype == torch.float32 and input_precision == "tf32x3" else 1


@functools.cache
def _choose(which: Pass, S: int, H: int, D: int, itemsize: int, chip: Chip, parts: int = 1) -> Tile:
    tiles = fitting_tiles(which, S, H, D, itemsize, chip, parts)
    return min(tiles, key=lambda tile: step_cycles(tile, which, S, H, itemsize, chip, parts))


def fitting_tiles(
    which: Pass, S: int, H: int, D: int, itemsize: int, chip: Chip, parts: int = 1
) -> list[Tile]:
    """The tiles to choose from. Where none fits within the registers, some that may spill.

    Raises:
        ValueError: none fits this chip at all.
    """
    for crowding in (1, 2, 4):
        tiles = list(candidates(which, S, H, D, itemsize, chip, parts, crowding))
        if tiles:
            return tiles
    raise ValueError(
        f"no tile fits {which} H {H}, {D} directions on {chip.architecture}: "
        f"at most {chip.multiprocessors} programs are resident; use the reference backend"
    )


def with_batch_programs(tile: Tile, S: int, D: int, chip: Chip) -> Tile:
    """The tile with as many batch tiles under way as fit, for another number of sequences."""
    return replace(
        tile, batch_programs=_batch_programs(S, tile.BLOCK_B, tile.unit_programs, D, chip)
    )


def _batch_programs(S: int, BLOCK_B: int, unit_programs: int, D: int, chip: Chip) -> int:
    return min(ceil_div(S, BLOCK_B), max(1, chip.multiprocessors // (unit_programs * D)))


def candidates(
    which: Pass,
    S: int,
    H: int,
    D: int,
    itemsize: int,
    chip: Chip,
    parts: int = 1,
    crowding: int = 1,
) -> Iterator[Tile]:
    """Every tile that fits, with `crowding` times the cells per thread that never spill."""
    for BLOCK_H in (16, 32, 64, 128):
        unit_programs = ceil_div(H, BLOCK_H)
        if unit_programs * D > chip.multiprocessors or 2 * max(H, 16) <= BLOCK_H:
            continue
        for BLOCK_B in (16, 32, 64):
            batch_programs = _batch_programs(S, BLOCK_B, unit_programs, D, chip)
            num_warps = _num_warps(which, BLOCK_B, BLOCK_H, H, itemsize, chip, parts, crowding)
            if unit_programs > 1 and chip.generation == "sm_100":
                num_warps = max(num_warps, SM_100_WARPS)
            if unit_programs > 1 and which == "backward" and chip.generation == "sm_120":
                # With half as many ptxas spills one to five addresses in 16 bits; of 64 rows in
                # every dtype, and with twice as many too.
                num_warps *= 4 if BLOCK_B >= 64 else 4 // itemsize
            if num_warps > MOST_WARPS:
                continue
            # On gfx942 its eight warps would each have all 32 rows, and spill 740 registers.
            amd = chip.warp_size == 64
            if amd and which == "backward" and num_warps > 4 and BLOCK_B < 64:
                continue
            shape = (BLOCK_B, BLOCK_H, unit_programs, batch_programs, num_warps)
            tile = _resident(which, H, itemsize, chip, parts, *shape)
            if tile is None or (parts > 1 and (H > SPLIT_TF32X3 or which == "backward")):
                tile = _cut_k("streamed", which, H, itemsize, chip, parts, *shape)
            if chip.architecture.startswith("gfx"):
                tile = replace(tile, max_registers=None)
            if shared_memory(tile, which, H, itemsize, parts) <= chip.shared_memory:
                yield tile


def _num_warps(
    which: Pass,
    BLOCK_B: int,
    BLOCK_H: int,
    H: int,
    itemsize: int,
    chip: Chip,
    parts: int,
    crowding: int,
) -> int:
    """Warps enough that no thread has more cells than its registers hold."""
    cells_per_thread = crowding * CELLS_PER_THREAD * 2 // itemsize // parts
    if H * itemsize % 16:
        cells_per_thread //= 2
        if BLOCK_H < H:  # the exchange has addresses as well, and backward of four times the width
            cells_per_thread //= 2 if which == "backward" and BLOCK_B > 16 else 1
            cells_per_thread //= 2 if H * itemsize % 4 else 1
    num_warps = max(4, BLOCK_B * BLOCK_H // (max(1, cells_per_thread) * chip.warp_size))
    needy = H * itemsize % 16 or (which == "backward" and itemsize == 4)
    if num_warps > 4 and needy and chip.warp_size == 64:
        num_warps *= 2  # AMD's threads have 512 registers in 4 warps, and 256 in 8
    return num_warps


def _resident(
    which: Pass,
    H: int,
    itemsize: int,
    chip: Chip,
    parts: int,
    BLOCK_B: int,
    BLOCK_H: int,
    unit_programs: int,
    batch_programs: int,
    num_warps: int,
) -> Tile | None:
    if unit_programs == 1:
        tile = Tile("whole", BLOCK_B, BLOCK_H, BLOCK_H, 1, batch_programs, num_warps)
    else:
        shape = (BLOCK_B, BLOCK_H, unit_programs, batch_programs, num_warps)
        tile = _cut_k("split", which, H, itemsize, chip, parts, *shape)
    fits = shared_memory(tile, which, H, itemsize, parts) <= chip.shared_memory
    if chip.tensor_memory is not None and tensor_memory(tile, which, H) > chip.tensor_memory:
        fits = False
    return tile if fits else None


def _cut_k(
    residency: Residency,
    which: Pass,
    H: int,
    itemsize: int,
    chip: Chip,
    parts: int,
    BLOCK_B: int,
    BLOCK_H: int,
    unit_programs: int,
    batch_programs: int,
    num_warps: int,
) -> Tile:
    # 256 bytes of a row at a time, or 128: for 64 rows, or where that leaves less of the last block
    # empty and still gives each warp a group, but not backward with 64 resident units, where more
    # and smaller blocks spill two addresses on sm_90.
    BLOCK_K = 256 // itemsize
    emptier = round_up(H, BLOCK_K) > max(1.125 * H, round_up(H, BLOCK_K // 2))
    if residency == "split" and which == "backward" and BLOCK_H >= 64:
        emptier = False
    if BLOCK_B >= 64 or (emptier and 16 * num_warps <= BLOCK_K // 2):
        BLOCK_K //= 2
    if residency == "streamed":
        stage = BLOCK_K * columns(which, BLOCK_H) * itemsize
        while stage > min(STREAM_STAGE_BYTES, chip.shared_memory // 8) and BLOCK_K > 16:
            BLOCK_K, stage = BLOCK_K // 2, stage // 2
    # 16 bytes for each thread, unless the stages of streamed weights would not fit then.
    widest = chip.shared_memory // (STREAM_STAGES + 1) // (columns(which, BLOCK_H) * itemsize)
    while BLOCK_B * BLOCK_K * itemsize < 16 * num_warps * chip.warp_size:
        if residency == "streamed" and widest < 2 * BLOCK_K:
            break
        BLOCK_K *= 2
    crowded = BLOCK_B * BLOCK_H * itemsize // 2 > GROUP_CELLS or (
        which == "backward" and BLOCK_H > 16
    )
    grouped = not crowded and BLOCK_B < 64
    if residency == "split" and grouped and parts > 1 and BLOCK_K < H <= 2 * BLOCK_K:
        BLOCK_K *= 2  # all of W_hh in one block: the parts of two spill at H 72
    if residency == "split" and grouped and which == "backward":
        BLOCK_K = max(BLOCK_K, 16 * num_warps)  # a group for each warp: sm_100 spills at H 512
    block_bytes = BLOCK_B * BLOCK_K * itemsize * parts
    in_flight = BYTES_IN_FLIGHT * num_warps * chip.warp_size // block_bytes
    # tl.dot takes 16 of K at least. From 64 rows up the warps share the rows.
    groups = min(num_warps, BLOCK_K // 16) if grouped else 1
    kind = (chip.generation, which, residency, itemsize, BLOCK_B, BLOCK_H, BLOCK_K)
    if parts == 1 and kind in EXCEPTIONS:
        num_warps, groups, in_flight = EXCEPTIONS[kind]
    in_flight = max(1, min(in_flight, round_up(H, max(BLOCK_H, BLOCK_K)) // BLOCK_K))
    return Tile(
        residency,
        BLOCK_B,
        BLOCK_H,
        BLOCK_K,
        unit_programs,
        batch_programs,
        num_warps,
        groups,
        in_flight,
    )


def columns(which: Pass, BLOCK_H: int) -> int:
    """Columns of a program's product: four gates of each unit, or one hidden state."""
    return 4 * BLOCK_H if which == "forward" else BLOCK_H


def reduction(tile: Tile, which: Pass, H: int) -> int:
    """K, padded to whole blocks: H units, or four gates of H units."""
    return tile.padded(H) * (1 if which == "forward" else 4)


def shared_memory(tile: Tile, which: Pass, H: int, itemsize: int, parts: int = 1) -> int:
    """Bytes of shared memory a program needs: an upper bound, which the offline gate checks."""
    n = columns(which, tile.BLOCK_H)
    if tile.residency != "streamed":  # there the parts are made from registers
        itemsize *= parts
    weight = reduction(tile, which, H) * n * itemsize
    result = 4 * tile.groups * tile.BLOCK_B * n
    if 1 < tile.groups <= 4:
        result //= 2  # groups are added by halves; eight take all of it at times
    block = tile.BLOCK_B * tile.BLOCK_K * itemsize
    if tile.residency == "whole":
        operands = (1 if which == "forward" else 4) * block
        return weight + operands + result + SHARED_MEMORY_SLACK
    if tile.residency == "split":
        return weight + max((tile.in_flight + 1) * block, result) + SHARED_MEMORY_SLACK
    stages = STREAM_STAGES * (block + tile.BLOCK_K * n * itemsize)
    return max(stages, result) + SHARED_MEMORY_SLACK


def tensor_memory(tile: Tile, which: Pass, H: int) -> int:
    """Columns of Blackwell's tensor memory: an upper bound, which the offline gate checks."""
    if tile.BLOCK_B < 64:
        return 0
    n = columns(which, tile.BLOCK_H)
    if tile.residency != "streamed":
        n = reduction(tile, which, H) // tile.BLOCK_K * n // 2
    return max(32, 1 << (n - 1).bit_length())  # a power of two, and 32 at least


def step_cycles(
    tile: Tile, which: Pass, S: int, H: int, itemsize: int, chip: Chip, parts: int = 1
) -> float:
    """The model: cycles of one time step with all sequences active."""
    n, k = columns(which, tile.BLOCK_H), reduction(tile, which, H)
    wgmma = chip.wgmma and tile.BLOCK_B >= 64
    fma = MATRIX_FMA["wgmma" if wgmma else "mma"] * 2 / itemsize / (2 * parts - 1)
    product = tile.BLOCK_B * n * k / fma
    product = max(product, k * itemsize / 32 / tile.groups * (8 if wgmma else MATRIX_LATENCY))
    # W and, but for narrow mma products, the other operand come from shared memory at each step.
    product = max(product, (n + tile.BLOCK_B) * k * itemsize / SHARED_BYTES)
    cells = CELL_CYCLES * tile.BLOCK_B * tile.BLOCK_H / 128
    cycles = product + cells
    if tile.residency != "whole":
        cycles += BARRIER_CYCLES + tile.BLOCK_B * k * itemsize / EXCHANGE_BYTES
    if tile.residency == "streamed":
        cycles += n * k * itemsize / EXCHANGE_BYTES
    return cycles * ceil_div(ceil_div(S, tile.BLOCK_B), tile.batch_programs)
