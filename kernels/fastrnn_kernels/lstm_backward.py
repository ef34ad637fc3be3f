"""The LSTM recurrence, backward: one launch for a whole sequence and both directions.

Letters as in lstm_forward.py; here K = 4H, because a unit's hidden state feeds the four gates of
every unit. The gradient of W_hh is one matrix product over all rows afterwards, d_W_hh = d_gates^T
h_{t-1}, and not made here.

Limits: as in lstm_forward.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .grid_barrier import count_arrival, wait
from .launch import (
    InputPrecision,
    assert_no_spill,
    check_rows,
    check_tensor,
    launching,
    precision_of,
    scratch,
    with_aligned_columns,
)
from .primitives import (
    count_steps,
    exchange_block,
    grouped_range,
    load_gates,
    load_rows,
    rows_of_step,
    store_gates,
    sum_groups,
    tanh,
    zero_product,
)
from .tile_store import stored_tile
from .tiling import Chip, Tile, backward_tile, ceil_div, with_batch_programs
from .trust import RecurrenceVariant, trusting


class LSTMBackward(NamedTuple):
    """Gradients of the loss.

    d_gates: with respect to gates_x, before the gate functions [N, D, 4H].
    d_h_0, d_c_0: with respect to the initial states [D, S, H].
    """

    d_gates: torch.Tensor
    d_h_0: torch.Tensor
    d_c_0: torch.Tensor


@triton.jit
def load_backward_weight(
    weight_ptr,  # [4H, WEIGHT_STRIDE], one direction
    first_unit,
    k_block,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A block of the columns this program owns [BLOCK_K, BLOCK_H]; it lies within one gate."""
    BLOCKS_PER_GATE: tl.constexpr = H_PADDED // BLOCK_K
    first_row = (k_block // BLOCKS_PER_GATE) * H
    first_k = (k_block % BLOCKS_PER_GATE) * BLOCK_K
    units = first_unit + tl.arange(0, BLOCK_H)
    if GROUPS == 1:
        k = first_k + tl.arange(0, BLOCK_K)
        offsets = (first_row + k)[:, None] * WEIGHT_STRIDE + units[None, :]
        mask = (k < H)[:, None] & (units < H)[None, :]
    else:
        k = first_k + grouped_range(GROUPS, BLOCK_K)
        offsets = (first_row + k)[:, :, None] * WEIGHT_STRIDE + units[None, None, :]
        mask = (k < H)[:, :, None] & (units < H)[None, None, :]
    return tl.load(weight_ptr + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "S", "T", "num_batch_tiles", "k_blocks"])
def lstm_backward_kernel(
    d_h_ptr,  # [N, D, H]
    d_h_n_ptr,  # [D, S, H]
    d_c_n_ptr,  # [D, S, H]
    d_c_ptr,  # [N, D, H], when HAS_D_C
    gates_ptr,  # [N, D, 4H]
    c_ptr,  # [N, D, H]
    c_0_ptr,  # [D, S, H]
    weight_ptr,  # [D, 4H, WEIGHT_STRIDE]
    batch_sizes_ptr,  # [T] int64
    offsets_ptr,  # [T] int64
    d_gates_ptr,  # [N, D, 4H]
    d_h_0_ptr,  # [D, S, H]
    d_c_0_ptr,  # [D, S, H]
    exchange_ptr,  # [2, D, num_batch_tiles * BLOCK_B, 4 * H_PADDED], unless "whole"; zeros
    arrivals_ptr,  # [D, num_batch_tiles, 32] int32, zeros; 32 of them are one 128-byte line
    failed_ptr,  # [1] int32 in the host's memory: 1 where a wait was given up
    N,
    S,
    T,
    num_batch_tiles,
    k_blocks,  # NUM_K again, at run time: the compiler would unroll the streamed loop and spill
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    RESIDENCY: tl.constexpr,
    HAS_D_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One step, against the order of the forward pass, for the rows of a batch tile.

        d_h += d_h[t];   d_c += d_h * o * (1 - tanh(c_t)^2)
        d_a_i = d_c * g * i (1 - i)           d_a_f = d_c * c_{t-1} * f (1 - f)
        d_a_g = d_c * i * (1 - g^2)           d_a_o = d_h * tanh(c_t) * o (1 - o)
        d_c = d_c * f;   d_h = W_hh^T d_a

    Program (u, b, d) owns units u * BLOCK_H ... of direction d: their d_a, d_h and d_c, and the
    columns of W_hh that make their d_h. d_c and d_h stay in its registers in float32; the d_a of
    all units are exchanged. A copy of `exchange` is written again two steps later, when all have
    passed the barrier between.
    """
    first_unit = tl.program_id(0) * BLOCK_H
    direction = tl.program_id(2)
    units = first_unit + tl.arange(0, BLOCK_H)
    tile_rows = tl.arange(0, BLOCK_B)
    NUM_K: tl.constexpr = 4 * H_PADDED // BLOCK_K
    dtype = d_gates_ptr.dtype.element_ty

    # Directions lie beside each other in a row, and one after another in the states and weights.
    d_h_ptr += direction * H
    d_c_ptr += direction * H
    gates_ptr += direction * (4 * H)
    c_ptr += direction * H
    d_gates_ptr += direction * (4 * H)
    weight_ptr += direction * (4 * H * WEIGHT_STRIDE)
    state_base = direction.to(tl.int64) * S * H
    arrivals_ptr += direction * num_batch_tiles * 32
    copy_size = (D * num_batch_tiles).to(tl.int64) * (BLOCK_B * 4 * H_PADDED)

    weight = ()
    if RESIDENCY != "streamed":
        for k in tl.static_range(NUM_K):
            block = load_backward_weight(
                weight_ptr, first_unit, k, H, H_PADDED, WEIGHT_STRIDE, BLOCK_H, BLOCK_K, GROUPS
            )
            weight = weight + (block,)

    # What a batch tile needs is computed within it: kept from tile to tile it would hold registers
    # throughout the loop over steps, which spills.
    for batch_tile in tl.range(
        tl.program_id(1), num_batch_tiles, tl.num_programs(1), disable_licm=True
    ):
        first_row = batch_tile * BLOCK_B
        rows = first_row + tile_rows
        steps = count_steps(batch_sizes_ptr, T, first_row)
        direction_sign = 2 * direction - 1
        step = (1 - direction) * (steps - 1)

        in_units = (units < H)[None, :]
        state_offsets = tile_rows[:, None] * H + units[None, :]
        state_start = state_base + first_row.to(tl.int64) * H
        state_mask = (rows < S)[:, None] & in_units
        d_h = tl.load(d_h_n_ptr + state_start + state_offsets, mask=state_mask, other=0.0)
        d_h = d_h.to(tl.float32)
        d_c = tl.load(d_c_n_ptr + state_start + state_offsets, mask=state_mask, other=0.0)
        d_c = d_c.to(tl.float32)
        c_0 = tl.load(c_0_ptr + state_start + state_offsets, mask=state_mask, other=0.0)

        gate_offsets = tile_rows[:, None] * (D * 4 * H) + units[None, :]
        row_offsets = tile_rows[:, None] * (D * H) + units[None, :]
        tile_arrivals_ptr = arrivals_ptr + batch_tile * 32
        exchange_tile = direction * num_batch_tiles + batch_tile
        exchange_tile_ptr = exchange_ptr + exchange_tile.to(tl.int64) * (BLOCK_B * 4 * H_PADDED)
        publish_offsets = tile_rows[:, None] * (4 * H_PADDED) + units[None, :]
        block_offsets = exchange_block(4 * H_PADDED, BLOCK_B, BLOCK_K, GROUPS)

        # Scalars are fetched one step before the addresses made of them, those one step before
        # their use.
        active, row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)
        step += direction_sign
        next_active, next_row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)
        step += direction_sign
        after_active, after_row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)
        # By rows alone from step to step: with the units, whose mask is made anew where a row is
        # loaded or stored, a thread keeps one for each of its cells, and spills. What is computed
        # for units past H is zero without it.
        is_active = (rows < active)[:, None]
        next_is_active = (rows < next_active)[:, None]
        mask = is_active & in_units
        i, f, g, o = load_gates(gates_ptr, row + first_row, D * 4 * H, gate_offsets, mask, H)
        d_out = load_rows(d_h_ptr, row + first_row, D * H, row_offsets, mask)
        d_cells = d_out
        if HAS_D_C:
            d_cells = load_rows(d_c_ptr, row + first_row, D * H, row_offsets, mask)
        c = load_rows(c_ptr, row + first_row, D * H, row_offsets, mask)
        mask = next_is_active & in_units
        next_c = load_rows(c_ptr, next_row + first_row, D * H, row_offsets, mask)

        for iteration in tl.range(steps, disable_licm=True):
            i = i.to(tl.float32)
            f = f.to(tl.float32)
            g = g.to(tl.float32)
            o = o.to(tl.float32)
            # The next step of this walk is the one before in the forward pass; there a row began
            # with c_0.
            c_before = tl.where(next_is_active, next_c, c_0).to(tl.float32)
            tanh_c = tanh(c.to(tl.float32))
            d_h += d_out.to(tl.float32)  # zero in inactive rows, whose d_h is kept
            d_cell = d_c + d_h * o * (1.0 - tanh_c * tanh_c)
            if HAS_D_C:
                d_cell += d_cells.to(tl.float32)
            d_i = (d_cell * g * (i * (1.0 - i))).to(dtype)
            d_f = (d_cell * c_before * (f * (1.0 - f))).to(dtype)
            d_g = (d_cell * i * (1.0 - g * g)).to(dtype)
            d_o = (d_h * tanh_c * (o * (1.0 - o))).to(dtype)
            d_c = tl.where(is_active, d_cell * f, d_c)

            copy_ptr = exchange_tile_ptr + (iteration % 2) * copy_size
            if RESIDENCY != "whole":
                tl.store(copy_ptr + publish_offsets, d_i)
                tl.store(copy_ptr + publish_offsets + H_PADDED, d_f)
                tl.store(copy_ptr + publish_offsets + 2 * H_PADDED, d_g)
                tl.store(copy_ptr + publish_offsets + 3 * H_PADDED, d_o)
                count_arrival(tile_arrivals_ptr)

            # Between arrival and wait: what the others do not need, and what the next step will.
            tile_row, mask = row + first_row, is_active & in_units
            store_gates(d_gates_ptr, tile_row, D * 4 * H, gate_offsets, mask, d_i, d_f, d_g, d_o, H)
            tile_row, mask = next_row + first_row, next_is_active & in_units
            i, f, g, o = load_gates(gates_ptr, tile_row, D * 4 * H, gate_offsets, mask, H)
            d_out = load_rows(d_h_ptr, tile_row, D * H, row_offsets, mask)
            if HAS_D_C:
                d_cells = load_rows(d_c_ptr, tile_row, D * H, row_offsets, mask)
            after_is_active = (rows < after_active)[:, None]
            mask = after_is_active & in_units
            c = next_c
            next_c = load_rows(c_ptr, after_row + first_row, D * H, row_offsets, mask)
            row = next_row
            next_row = after_row
            step += direction_sign
            after_active, after_row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)

            d_new = zero_product(BLOCK_B, BLOCK_H, GROUPS)
            if RESIDENCY == "whole":
                d_new = tl.dot(d_i, weight[0], d_new, input_precision=INPUT_PRECISION)
                d_new = tl.dot(d_f, weight[1], d_new, input_precision=INPUT_PRECISION)
                d_new = tl.dot(d_g, weight[2], d_new, input_precision=INPUT_PRECISION)
                d_new = tl.dot(d_o, weight[3], d_new, input_precision=INPUT_PRECISION)
            else:
                wait(tile_arrivals_ptr, (iteration + 1) * tl.num_programs(0), failed_ptr)
                blocks_ptr = copy_ptr + block_offsets
                if RESIDENCY == "split":
                    blocks = ()
                    for k in tl.static_range(IN_FLIGHT):
                        blocks = blocks + (tl.load(blocks_ptr + k * BLOCK_K),)
                    for k in tl.static_range(NUM_K):
                        if k + IN_FLIGHT < NUM_K:
                            blocks = blocks + (tl.load(blocks_ptr + (k + IN_FLIGHT) * BLOCK_K),)
                        d_new = tl.dot(blocks[k], weight[k], d_new, input_precision=INPUT_PRECISION)
                else:
                    for k in tl.range(k_blocks, num_stages=STAGES):
                        d_block = tl.load(blocks_ptr + k * BLOCK_K)
                        block = load_backward_weight(
                            weight_ptr,
                            first_unit,
                            k,
                            H,
                            H_PADDED,
                            WEIGHT_STRIDE,
                            BLOCK_H,
                            BLOCK_K,
                            GROUPS,
                        )
                        d_new = tl.dot(d_block, block, d_new, input_precision=INPUT_PRECISION)
            d_h = tl.where(is_active, sum_groups(d_new, GROUPS), d_h)
            is_active = next_is_active
            next_is_active = after_is_active

        # Written otherwise than before the loop over steps, or the compiler would recognise the
        # addresses and keep them in registers throughout.
        last_rows = (direction.to(tl.int64) * S + rows)[:, None]
        last_offsets = last_rows * H + units[None, :]
        last_mask = (rows < S)[:, None] & (units < H)[None, :]
        state_dtype = d_h_0_ptr.dtype.element_ty
        tl.store(d_h_0_ptr + last_offsets, d_h.to(state_dtype), mask=last_mask)
        tl.store(d_c_0_ptr + last_offsets, d_c.to(state_dtype), mask=last_mask)

    # N may exceed the number of valid rows; matrix products over all rows follow, so the rest is
    # zero.
    valid = tl.load(offsets_ptr + T - 1) + tl.load(batch_sizes_ptr + T - 1)
    first_block = valid + tl.program_id(1) * BLOCK_B
    for start in range(first_block, N.to(tl.int64), tl.num_programs(1) * BLOCK_B):
        offsets = tile_rows[:, None] * (D * 4 * H) + units[None, :]
        mask = ((start + tile_rows) < N)[:, None] & (units < H)[None, :]
        zeros = tl.zeros([BLOCK_B, BLOCK_H], dtype=dtype)
        store_gates(d_gates_ptr, start, D * 4 * H, offsets, mask, zeros, zeros, zeros, zeros, H)


def lstm_backward(
    d_h: torch.Tensor,
    d_h_n: torch.Tensor,
    d_c_n: torch.Tensor,
    gates: torch.Tensor,
    c: torch.Tensor,
    c_0: torch.Tensor,
    weight_hh: torch.Tensor,
    batch_sizes: torch.Tensor,
    offsets: torch.Tensor,
    *,
    d_c: torch.Tensor | None = None,
    input_precision: InputPrecision = "tf32x3",
    tile: Tile | None = None,
    sequences: int | None = None,
) -> LSTMBackward:
    """Runs the recurrence of one layer backwards, all directions, in one launch.

    Nothing it is given is written to, so that a second backward pass gives the same. Deterministic:
    bit-equal from run to run; no floating-point atomics.

    Args:
        d_h: gradient of the outputs [N, D, H]; rows beyond the valid ones are not read.
        d_h_n: gradient of the final hidden state [D, S, H].
        d_c_n: gradient of the final cell state [D, S, H].
        gates: activated gates of the forward pass [N, D, 4H].
        c: cell states of the forward pass [N, D, H].
        c_0: initial cell state [D, S, H].
        weight_hh: recurrent weights [D, 4H, H].
        batch_sizes: active sequences of each step, never growing [T], int64, on the same device.
        offsets: first row of each step [T], int64, on the same device.
        d_c: gradient of the cell states `c`, where they were an output [N, D, H].
        input_precision: how float32 products are made, as in the forward pass.
        tile: how the work is cut. Default: as measured (tile_store.py), or else the rule's
            (`tiling.backward_tile`), after a check (trust.py).
        sequences: how many to choose the tile for. Default: S; fewer where S is only a bound.

    Returns:
        d_gates (zero in rows beyond the valid ones), d_h_0 and d_c_0, of gates' dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        CannotLaunch: a compiler, the driver or the GPU refuses it (nothing was computed).
        NotChecked: a CUDA graph is being captured, and this kernel has not been checked before.
        BarrierTimeout: an earlier launch on this device has failed (see failed_waits.py).
    """
    D, S, H, T = check_rows(gates, weight_hh, None, c_0, batch_sizes, offsets)
    N = gates.shape[0]
    check_tensor("d_h", d_h, gates, (N, D, H))
    check_tensor("c", c, gates, (N, D, H))
    check_tensor("d_h_n", d_h_n, gates, (D, S, H))
    check_tensor("d_c_n", d_c_n, gates, (D, S, H))
    if d_c is not None:
        check_tensor("d_c", d_c, gates, (N, D, H))
    d_gates = torch.empty_like(gates)
    d_h_0, d_c_0 = torch.empty_like(c_0), torch.empty_like(c_0)
    if T == 0 or S == 0 or H == 0:
        return LSTMBackward(d_gates.zero_(), d_h_0.copy_(d_h_n), d_c_0.copy_(d_c_n))

    precision = precision_of(gates, input_precision)
    likely = S if sequences is None else sequences
    variant = None
    if tile is None:
        tile = stored_tile("backward", likely, H, D, gates.dtype, gates.device, precision)
        if tile is None:
            tile = backward_tile(likely, H, D, gates.dtype, Chip.of(gates.device), precision)
        kind = (H, D, gates.dtype, precision, d_c is not None, tile)
        variant = RecurrenceVariant("backward", gates.device, *kind)
    if likely != S:
        tile = with_batch_programs(tile, S, D, Chip.of(gates.device))
    tile.check(S, H)
    weight_hh = with_aligned_columns(weight_hh)
    num_batch_tiles = ceil_div(S, tile.BLOCK_B)
    exchange, arrivals = scratch(gates, tile, D, num_batch_tiles, 4 * tile.padded(H))
    with trusting(variant), launching(gates) as failed:
        compiled = lstm_backward_kernel[tile.grid(D)](
            d_h,
            d_h_n,
            d_c_n,
            d_h if d_c is None else d_c,
            gates,
            c,
            c_0,
            weight_hh,
            batch_sizes,
            offsets,
            d_gates,
            d_h_0,
            d_c_0,
            exchange,
            arrivals,
            failed,
            N,
            S,
            T,
            num_batch_tiles,
            4 * tile.padded(H) // tile.BLOCK_K,
            H=H,
            H_PADDED=tile.padded(H),
            D=D,
            WEIGHT_STRIDE=weight_hh.shape[2],
            HAS_D_C=d_c is not None,
            INPUT_PRECISION=precision,
            **tile.constants(),
        )
    assert_no_spill(compiled)
    return LSTMBackward(d_gates, d_h_0, d_c_0)
