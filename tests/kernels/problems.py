"""Small recurrences, what they should give, and how far a kernel may be from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastrnn_kernels import lstm_backward as backward_module
from fastrnn_kernels import lstm_forward as forward_module
from fastrnn_kernels.reference import Rows, reference, rows_of
from fastrnn_kernels.tiling import Tile, ceil_div
from tests.interpreter import POLLS_BEFORE_STUCK, Schedule, cooperative

FORWARD_NAMES = ("h", "h_n", "c_n", "gates", "c")
BACKWARD_NAMES = ("d_gates", "d_h_0", "d_c_0")


@dataclass(frozen=True)
class Problem:
    """One recurrence. `spare` rows follow the valid ones, and hold NaN in every input."""

    rows: Rows
    H: int
    D: int
    dtype: torch.dtype = torch.float32
    spare: int = 3

    @property
    def S(self) -> int:
        return len(self.rows.lengths)

    @property
    def N(self) -> int:
        return self.rows.N + self.spare

    def __str__(self) -> str:
        lengths = "_".join(map(str, self.rows.lengths))
        return f"L{lengths}-T{self.rows.T}-H{self.H}-D{self.D}-{str(self.dtype).split('.')[1]}"

    def _random(self, seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(self.dtype)

    def _random_rows(self, seed: int, *shape: int) -> torch.Tensor:
        values = self._random(seed, self.N, *shape)
        values[self.rows.N :] = float("nan")
        return values

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """gates_x, weight_hh, h_0, c_0."""
        D, S, H = self.D, self.S, self.H
        return (
            self._random_rows(1, D, 4 * H),
            self._random(2, D, 4 * H, H, scale=1.5 / H**0.5),
            self._random(3, D, S, H),
            self._random(4, D, S, H),
        )

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """d_h, d_h_n, d_c_n, d_c."""
        D, S, H = self.D, self.S, self.H
        return (
            self._random_rows(5, D, H),
            self._random(6, D, S, H),
            self._random(7, D, S, H),
            self._random_rows(8, D, H),
        )


@functools.cache
def expected(problem: Problem, dtype: torch.dtype, has_d_c: bool = True) -> dict[str, torch.Tensor]:
    """The reference's outputs and gradients in `dtype`, from inputs in the problem's dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in problem.inputs()]
    outputs = reference(*leaves, problem.rows)
    h, h_n, c_n, _, c = outputs
    d_h, d_h_n, d_c_n, d_c = (g.to(dtype) for g in problem.gradients())
    valid = problem.rows.N
    pairs = [(h[:valid], d_h[:valid]), (h_n, d_h_n), (c_n, d_c_n)]
    if has_d_c:
        pairs.append((c[:valid], d_c[:valid]))
    wanted = [leaves[0], leaves[2], leaves[3]]
    gradients = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])
    values = dict(zip(FORWARD_NAMES, outputs, strict=True))
    values |= dict(zip(BACKWARD_NAMES, gradients, strict=True))
    return {name: value.detach() for name, value in values.items()}


def assert_within_budget(
    name: str, actual: torch.Tensor, problem: Problem, has_d_c: bool = True
) -> None:
    """Error against float64 <= 2 x (error of the reference in the kernel's dtype + a rounding)."""
    exact = expected(problem, torch.float64, has_d_c)[name]
    low = expected(problem, problem.dtype, has_d_c)[name].double()
    assert actual.dtype == problem.dtype
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if name == "gates":  # not read, and not written, beyond the valid rows
        actual, exact, low = (x[: problem.rows.N] for x in (actual, exact, low))
    if not exact.numel():
        return
    rounding = exact.abs().max() * torch.finfo(problem.dtype).eps / 2
    budget = 2 * ((low - exact).abs().max() + rounding)
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"


def run_forward(
    problem: Problem,
    tile: Tile | None,
    schedule: Schedule | None = None,
    save: str = "gates",
    module: ModuleType = forward_module,
    patience: int = POLLS_BEFORE_STUCK,
    **options: Any,
) -> Any:
    """The forward launcher, interpreted."""
    with cooperative(schedule, patience):
        return module.lstm_forward(
            *problem.inputs(),
            problem.rows.batch_sizes,
            problem.rows.offsets,
            save=save,
            tile=tile,
            **options,
        )


def backward_inputs(problem: Problem) -> dict[str, torch.Tensor]:
    """The backward launcher's arguments, with the activations that the float64 reference has."""
    d_h, d_h_n, d_c_n, _ = problem.gradients()
    exact = expected(problem, torch.float64)
    saved = {name: exact[name].to(problem.dtype).clone() for name in ("gates", "c")}
    for rows in saved.values():
        rows[problem.rows.N :] = float("nan")
    _, weight_hh, _, c_0 = problem.inputs()
    return {
        "d_h": d_h,
        "d_h_n": d_h_n,
        "d_c_n": d_c_n,
        **saved,
        "c_0": c_0,
        "weight_hh": weight_hh,
        "batch_sizes": problem.rows.batch_sizes,
        "offsets": problem.rows.offsets,
    }


def run_backward(
    problem: Problem,
    tile: Tile | None,
    schedule: Schedule | None = None,
    has_d_c: bool = True,
    module: ModuleType = backward_module,
    patience: int = POLLS_BEFORE_STUCK,
    **options: Any,
) -> Any:
    """The backward launcher, interpreted."""
    d_c = problem.gradients()[3] if has_d_c else None
    with cooperative(schedule, patience):
        return module.lstm_backward(**backward_inputs(problem), d_c=d_c, tile=tile, **options)


def tile_for(
    problem: Problem,
    residency: str,
    BLOCK_B: int = 4,
    BLOCK_H: int = 8,
    BLOCK_K: int = 8,
    batch_programs: int = 2,
    groups: int = 1,
    in_flight: int = 1,
) -> Tile:
    """A tile far smaller than a GPU's, so that small problems have many programs."""
    if residency == "whole":
        BLOCK_H = BLOCK_K = 1 << max(0, problem.H - 1).bit_length()
    batch_programs = min(batch_programs, ceil_div(problem.S, BLOCK_B))
    unit_programs = ceil_div(problem.H, BLOCK_H)
    return Tile(
        residency,
        BLOCK_B,
        BLOCK_H,
        BLOCK_K,
        unit_programs,
        batch_programs,
        groups=groups,
        in_flight=in_flight,
    )


RAGGED = rows_of(6, 5, 5, 3, 2, 1, 1, 0, 0)
ROWS = {
    "ragged": RAGGED,
    "dense": rows_of(4, 4, 4, 4, 4),
    "one-step": rows_of(1, 1, 1),
    "one-sequence": rows_of(5),
    "zero-lengths": rows_of(2, 1, 0, 0, 0, 0),
    "all-zero": rows_of(0, 0, 0, T=2),
    "spare-steps": rows_of(3, 2, T=5),
    "tile-borders": rows_of(4, 4, 4, 4, 3, 3, 3, 3, 1),
}
TILES: dict[str, dict[str, Any]] = {
    "whole": {"residency": "whole"},
    "whole-one-program": {"residency": "whole", "batch_programs": 1, "BLOCK_B": 2},
    "split": {"residency": "split"},
    "split-groups": {"residency": "split", "groups": 2, "in_flight": 2},
    "split-one-batch-program": {"residency": "split", "BLOCK_B": 2, "batch_programs": 1},
    "split-wide-units": {"residency": "split", "BLOCK_H": 16, "BLOCK_K": 4, "in_flight": 2},
    "streamed": {"residency": "streamed"},
    "streamed-groups": {"residency": "streamed", "groups": 4, "BLOCK_B": 8},
}


def problems_and_tiles() -> list[tuple[str, Problem, Tile]]:
    """What both kernels are tried on: layouts, tiles, hidden sizes, dtypes."""
    found = []

    def add(layout: str, tile: str, H: int, D: int, dtype: torch.dtype = torch.float32) -> None:
        problem = Problem(ROWS[layout], H, D, dtype)
        name = f"{layout}-{tile}-H{H}-D{D}-{str(dtype).split('.')[1]}"
        found.append((name, problem, tile_for(problem, **TILES[tile])))

    for layout in ROWS:
        for tile in ("whole", "split"):
            add(layout, tile, H=13, D=2)
    for tile in TILES:
        add("ragged", tile, H=13, D=1)
    for H in (1, 8, 17):
        for tile in ("whole", "split-groups", "streamed"):
            if H > 8 or tile != "split-groups":
                add("ragged", tile, H=H, D=2)
    for dtype in (torch.bfloat16, torch.float16):
        for tile in ("whole", "split-groups", "streamed"):
            add("ragged", tile, H=13, D=2, dtype=dtype)
    return found
