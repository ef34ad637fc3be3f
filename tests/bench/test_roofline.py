"""The roofline: figures worked out by hand, and that more work never takes less time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.roofline import GPUS, Gpu, LayerShape, PassFloor, Roofline, clip_floor, roofline
from fastrnn_kernels.tiling import Chip, Tile

# One cycle is a nanosecond, one multiprocessor makes 1024 operations in it.
TOY = Gpu(
    name="toy",
    chip=Chip("sm_90", multiprocessors=8, shared_memory=232_448),
    clock=1e9,
    matrix={"16bit": 8 * 1024e9, "tf32": 4 * 1024e9, "fp32": 1024e9},
    memory_bandwidth=1e12,
    l2_bytes=10_000,
    l2_bandwidth=4e12,
    l2_latency=100,
    source="made up",
)
SPLIT = Tile("split", BLOCK_B=16, BLOCK_H=16, BLOCK_K=32, unit_programs=2, batch_programs=1)
STREAMED = dataclasses.replace(SPLIT, residency="streamed")
WHOLE = Tile("whole", BLOCK_B=16, BLOCK_H=32, BLOCK_K=32, unit_programs=1, batch_programs=1)
SHAPE = LayerShape.dense(B=16, T=10, I=8, H=32)


def forward(tile: Tile, shape: LayerShape = SHAPE) -> PassFloor:
    return roofline(shape, TOY, forward=tile, backward=tile).forward


def test_forward_by_hand() -> None:
    floor = forward(SPLIT)
    assert floor.operations == floor.executed == 2 * 160 * 128 * 32
    # Rows: gates_x, h, gates, c; states: h_0, c_0, h_n, c_n; W_hh; batch_sizes and offsets.
    assert floor.memory_bytes == 2 * (160 * 10 * 32 + 4 * 16 * 32 + 128 * 32) + 10 * 16
    # Both programs read the exchange of 16 x 32, which is written once, in each of 10 steps.
    assert floor.l2_bytes == floor.memory_bytes + 10 * 3 * 16 * 32 * 2
    assert floor.barriers == floor.critical_steps == 10
    assert floor.programs == 2
    assert floor.occupancy == 2 / 8
    assert floor.launches == 3  # the scratch memory's fill, the kernel, gates_x
    # Cycles a step: three trips to L2; 2 * 16 * 64 * 32 operations; 64 columns of 32; 16 x 32.
    assert floor.limits == pytest.approx(
        {
            "barrier": 10 * 0.3,
            "matrix": 10 * 0.064,
            "shared memory": 10 * 0.032,
            "exchange": 10 * 0.016,
            "memory": floor.memory_bytes / 1e6,
            "L2": floor.l2_bytes / 4e6,
        }
    )
    assert floor.step_us == pytest.approx(0.364)
    assert floor.recurrence_us == pytest.approx(3.64)
    assert floor.limit == "barrier"


def test_backward_by_hand() -> None:
    floor = roofline(SHAPE, TOY, forward=SPLIT, backward=SPLIT).backward
    # The same operations; four times the exchange; d_h, gates, c in and d_gates out.
    assert floor.operations == floor.executed == 2 * 160 * 128 * 32
    assert floor.memory_bytes == 2 * (160 * 10 * 32 + 5 * 16 * 32 + 128 * 32) + 10 * 16
    assert floor.l2_bytes == floor.memory_bytes + 10 * 3 * 16 * 128 * 2
    assert floor.limits["matrix"] == pytest.approx(10 * 0.064)
    assert floor.limits["exchange"] == pytest.approx(10 * 0.064)
    assert floor.launches == 6


def test_products_by_hand() -> None:
    found = roofline(SHAPE, TOY, forward=SPLIT, backward=SPLIT)
    # gates_x: 160 x 8 by 8 x 128 is 0.04 us of operations and 47 kB, which do not fit L2.
    bytes_moved = 2 * (160 * 8 + 8 * 128 + 160 * 128)
    assert found.forward.products_us == pytest.approx(bytes_moved / 1e6)
    # d_x and d_W_ih move as much; biases read 160 x 128; d_W_hh has 2 * 128 * 160 * 32 operations.
    after = (2 * bytes_moved + 2 * 160 * 128) / 1e6 + 2 * 128 * 160 * 32 / (8 * 1024e3)
    assert found.backward.products_us == pytest.approx(after)
    assert found.total_us == pytest.approx(
        found.forward.recurrence_us + found.backward.recurrence_us + bytes_moved / 1e6 + after
    )


def test_one_program_needs_no_barrier() -> None:
    floor = forward(WHOLE)
    assert floor.barriers == 0
    assert floor.limits["barrier"] == floor.limits["exchange"] == 0
    assert floor.l2_bytes == floor.memory_bytes
    assert floor.launches == 2


def test_streamed_weights_come_from_l2_at_every_step() -> None:
    resident, streamed = forward(SPLIT), forward(STREAMED)
    assert streamed.l2_bytes - resident.l2_bytes == 10 * 2 * 64 * 32 * 2
    assert streamed.limits["exchange"] == pytest.approx(10 * (16 * 32 + 64 * 32) * 2 / 64 / 1e3)
    assert streamed.limits["shared memory"] == 0


def test_a_batch_tile_works_as_long_as_its_longest_sequence() -> None:
    lengths = (3, 9, 1, 7) + (2,) * 14  # sorted: tiles begin at 9 and at 2
    shape = dataclasses.replace(SHAPE, lengths=lengths)
    one = forward(SPLIT, shape)
    both = forward(dataclasses.replace(SPLIT, batch_programs=2), shape)
    assert one.barriers == both.barriers == 9 + 2
    assert one.critical_steps == 9 + 2
    assert both.critical_steps == 9
    assert one.executed == 2 * 16 * 128 * 32 * 11
    assert one.operations == 2 * sum(lengths) * 128 * 32


def test_both_directions_double_the_work_and_not_the_steps() -> None:
    one = forward(SPLIT)
    two = forward(SPLIT, dataclasses.replace(SHAPE, directions=2))
    assert two.operations == 2 * one.operations
    assert two.barriers == 2 * one.barriers
    assert two.programs == 2 * one.programs
    assert two.critical_steps == one.critical_steps
    assert two.step_us == one.step_us


def test_inference_saves_nothing_and_has_no_backward() -> None:
    found = roofline(dataclasses.replace(SHAPE, training=False), TOY, forward=SPLIT)
    assert found.backward is None
    assert forward(SPLIT).memory_bytes - found.forward.memory_bytes == 2 * 160 * 5 * 32
    assert found.total_us == found.forward.total_us


@pytest.mark.parametrize(
    ("dtype", "input_precision", "rate"),
    [
        (torch.float16, "tf32", 8 * 1024e9),
        (torch.bfloat16, "tf32x3", 8 * 1024e9),
        (torch.float32, "tf32", 4 * 1024e9),
        (torch.float32, "tf32x3", 4 * 1024e9 / 3),
        (torch.float32, "ieee", 1024e9),
    ],
)
def test_the_peak_is_the_dtype_s(dtype: torch.dtype, input_precision: str, rate: float) -> None:
    assert TOY.matrix_rate(dtype, input_precision) == pytest.approx(rate)


def test_what_fits_l2_is_not_read_from_memory() -> None:
    assert TOY.memory_seconds(10_000) == pytest.approx(10_000 / 4e12)
    assert TOY.memory_seconds(10_001) == pytest.approx(10_001 / 1e12)


@pytest.mark.parametrize("gpu", GPUS)
@settings(max_examples=30)
@given(
    B=st.integers(1, 200),
    T=st.integers(1, 300),
    H=st.integers(1, 1200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_more_steps_never_take_less_time(gpu: str, B: int, T: int, H: int, dtype) -> None:
    short = roofline(LayerShape.dense(B, T, 64, H, dtype=dtype), gpu)
    longer = roofline(LayerShape.dense(B, T + 1, 64, H, dtype=dtype), gpu)
    ragged = LayerShape((T + 1,) + (T,) * (B - 1), 64, H, dtype=dtype)
    for each in (short, longer):
        for one in each.passes:
            assert 0 < one.occupancy <= 1
            assert one.executed >= one.operations
            assert one.recurrence_us >= max(one.limits.values()) * (1 - 1e-9)
            assert one.limit in one.limits
    assert short.total_us <= roofline(ragged, gpu).total_us <= longer.total_us


@pytest.mark.parametrize("gpu", GPUS)
def test_published_figures_are_consistent(gpu: str) -> None:
    figures = GPUS[gpu]
    assert figures.matrix["16bit"] >= 2 * figures.matrix["tf32"] > 2 * figures.matrix["fp32"]
    assert figures.memory_bandwidth < figures.l2_bandwidth
    assert figures.source


def test_a_faster_memory_never_hurts() -> None:
    shape = LayerShape.dense(128, 512, 1024, 1024)
    assert roofline(shape, "H200").total_us <= roofline(shape, "H100 SXM").total_us


def test_fraction_of_what_is_possible() -> None:
    found = roofline(SHAPE, TOY, forward=SPLIT, backward=SPLIT)
    assert found.fraction(4 * found.total_us) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="measured_us must be positive"):
        found.fraction(0.0)


def test_it_can_be_printed_and_stored() -> None:
    found = roofline(LayerShape.dense(16, 1024, 768, 768), "H100 SXM")
    assert isinstance(found, Roofline)
    text = "\n".join(found.lines())
    assert "H100 SXM forward: at least" in text
    assert "H100 SXM backward: at least" in text
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["forward"]["tile"]["BLOCK_B"] == found.forward.tile.BLOCK_B
    assert stored["total_us"] == found.total_us


def test_mistakes_are_refused_with_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of A100 SXM 80GB, .*, got 'V100'"):
        roofline(SHAPE, "V100")
    with pytest.raises(ValueError, match="gpu must be one of"):
        clip_floor(1, "V100")
    with pytest.raises(ValueError, match="at least one sequence with steps, got \\(0, 0\\)"):
        LayerShape((0, 0), 1, 1)
    with pytest.raises(ValueError, match="directions must be 1 or 2, got 3"):
        dataclasses.replace(SHAPE, directions=3)
    with pytest.raises(ValueError, match="unit_programs must be 3"):
        forward(SPLIT, dataclasses.replace(SHAPE, hidden_size=48))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        clip_floor(-1, TOY)


def test_the_clip_s_floors_by_hand() -> None:
    # 40 kB: read once; read again without the 10 kB that L2 still holds, and written.
    floor = clip_floor(40_000, TOY)
    assert floor.unclipped_us == pytest.approx(0.04)
    assert floor.clipped_us == pytest.approx(0.04 + 0.03 + 0.04)
    assert floor.torch_us == pytest.approx(0.12)
    small = clip_floor(8_000, TOY)
    assert small.unclipped_us == pytest.approx(0.002)
    assert small.clipped_us == small.torch_us == pytest.approx(0.006)
    assert clip_floor(0, TOY).clipped_us == 0
