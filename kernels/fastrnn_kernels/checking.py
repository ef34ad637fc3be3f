"""A kernel against the reference, on the GPU at hand: one small ragged problem for each variant.

What must hold is the budget of the tests: the error against float64 is at most twice the error of
plain PyTorch in the kernel's precision and one rounding. And a second launch gives the same bits.

Limits: one problem of five steps finds what is wrong on this chip with this compiler; what is wrong
with the kernel's mathematics, or depends on an order of programs, is for the tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch

from .reference import Rows, reference, reference_layout, reference_previous
from .tiling import Chip, Tile, with_batch_programs

STEPS = 5
# One rounding of a float32 product, of the largest value. tf32x3 leaves out the product of the two
# small parts, and is not as exact as float32 in every sum.
ROUNDING = {"tf32": 2.0**-11, "tf32x3": 5e-6, "ieee": 5e-6}
SPARE_ROWS = 3  # beyond the valid ones: NaN going in, zero coming out

Save = Literal["gates", "cells", "nothing"]
Tensors = dict[str, torch.Tensor]


class _Tf32Product(torch.autograd.Function):
    """A product whose operands have TF32's 10 bits, forward and backward, by cutting the rest off.

    Some tensor cores cut off and some compilers round; the budget has room for either.
    """

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """H W."""
        weight = _cut(weight)
        ctx.save_for_backward(weight)
        return _cut(h) @ weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Of h alone: that of W is not made here."""
        (weight,) = ctx.saved_tensors
        return _cut(grads[0]) @ weight.T, None


def _cut(values: torch.Tensor) -> torch.Tensor:
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Recurrence(NamedTuple):
    """A small problem.

    Attributes:
        rows: ragged, over two batch tiles.
        gates_x: [N, D, 4H].
        weight_hh: [D, 4H, H].
        h_0: [D, S, H].
        c_0: [D, S, H].
        d_h: [N, D, H].
        d_h_n: [D, S, H].
        d_c_n: [D, S, H].
        d_c: [N, D, H].
    """

    rows: Rows
    gates_x: torch.Tensor
    weight_hh: torch.Tensor
    h_0: torch.Tensor
    c_0: torch.Tensor
    d_h: torch.Tensor
    d_h_n: torch.Tensor
    d_c_n: torch.Tensor
    d_c: torch.Tensor

    @staticmethod
    def make(tile: Tile, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Recurrence:
        """One that fills a batch tile and begins another."""
        rows = _ragged(tile.BLOCK_B + 3)
        S, N = len(rows.lengths), rows.N + SPARE_ROWS
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return (values * scale).to(dtype)

        def draw_rows(width: int) -> torch.Tensor:
            values = draw(N, D, width)
            values[rows.N :] = math.nan
            return values

        states = [draw(D, S, H) for _ in range(4)]
        weight_hh = draw(D, 4 * H, H, scale=1.5 / math.sqrt(H))
        gates_x, d_h, d_c = draw_rows(4 * H), draw_rows(H), draw_rows(H)
        return Recurrence(rows, gates_x, weight_hh, *states[:2], d_h, *states[2:], d_c)

    def expected(
        self, dtype: torch.dtype, input_precision: str, *, backward: bool, has_d_c: bool = True
    ) -> Tensors:
        """The reference's results, computed in `dtype`."""
        inputs = (self.gates_x, self.weight_hh, self.h_0, self.c_0)
        leaves = [x.to(dtype).requires_grad_(backward) for x in inputs]
        tf32 = dtype == torch.float32 and input_precision == "tf32"
        product = _Tf32Product.apply if tf32 else torch.matmul
        outputs = reference(*leaves, self.rows, product)
        found = dict(zip(("h", "h_n", "c_n", "gates", "c"), outputs, strict=True))
        if backward:
            valid, given = self.rows.N, (self.d_h, self.d_h_n, self.d_c_n, self.d_c)
            d_h, d_h_n, d_c_n, d_c = (gradient.to(dtype) for gradient in given)
            h, c = found["h"][:valid], found["c"][:valid]
            pairs = [(h, d_h[:valid]), (found["h_n"], d_h_n), (found["c_n"], d_c_n)]
            if has_d_c:
                pairs.append((c, d_c[:valid]))
            wanted = (leaves[0], leaves[2], leaves[3])
            gradients = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])
            found |= dict(zip(("d_gates", "d_h_0", "d_c_0"), gradients, strict=True))
        return {name: values.detach() for name, values in found.items()}


def check_forward(
    tile: Tile,
    H: int,
    D: int,
    dtype: torch.dtype,
    input_precision: str,
    save: Save,
    device: torch.device,
) -> str | None:
    """What is wrong with a forward launch cut by this tile; None where nothing is.

    Raises:
        CannotLaunch: it is refused.
    """
    from .lstm_forward import lstm_forward

    problem = Recurrence.make(tile, H, D, dtype, device)
    tile = with_batch_programs(tile, len(problem.rows.lengths), D, Chip.of(device))
    inputs = (problem.gates_x, problem.weight_hh, problem.h_0, problem.c_0, *_steps(problem))

    def launch() -> Tensors:
        found = lstm_forward(*inputs, save=save, input_precision=input_precision, tile=tile)
        kept = {name: values for name, values in found._asdict().items() if values is not None}
        if "gates" in kept:  # undefined beyond the valid rows
            kept["gates"] = kept["gates"][: problem.rows.N]
        return kept

    with _ieee_products():
        exact = problem.expected(torch.float64, "ieee", backward=False)
        low = problem.expected(dtype, input_precision, backward=False)
    for values in (exact, low):
        values["gates"] = values["gates"][: problem.rows.N]
    return _compare(launch(), launch(), exact, low, _rounding(dtype, input_precision))


def check_backward(
    tile: Tile,
    H: int,
    D: int,
    dtype: torch.dtype,
    input_precision: str,
    has_d_c: bool,
    device: torch.device,
) -> str | None:
    """What is wrong with a backward launch; see :func:`check_forward`."""
    from .lstm_backward import lstm_backward

    problem = Recurrence.make(tile, H, D, dtype, device)
    tile = with_batch_programs(tile, len(problem.rows.lengths), D, Chip.of(device))
    with _ieee_products():
        exact = problem.expected(torch.float64, "ieee", backward=True, has_d_c=has_d_c)
        low = problem.expected(dtype, input_precision, backward=True, has_d_c=has_d_c)
    batch_sizes, offsets = _steps(problem)

    def launch() -> Tensors:
        return lstm_backward(
            d_h=problem.d_h,
            d_h_n=problem.d_h_n,
            d_c_n=problem.d_c_n,
            gates=exact["gates"].to(dtype),
            c=exact["c"].to(dtype),
            c_0=problem.c_0,
            weight_hh=problem.weight_hh,
            batch_sizes=batch_sizes,
            offsets=offsets,
            d_c=problem.d_c if has_d_c else None,
            input_precision=input_precision,
            tile=tile,
        )._asdict()

    return _compare(launch(), launch(), exact, low, _rounding(dtype, input_precision))


def check_norm(
    norm_type: float, dtypes: tuple[torch.dtype, ...], options: dict[str, Any], device: torch.device
) -> str | None:
    """What is wrong with the gradients' kernel; None where nothing is.

    Args:
        norm_type: the order of the norm.
        dtypes: of the gradients.
        options: of `gradient_norm.clip_gradients`; "record" for a ring of its own.
        device: of the gradients.

    Raises:
        CannotLaunch: it is refused.
    """
    from .gradient_norm import Ring, clip_gradients
    from .gradient_table import PROGRAMS_PER_MULTIPROCESSOR

    programs = Chip.of(device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    generator = torch.Generator(device).manual_seed(0)
    grads = [
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in (1, 63, 40_000)
        for dtype in dtypes
    ]
    exact_norms = torch.stack([grad.double().norm(norm_type) for grad in grads])
    exact: Tensors = {"total_norm": exact_norms.norm(norm_type)}
    max_norm = exact["total_norm"].item() / 2
    exact["coefficient"] = torch.full_like(exact["total_norm"], 0.5)
    scaled = [grad.double() * (0.5 if options.get("scale", True) else 1.0) for grad in grads]
    exact |= {f"gradient {i}": values for i, values in enumerate(scaled)}

    record = options.get("record", False)
    options = {name: value for name, value in options.items() if name != "record"}
    if record:  # the second row of two, by what its four steps before were
        values = exact["total_norm"], exact["total_norm"] / 2, exact["coefficient"]
        exact |= _recorded(
            torch.stack((torch.zeros_like(values[0]).expand(3), torch.stack(values)))
        )
        exact["counts"] = torch.tensor([4.0, 1.0, 0.0], device=device, dtype=torch.float64)
    places = [torch.empty_like(grad) for grad in grads]  # the order of a sum hangs on alignment

    def launch() -> Tensors:
        for place, grad in zip(places, grads, strict=True):
            place.copy_(grad)
        ring = None
        if record:
            ring = Ring(torch.zeros(2, 3, device=device), torch.tensor([3, 1, 1], device=device))
        found = clip_gradients(places, max_norm, norm_type, programs=programs, ring=ring, **options)
        kept = {"total_norm": found.total_norm, "coefficient": found.coefficient}
        if ring is not None:
            kept |= {**_recorded(ring.rows), "counts": ring.counts}
        return kept | {f"gradient {i}": values.clone() for i, values in enumerate(places)}

    first, second = launch(), launch()
    # Sums of thousands of float32; and torch rounds norms to 16 bits, so that all else is off.
    relative = 8 * torch.finfo(torch.float32).eps
    if options.get("norm_dtype") is None:
        relative = max(relative, *(torch.finfo(dtype).eps for dtype in dtypes))
    low = {name: values * (1 + relative) for name, values in exact.items()}
    return _compare(first, second, exact, low, max(torch.finfo(dtype).eps / 2 for dtype in dtypes))


def check_threshold(norm_dtype: torch.dtype, nonfinite: str, device: torch.device) -> str | None:
    """What is wrong with the kernel of a clip's threshold; None where nothing is.

    Args:
        norm_dtype: of the present norm.
        nonfinite: what one that is not finite does: "scale", "zero" or "spare".
        device: of the norms.

    Raises:
        CannotLaunch: it is refused.
    """
    from .gradient_norm import Ring
    from .gradient_threshold import BLOCK, settle

    capacity = (
        BLOCK + 101
    )  # a full ring of an odd number of finite norms: the median is between two
    generator = torch.Generator(device).manual_seed(0)
    norms = torch.randn(capacity, generator=generator, device=device).abs()
    norms[3], norms[BLOCK + 5] = math.nan, math.inf
    counts = torch.tensor([capacity + 7, 2, 1], device=device)
    finite = norms[norms.isfinite()]
    total = finite.max().to(norm_dtype)
    threshold = torch.cat((finite, total.float().view(1))).double().quantile(0.5)
    coefficient = threshold / (total.double() + 1e-6)
    exact = {"threshold": threshold, "coefficient": coefficient, "inverse": 1 / coefficient}
    exact |= _recorded(torch.stack((total.double(), threshold, coefficient)).view(1, 3))
    exact["counts"] = (counts + torch.tensor([1, 0, -1], device=device)).double()
    low = dict(exact)
    for name in ("coefficient", "inverse", "recorded coefficient"):  # rounded at three steps
        low[name] = exact[name] * (1 + 2 * torch.finfo(norm_dtype).eps)

    def launch() -> Tensors:
        ring = Ring(norms.unsqueeze(1).expand(-1, 3).contiguous(), counts.clone())
        found = settle(
            *(total, ring, 50.0, 1e30),
            zero_nonfinite=nonfinite == "zero",
            spare_nonfinite=nonfinite == "spare",
            trusted=True,
        )
        return {**found._asdict(), **_recorded(ring.rows[7:8]), "counts": ring.counts}

    return _compare(launch(), launch(), exact, low, 4 * torch.finfo(torch.float32).eps)


def check_layout(
    has_lengths: bool, has_mask: bool, has_resets: bool, time_major: bool, device: torch.device
) -> str | None:
    """What is wrong with the kernels of a layout; None where nothing is.

    Args:
        has_lengths: whether there are lengths.
        has_mask: whether there is a mask.
        has_resets: whether there are resets.
        time_major: the order of the input.
        device: of all of them.

    Raises:
        CannotLaunch: one is refused.
    """
    from .bounded_layout import BLOCK, bounded_layout

    B, T = 3, BLOCK + 30
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([T - 7, 0, T])
    mask = torch.rand(B, T, generator=generator) < 0.8
    resets = torch.rand(B, T, generator=generator) < 0.1
    resets[0, 0], resets[2] = True, False  # no h_0; a segment longer than a block
    valid = torch.arange(T) < lengths.unsqueeze(1) if has_lengths else torch.ones(B, T).bool()
    valid = valid & mask if has_mask else valid
    flags = resets.tolist() if has_resets else None
    exact = reference_layout(valid.tolist(), flags, time_major=time_major)
    given = [
        values.to(device) if has else None
        for values, has in ((lengths, has_lengths), (mask, has_mask), (resets, has_resets))
    ]

    def launch() -> Tensors:
        found = bounded_layout(B, T, *given, time_major=time_major, device=device, trusted=True)
        return {name: values for name, values in found._asdict().items() if values is not None}

    exact = {name: values.double().to(device) for name, values in exact.items()}
    return _compare(launch(), launch(), exact, exact, 0.0)


def check_previous(H: int, D: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernel of the previous states; None where nothing is.

    Args:
        H: hidden units.
        D: directions.
        dtype: of the states.
        device: of the states.

    Raises:
        CannotLaunch: it is refused.
    """
    from .previous_states import BLOCK_N, previous_states

    rows = _ragged(BLOCK_N + 3)
    generator = torch.Generator(device).manual_seed(0)
    h, h_0 = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((rows.N + SPARE_ROWS, D, H), (D, len(rows.lengths), H))
    )
    h[rows.N :] = math.nan
    steps = rows.batch_sizes.to(device), rows.offsets.to(device)
    exact = {"previous": reference_previous(h, h_0, rows).double()}
    first, second = ({"previous": previous_states(h, h_0, *steps, trusted=True)} for _ in range(2))
    return _compare(first, second, exact, exact, 0.0)


def _ragged(S: int) -> Rows:
    """S sequences of 0 to STEPS steps."""
    return Rows(tuple(STEPS - (STEPS + 1) * s // S for s in range(S)), STEPS)


def _recorded(rows: torch.Tensor) -> Tensors:
    """The columns of a ring, each to be held against its own size."""
    names = "recorded norm", "recorded threshold", "recorded coefficient"
    return dict(zip(names, rows.unbind(1), strict=True))


def _steps(problem: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
    device = problem.c_0.device
    return problem.rows.batch_sizes.to(device), problem.rows.offsets.to(device)


def _rounding(dtype: torch.dtype, input_precision: str) -> float:
    return ROUNDING[input_precision] if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def _compare(
    first: Tensors,
    second: Tensors,
    exact: Mapping[str, torch.Tensor],
    low: Mapping[str, torch.Tensor],
    rounding: float,
) -> str | None:
    for name, values in first.items():
        wanted = exact[name]
        one = wanted.abs().max() * rounding
        budget = float(2 * ((low[name].double() - wanted).abs().max() + one))
        error = float((values.double() - wanted).abs().max())
        if not error <= budget:
            return f"{name} is off by {error:.2g}, where {budget:.2g} is allowed"
        if not torch.equal(values, second[name]):
            return f"{name} differs from launch to launch"
    return None


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """The reference's own products: as exact as their dtype, whatever torch's switches say."""
    matmul = torch.backends.cuda.matmul
    switch = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = switch
