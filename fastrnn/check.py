"""`python -m fastrnn check`: every kind of computation against torch's, on this machine.

First the ways that are plain PyTorch, on the CPU, against ``nn.LSTM`` in float64. Then, on each
GPU, the kernels: each dtype, precision, direction, residency of the weights and kind of launch, the
clip's, and those that make layouts and previous states; each is compiled if it was not before. A
kernel's verdict is kept, so that no program has to make the check again.

Limits: the small problems of fastrnn_kernels/checking.py; they say that this chip, driver and
compiler give right results, not how fast.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.choosing.backends import can_run_triton
from fastrnn.choosing.environment import SWITCHES, forced_backend, switch
from fastrnn.lstm import LSTM

if TYPE_CHECKING:
    from fastrnn_kernels.trust import Variant

# One for each place where the recurrent weights can be: in one program, in several, in memory.
HIDDEN_SIZES = (64, 256, 2048)
BATCH = 64  # sequences, by which tiles are chosen
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ("auto", "torch", "reference")
WAY_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = (7, 2, 5, 1, 7)
# Summed in another order float32 is off by a few roundings of the largest value.
ROUNDINGS = 8


class Result(NamedTuple):
    """What one check has found.

    Attributes:
        name: of what was checked.
        reason: what is wrong; None where nothing is.
        seconds: that compilation took; None where nothing was compiled.
    """

    name: str
    reason: str | None
    seconds: float | None = None

    def __str__(self) -> str:
        compiled = "" if self.seconds is None else f", compiled in {self.seconds:.1f} s"
        return f"{self.name}: {'passed' if self.reason is None else f'FAILED, {self.reason}'}" + (
            compiled
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0 where all that can run here has passed, 1 where something has not, 2
        where a switch in the environment has a value that it cannot have.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn check",
        description="Compare every kind of computation with torch's, on this machine.",
    )
    parser.add_argument(
        "--hidden-size",
        type=int,
        action="append",
        metavar="H",
        help=f"of the kernels that are checked; default: {', '.join(map(str, HIDDEN_SIZES))}",
    )
    given = parser.parse_args(argv)
    try:
        for name in SWITCHES:
            switch(name)
    except ValueError as error:
        print(f"fastrnn: {error}", file=sys.stderr)
        return 2
    counts = {True: 0, False: 0}
    for result in _all_results(given.hidden_size or HIDDEN_SIZES):
        if isinstance(result, str):
            print(result, flush=True)
        else:
            print(f"  {result}", flush=True)
            counts[result.reason is None] += 1
    print(f"{counts[True]} passed, {counts[False]} failed")
    return 1 if counts[False] else 0


def _all_results(hidden_sizes: Sequence[int]) -> Iterator[Result | str]:
    yield "plain PyTorch on the CPU"
    yield from check_ways()
    for device in gpus():
        yield f"the kernels on {device}, {torch.cuda.get_device_name(device)}"
        if (reason := can_run_triton(device)) is not None:
            yield f"  none can run: {reason}"
        else:
            yield from check_kernels(device, hidden_sizes)
    if not gpus():
        yield f"no kernel was checked: {can_run_triton('cuda')}"


def gpus() -> list[torch.device]:
    """Those that torch finds."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def check_ways() -> Iterator[Result]:
    """Each backend that is plain PyTorch, in each dtype: a ragged batch, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    oracle = nn.LSTM(5, 16, num_layers=2, bidirectional=True, dtype=torch.float64)
    for parameter in oracle.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
    x = torch.randn(max(LENGTHS), len(LENGTHS), 5, generator=generator, dtype=torch.float64)
    exact = _packed(oracle, x)
    for dtype in WAY_DTYPES:
        low = _packed(_like(oracle, nn.LSTM, dtype), x.to(dtype))
        for backend in [forced] if (forced := forced_backend()) else WAYS:
            lstm = _like(oracle, LSTM, dtype, backend=backend)
            name = f"{backend:9} {str(dtype).removeprefix('torch.')}"
            yield Result(name, _difference(_ragged(lstm, x.to(dtype)), exact, low))


def _like(oracle: nn.LSTM, kind: type, dtype: torch.dtype, **options: str) -> nn.RNNBase:
    sizes = (oracle.input_size, oracle.hidden_size, oracle.num_layers)
    module: nn.RNNBase = kind(*sizes, bidirectional=True, dtype=dtype, **options)
    module.load_state_dict(oracle.state_dict())
    return module


def _packed(lstm: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """What nn.LSTM makes of the batch."""
    x = x.detach().requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed)
    return _with_gradients(lstm, x, pad_packed_sequence(output)[0], h_n, c_n)


def _ragged(lstm: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """What fastrnn.LSTM makes of the batch, whose padding is NaN."""
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(x.shape[0]).unsqueeze(1) >= lengths
    x = x.masked_fill(padding.unsqueeze(2), math.nan).requires_grad_()
    output, (h_n, c_n) = lstm(x, lengths=lengths)
    return _with_gradients(lstm, x, output, h_n, c_n)


def _with_gradients(
    lstm: nn.RNNBase, x: Tensor, output: Tensor, h_n: Tensor, c_n: Tensor
) -> dict[str, Tensor]:
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    loss = sum((values.double().square().sum() for values in found.values()), torch.zeros(()))
    names, parameters = zip(*lstm.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, [x, *parameters])
    found |= {f"d_{name}": grad for name, grad in zip(("x", *names), gradients, strict=True)}
    return {name: values.detach() for name, values in found.items()}


def _difference(
    found: dict[str, Tensor], exact: dict[str, Tensor], low: dict[str, Tensor]
) -> str | None:
    """What is further from float64 than nn.LSTM in the same dtype explains."""
    for name, values in found.items():
        rounding = exact[name].abs().max() * torch.finfo(values.dtype).eps * ROUNDINGS
        budget = float(2 * (low[name].double() - exact[name]).abs().max() + rounding)
        error = float((values.double() - exact[name]).abs().max())
        if not error <= budget:
            return f"{name} is off by {error:.2g}, where {budget:.2g} is allowed"
    return None


def check_kernels(device: torch.device, hidden_sizes: Sequence[int]) -> Iterator[Result]:
    """Every kind of kernel on one GPU."""
    from fastrnn_kernels import trust

    for variant in kinds(device, hidden_sizes):
        with _Compilations() as compilations:
            reason = trust.check_now(variant)
        yield Result(str(variant), reason, compilations.seconds)


def kinds(device: torch.device, hidden_sizes: Sequence[int]) -> list[Variant]:
    """The kernels that are checked: each kind of launch at the first size, training at all."""
    from fastrnn_kernels.gradient_norm import NORMS
    from fastrnn_kernels.launch import InputPrecision, precision_of
    from fastrnn_kernels.tiling import Chip, backward_tile, forward_tile
    from fastrnn_kernels.trust import HelperVariant, NormVariant, RecurrenceVariant

    chip = Chip.of(device)
    found: dict[Variant, None] = {}
    asked: tuple[InputPrecision, ...] = ("tf32", "tf32x3")
    for dtype in KERNEL_DTYPES:
        for precision in {precision_of(torch.empty(0, dtype=dtype), each): None for each in asked}:
            for H in hidden_sizes:
                for D in (1, 2):
                    kind = (BATCH, H, D, dtype, chip, precision)
                    shape = (device, H, D, dtype, precision)
                    first = hidden_sizes[0] == H
                    tile = forward_tile(*kind)
                    for save in ("gates", "cells", "nothing") if first else ("gates",):
                        found[RecurrenceVariant("forward", *shape, save, tile)] = None
                    tile = backward_tile(*kind)
                    for has_d_c in (False, True) if first else (False,):
                        found[RecurrenceVariant("backward", *shape, has_d_c, tile)] = None
    for norm_type in NORMS:
        for dtype in KERNEL_DTYPES:
            options: tuple[tuple[str, object], ...]
            options = (("scale", True), ("zero_nonfinite", False))
            if dtype == torch.float32:
                options = (*options, ("norm_dtype", torch.float32))
            found[NormVariant(device, norm_type, (dtype,), options)] = None
            if norm_type == 2.0:
                options = (*options, ("record", True))
                found[NormVariant(device, norm_type, (dtype,), options)] = None
    for dtype in KERNEL_DTYPES:
        for nonfinite in ("scale", "zero", "spare"):
            options = (("norm_dtype", dtype), ("nonfinite", nonfinite))
            found[HelperVariant("threshold", device, options)] = None
        for H, D in itertools.product(hidden_sizes, (1, 2)):
            options = (("H", H), ("D", D), ("dtype", dtype))
            found[HelperVariant("previous", device, options)] = None
    names = ("has_lengths", "has_mask", "has_resets", "time_major")
    for given in itertools.product((False, True), repeat=4):
        if any(given[:3]):
            options = tuple(zip(names, given, strict=True))
            found[HelperVariant("layout", device, options)] = None
    return list(found)


class _Compilations:
    """Adds up what Triton's compiler takes, while it lasts."""

    seconds: float | None = None

    def __enter__(self) -> _Compilations:
        from triton import knobs

        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._compiled
        return self

    def _compiled(self, *, times: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            self.seconds = (self.seconds or 0.0) + times.total / 1e6  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        from triton import knobs

        knobs.compilation.listener = self._before
