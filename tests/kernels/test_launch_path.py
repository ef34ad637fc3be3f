"""The real launch path, by a driver that stands in for the GPU's: what is compiled, and launched.

Variants are counted without compiling them; a few are compiled.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn_kernels.lstm_backward import lstm_backward
from fastrnn_kernels.lstm_forward import lstm_forward
from fastrnn_kernels.tiling import CHIPS, backward_tile, forward_tile
from tests.kernels.stand_in_driver import GPU, StandIn, stand_in

I = 8


def make(H: int, dtype: torch.dtype = torch.float32, **config: Any) -> fastrnn.LSTM:
    return fastrnn.LSTM(I, H, batch_first=True, backend="triton", dtype=dtype, **config)


def train(lstm: fastrnn.LSTM, x: Tensor, *, cells: bool = False, **ragged: Any) -> None:
    output, (h_n, _), *rest = lstm(x, return_cell_states=cells, **ragged)
    sum(part.sum() for part in (output, h_n, *rest)).backward()


def names(driver: StandIn) -> Counter[str]:
    return Counter(variant.name for variant in driver.variants)


def ragged(form: str, B: int, T: int, choice: random.Random) -> dict[str, Any]:
    lengths = [choice.randint(0, T) for _ in range(B)]
    flags = torch.zeros(B, T, dtype=torch.bool)
    given = {"lengths": torch.tensor(lengths), "mask": flags, "resets": flags}
    if form == "dense":
        return {}
    if form in ("lengths-host", "resets-host"):
        name = form.removesuffix("-host")
        return {name: given[name]}
    chosen = given if form == "all" else {form: given[form]}
    return {name: value.to(GPU) for name, value in chosen.items()}


FORMS = ("dense", "lengths-host", "resets-host", "lengths", "mask", "resets", "all")
# Forward and backward, and h_{t-1} unless dense; of lengths on the GPU what makes the layout, with
# and without resets, of flags or of lengths alone.
IN_TRAINING = {
    "lstm_forward_kernel": 1,
    "lstm_backward_kernel": 1,
    "previous_states_kernel": 1,
    "find_segments_kernel": 3,
    "rank_sequences_kernel": 2,
    "place_rows_kernel": 3,
}


def test_three_hundred_batches_of_all_forms_need_a_dozen_variants() -> None:
    """T and B from 1 on, N and S multiples of 16 and not."""
    choice = random.Random(0)
    shapes = [(1, 1), (1, 16), (16, 1), (16, 16), (17, 3)]
    shapes += [(choice.randint(1, 64), choice.randint(1, 60)) for _ in range(295)]
    lstm = make(128, device=GPU)
    with stand_in() as driver:
        for index, (B, T) in enumerate(shapes):
            form = FORMS[index % len(FORMS)]
            train(lstm, torch.zeros(B, T, I, device=GPU), **ragged(form, B, T, choice))
    assert names(driver) == IN_TRAINING
    assert not any(variant.unaligned for variant in driver.variants)
    assert not [launch for launch in driver.launches if launch.problems]


@pytest.mark.parametrize(
    ("uses", "more"),
    [
        ("inference", {"lstm_forward_kernel": 1}),  # saves nothing
        ("recompute", {"lstm_forward_kernel": 1, "previous_states_kernel": 1}),  # no gates
        ("cells", {"lstm_backward_kernel": 1}),  # their gradient
        ("cells-inference", {"lstm_forward_kernel": 1}),  # no gates
    ],
)
def test_what_else_is_compiled_for_a_dense_layer(uses: str, more: dict[str, int]) -> None:
    """Each by its name: a use that is not made costs nothing."""
    lstm, x = make(128, device=GPU), torch.zeros(5, 7, I, device=GPU)
    with stand_in() as driver:
        train(lstm, x)
        assert names(driver) == {"lstm_forward_kernel": 1, "lstm_backward_kernel": 1}
        before = names(driver)
        lstm.memory = "recompute" if uses == "recompute" else "save"
        if "inference" in uses:
            with torch.no_grad():
                lstm(x, return_cell_states=uses == "cells-inference")
        else:
            train(lstm, x, cells=uses == "cells")
    assert names(driver) - before == more


@pytest.mark.parametrize("form", ["dense", "resets"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
@pytest.mark.parametrize("H", [512, 1024], ids=["H512", "H1024"])
def test_variants_are_as_many_as_tiles_of_the_batch_sizes(
    H: int, directions: int, form: str
) -> None:
    """Of those alone: how many segments resets make changes from batch to batch."""
    choice, dtype = random.Random(0), torch.bfloat16
    lstm = make(H, dtype, bidirectional=directions == 2, device=GPU)
    sizes = [1, 16, 17, 32, 33, 64]
    with stand_in() as driver:
        for B in sizes:
            for T in (3, 40):
                x = torch.zeros(B, T, I, device=GPU, dtype=dtype)
                train(lstm, x, **ragged(form, B, T, choice))
    for name, choose in (("forward", forward_tile), ("backward", backward_tile)):
        tiles = [choose(B, H, directions, dtype, CHIPS["sm_90"]) for B in sizes]
        different = {tuple(sorted(tile.constants().items(), key=str)) for tile in tiles}
        assert names(driver)[f"lstm_{name}_kernel"] == len(different) <= 3


def off(tensor: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16 bytes."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[1:].copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("form", ["dense", "lengths-host"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
def test_addresses_that_are_no_multiples_of_16_bytes_compile_nothing(
    directions: int, form: str
) -> None:
    """Weights in one flat buffer, states and gradients that are views."""
    lstm, x = make(16, bidirectional=directions == 2), torch.randn(3, 4, I)
    given = {} if form == "dense" else {"lengths": [4, 2, 3]}
    hx = tuple(torch.zeros(directions, 3, 16) for _ in range(2))
    with stand_in() as driver:
        output, states = lstm(x, hx, **given)
        torch.autograd.backward([output, *states], [torch.zeros_like(s) for s in (output, *states)])
        before = list(driver.variants)
        for parameter in lstm.parameters():
            parameter.data = off(parameter.data)
        output, states = lstm(off(x), tuple(map(off, hx)), **given)
        torch.autograd.backward([output, *states], [off(s.detach()) for s in (output, *states)])
    assert driver.variants == before
    assert not [launch for launch in driver.launches if launch.problems]


def test_the_launchers_themselves_take_any_address() -> None:
    """One variant more, and no launch with a pointer it is not compiled for."""
    T, S, H, D = 3, 4, 16, 1
    sizes = torch.full((T,), S)
    with stand_in() as driver:
        for place in (lambda tensor: tensor, off):
            gates = place(torch.zeros(T * S, D, 4 * H))
            states = [place(torch.zeros(D, S, H)) for _ in range(2)]
            weight = place(torch.zeros(D, 4 * H, H))
            found = lstm_forward(
                *(gates, weight, *states, sizes, sizes.cumsum(0) - sizes), save="gates"
            )
            lstm_backward(
                *(found.h, *states, found.gates, found.c, states[0], weight),
                *(sizes, sizes.cumsum(0) - sizes),
            )
    assert names(driver) == {"lstm_forward_kernel": 2, "lstm_backward_kernel": 2}
    assert not [launch for launch in driver.launches if launch.problems]


def test_spills_are_an_error_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, x = make(64, device=GPU), torch.zeros(3, 4, I, device=GPU)
    monkeypatch.setattr("tests.kernels.stand_in_driver._NotCompiled.n_spills", 3)
    with stand_in():
        train(lstm, x)
        monkeypatch.setenv("FASTRNN_ASSERT_NO_SPILL", "1")
        with pytest.raises(RuntimeError, match="lstm_forward_kernel spills 3 registers"):
            train(lstm, x)


def assert_launches(driver: StandIn) -> None:
    """Nothing is refused, everything is resident at once, nothing spills."""
    assert not [(launch.name, launch.problems) for launch in driver.launches if launch.problems]
    for launch in driver.launches:
        constants = dict(launch.variant.constants)
        waits = constants.get("RESIDENCY") in ("split", "streamed")
        assert launch.cooperative == waits
        assert launch.registers is not None and launch.registers <= 255
        assert launch.spills == 0
        if "RESIDENCY" in constants:
            x, y, z = launch.grid
            assert x * y * z <= driver.chip.multiprocessors


def compile_all(chip: str, H: int, dtype: torch.dtype, forms: tuple[str, ...], D: int) -> None:
    lstm = make(H, dtype, bidirectional=D == 2, device=GPU)
    with stand_in(chip, compiles=True) as driver:
        for form in forms:
            x = torch.zeros(5, 7, I, device=GPU, dtype=dtype)
            train(lstm, x, **ragged(form, 5, 7, random.Random(0)))
    assert_launches(driver)


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 256], ids=["H64-whole", "H256-split"])
def test_what_is_compiled_can_be_launched(H: int) -> None:
    """Other chips, sizes and dtypes: `make offline`, which compiles them all."""
    compile_all("sm_90", H, torch.bfloat16, ("lengths", "all"), 2)
