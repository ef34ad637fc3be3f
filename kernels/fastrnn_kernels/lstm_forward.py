"""The LSTM recurrence, forward: one launch for a whole sequence and both directions.

Letters: B batch, S = B sequences sorted by decreasing length, T steps, N rows (valid steps of the
batch), D directions, H hidden units, K the reduction index of the matrix product (here K = H).
Gates are in the order i, f, g, o.

Limits: contiguous tensors; float32, bfloat16 and float16; no projection (proj_size), because h
would then be another matrix product after each step, with a second barrier.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from .grid_barrier import count_arrival, wait
from .launch import (
    InputPrecision,
    assert_no_spill,
    check_rows,
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
    rows_of_step,
    sigmoid,
    split_gates,
    store_gates,
    sum_groups,
    tanh,
    zero_product,
)
from .tile_store import stored_tile
from .tiling import Chip, Tile, ceil_div, forward_tile, with_batch_programs
from .trust import RecurrenceVariant, trusting


class LSTMForward(NamedTuple):
    """What the forward pass computes; `gates` and `c` are what backward needs.

    h: outputs [N, D, H]; viewed as [N, D * H] they are nn.LSTM's.
    h_n, c_n: state of each sequence after its last step [D, S, H]; h_0 and c_0 where it has none.
    gates: activated gates [N, D, 4H], or None.
    c: cell states [N, D, H], or None.
    """

    h: torch.Tensor
    h_n: torch.Tensor
    c_n: torch.Tensor
    gates: torch.Tensor | None
    c: torch.Tensor | None


@triton.jit
def load_forward_weight(
    weight_ptr,  # [4H, WEIGHT_STRIDE], one direction
    first_unit,
    first_k,
    H: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A block of W_hh transposed [BLOCK_K, 4 * BLOCK_H], column n = 4 * unit + gate."""
    n = tl.arange(0, 4 * BLOCK_H)
    unit = first_unit + n // 4
    gate_row = (n % 4) * H + unit
    if GROUPS == 1:
        k = first_k + tl.arange(0, BLOCK_K)
        offsets = gate_row[:, None] * WEIGHT_STRIDE + k[None, :]
        mask = (unit < H)[:, None] & (k < H)[None, :]
        weight = tl.trans(tl.load(weight_ptr + offsets, mask=mask, other=0.0))
    else:
        k = first_k + grouped_range(GROUPS, BLOCK_K)
        offsets = gate_row[None, :, None] * WEIGHT_STRIDE + k[:, None, :]
        mask = (unit < H)[None, :, None] & (k < H)[:, None, :]
        weight = tl.permute(tl.load(weight_ptr + offsets, mask=mask, other=0.0), (0, 2, 1))
    return weight


@triton.jit(do_not_specialize=["N", "S", "T", "num_batch_tiles", "k_blocks"])
def lstm_forward_kernel(
    gates_x_ptr,  # [N, D, 4H]
    weight_ptr,  # [D, 4H, WEIGHT_STRIDE]
    h_0_ptr,  # [D, S, H]
    c_0_ptr,  # [D, S, H]
    batch_sizes_ptr,  # [T] int64
    offsets_ptr,  # [T] int64
    h_ptr,  # [N, D, H]
    h_n_ptr,  # [D, S, H]
    c_n_ptr,  # [D, S, H]
    gates_ptr,  # [N, D, 4H], when SAVE_GATES
    c_ptr,  # [N, D, H], when SAVE_CELLS
    exchange_ptr,  # [2, D, num_batch_tiles * BLOCK_B, H_PADDED], unless "whole"; zeros
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
    SAVE_GATES: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One step of the recurrence, for the rows of a batch tile.

        i, f, g, o = sigma(a_i), sigma(a_f), tanh(a_g), sigma(a_o),   a = gates_x[t] + W_hh h_{t-1}
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Program (u, b, d) owns units u * BLOCK_H ... of direction d, with all four gates, for batch
    tiles b, b + programs, ... c stays in its registers in float32. The programs of a batch tile
    exchange h through `exchange`, of which two copies are used in turn: a program may write copy (i
    + 1) % 2 while a slower one still reads copy i % 2, and nobody writes that one again before all
    have arrived at barrier i + 1. Batch tiles never wait for each other.
    """
    first_unit = tl.program_id(0) * BLOCK_H
    direction = tl.program_id(2)
    units = first_unit + tl.arange(0, BLOCK_H)
    tile_rows = tl.arange(0, BLOCK_B)
    NUM_K: tl.constexpr = H_PADDED // BLOCK_K
    dtype = h_ptr.dtype.element_ty

    # Directions lie beside each other in a row, and one after another in the states and weights.
    gates_x_ptr += direction * (4 * H)
    h_ptr += direction * H
    gates_ptr += direction * (4 * H)
    c_ptr += direction * H
    weight_ptr += direction * (4 * H * WEIGHT_STRIDE)
    state_base = direction.to(tl.int64) * S * H
    arrivals_ptr += direction * num_batch_tiles * 32
    copy_size = (D * num_batch_tiles).to(tl.int64) * (BLOCK_B * H_PADDED)

    weight = ()
    if RESIDENCY != "streamed":
        for k in tl.static_range(NUM_K):
            block = load_forward_weight(
                weight_ptr, first_unit, k * BLOCK_K, H, WEIGHT_STRIDE, BLOCK_H, BLOCK_K, GROUPS
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
        direction_sign = 1 - 2 * direction
        step = direction * (steps - 1)

        in_units = (units < H)[None, :]
        state_offsets = tile_rows[:, None] * H + units[None, :]
        state_start = state_base + first_row.to(tl.int64) * H
        state_mask = (rows < S)[:, None] & in_units
        h = tl.load(h_0_ptr + state_start + state_offsets, mask=state_mask, other=0.0).to(dtype)
        c = tl.load(c_0_ptr + state_start + state_offsets, mask=state_mask, other=0.0)
        c = c.to(tl.float32)

        gate_offsets = tile_rows[:, None] * (D * 4 * H) + units[None, :]
        row_offsets = tile_rows[:, None] * (D * H) + units[None, :]
        tile_arrivals_ptr = arrivals_ptr + batch_tile * 32
        exchange_tile = direction * num_batch_tiles + batch_tile
        exchange_tile_ptr = exchange_ptr + exchange_tile.to(tl.int64) * (BLOCK_B * H_PADDED)
        publish_offsets = tile_rows[:, None] * H_PADDED + units[None, :]
        block_offsets = exchange_block(H_PADDED, BLOCK_B, BLOCK_K, GROUPS)

        # Scalars are fetched one step before the addresses made of them, those one step before
        # their use.
        active, row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)
        step += direction_sign
        next_active, next_row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)
        # By rows alone from step to step, as in the backward kernel.
        is_active = (rows < active)[:, None]
        mask = is_active & in_units
        x_i, x_f, x_g, x_o = load_gates(
            gates_x_ptr, row + first_row, D * 4 * H, gate_offsets, mask, H
        )

        if RESIDENCY != "whole":
            tl.store(exchange_tile_ptr + publish_offsets, h)
            count_arrival(tile_arrivals_ptr)

        for iteration in tl.range(steps, disable_licm=True):
            # Between arrival and wait: fetch what the next step will need.
            next_is_active = (rows < next_active)[:, None]
            mask = next_is_active & in_units
            y_i, y_f, y_g, y_o = load_gates(
                gates_x_ptr, next_row + first_row, D * 4 * H, gate_offsets, mask, H
            )
            step += direction_sign
            after_active, after_row = rows_of_step(batch_sizes_ptr, offsets_ptr, step, steps)

            gates = zero_product(BLOCK_B, 4 * BLOCK_H, GROUPS)
            if RESIDENCY == "whole":
                gates = tl.dot(h, weight[0], gates, input_precision=INPUT_PRECISION)
            else:
                wait(tile_arrivals_ptr, (iteration + 1) * tl.num_programs(0), failed_ptr)
                blocks_ptr = exchange_tile_ptr + (iteration % 2) * copy_size + block_offsets
                if RESIDENCY == "split":
                    blocks = ()
                    for k in tl.static_range(IN_FLIGHT):
                        blocks = blocks + (tl.load(blocks_ptr + k * BLOCK_K),)
                    for k in tl.static_range(NUM_K):
                        if k + IN_FLIGHT < NUM_K:
                            blocks = blocks + (tl.load(blocks_ptr + (k + IN_FLIGHT) * BLOCK_K),)
                        gates = tl.dot(blocks[k], weight[k], gates, input_precision=INPUT_PRECISION)
                else:
                    for k in tl.range(k_blocks, num_stages=STAGES):
                        h_block = tl.load(blocks_ptr + k * BLOCK_K)
                        block = load_forward_weight(
                            weight_ptr,
                            first_unit,
                            k * BLOCK_K,
                            H,
                            WEIGHT_STRIDE,
                            BLOCK_H,
                            BLOCK_K,
                            GROUPS,
                        )
                        gates = tl.dot(h_block, block, gates, input_precision=INPUT_PRECISION)

            i, f, g, o = split_gates(sum_groups(gates, GROUPS), BLOCK_B, BLOCK_H)
            i = sigmoid(i + x_i.to(tl.float32))
            f = sigmoid(f + x_f.to(tl.float32))
            g = tanh(g + x_g.to(tl.float32))
            o = sigmoid(o + x_o.to(tl.float32))
            kept = f * c
            new_c = kept + i * g
            new_h = (o * tanh(new_c)).to(dtype)
            mask = is_active & in_units
            h = tl.where(mask, new_h, h)
            c = tl.where(mask, new_c, c)
            if RESIDENCY != "whole":
                # First what the others wait for. Inactive rows publish the state they keep: a
                # reverse row's h_0 is there when the row joins. Nobody waits for the last one.
                copy_ptr = exchange_tile_ptr + ((iteration + 1) % 2) * copy_size
                tl.store(copy_ptr + publish_offsets, h)
                count_arrival(tile_arrivals_ptr)

            tile_row = row + first_row
            tl.store(h_ptr + tile_row * (D * H) + row_offsets, new_h, mask=mask)
            if SAVE_GATES:
                store_gates(gates_ptr, tile_row, D * 4 * H, gate_offsets, mask, i, f, g, o, H)
            if SAVE_CELLS:
                cells = new_c.to(c_ptr.dtype.element_ty)
                tl.store(c_ptr + tile_row * (D * H) + row_offsets, cells, mask=mask)
            x_i = y_i
            x_f = y_f
            x_g = y_g
            x_o = y_o
            is_active = next_is_active
            row = next_row
            next_active = after_active
            next_row = after_row

        # Written otherwise than before the loop over steps, or the compiler would recognise the
        # addresses and keep them in registers throughout.
        last_rows = (direction.to(tl.int64) * S + rows)[:, None]
        last_offsets = last_rows * H + units[None, :]
        last_mask = (rows < S)[:, None] & (units < H)[None, :]
        state_dtype = h_n_ptr.dtype.element_ty
        tl.store(h_n_ptr + last_offsets, h.to(state_dtype), mask=last_mask)
        tl.store(c_n_ptr + last_offsets, c.to(state_dtype), mask=last_mask)

    # N may exceed the number of valid rows; matrix products over all rows follow, so the rest is
    # zero.
    valid = tl.load(offsets_ptr + T - 1) + tl.load(batch_sizes_ptr + T - 1)
    first_block = valid + tl.program_id(1) * BLOCK_B
    for start in range(first_block, N.to(tl.int64), tl.num_programs(1) * BLOCK_B):
        offsets = tile_rows[:, None] * (D * H) + units[None, :]
        mask = ((start + tile_rows) < N)[:, None] & (units < H)[None, :]
        zeros = tl.zeros([BLOCK_B, BLOCK_H], dtype=dtype)
        tl.store(h_ptr + start * (D * H) + offsets, zeros, mask=mask)
        if SAVE_CELLS:
            zeros = zeros.to(c_ptr.dtype.element_ty)
            tl.store(c_ptr + start * (D * H) + offsets, zeros, mask=mask)


def lstm_forward(
    gates_x: torch.Tensor,
    weight_hh: torch.Tensor,
    h_0: torch.Tensor,
    c_0: torch.Tensor,
    batch_sizes: torch.Tensor,
    offsets: torch.Tensor,
    *,
    save: Literal["gates", "cells", "nothing"],
    input_precision: InputPrecision = "tf32x3",
    tile: Tile | None = None,
    sequences: int | None = None,
) -> LSTMForward:
    """Runs the recurrence of one layer, all directions, in one launch on the current stream.

    Sequences are sorted by decreasing length; those of length 0 come last and keep h_n = h_0.
    Direction 1 walks the steps from last to first. Deterministic: bit-equal from run to run.

    Args:
        gates_x: x W_ih^T + b_ih + b_hh, gates i, f, g, o [N, D, 4H]; float32, bfloat16 or float16.
            N may exceed the number of valid rows: the rest of `h` and `c` is zero then.
        weight_hh: recurrent weights [D, 4H, H], same dtype.
        h_0: initial hidden state [D, S, H], same dtype.
        c_0: initial cell state [D, S, H], same dtype.
        batch_sizes: active sequences of each step, never growing [T], int64, on the same device.
        offsets: first row of each step [T], int64, on the same device.
        save: what to keep for backward: activated gates and cells, cells only (gates can be
            recomputed from h with one matrix product), or nothing.
        input_precision: how float32 products are made: "tf32", "tf32x3" (as exact as float32) or
            "ieee".
        tile: how the work is cut. Default: as measured (tile_store.py), or else the rule's
            (`tiling.forward_tile`), after a check (trust.py).
        sequences: how many to choose the tile for. Default: S; fewer where S is only a bound.

    Returns:
        h, h_n, c_n, and gates and c where `save` asks for them, all of gates_x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        CannotLaunch: a compiler, the driver or the GPU refuses it (nothing was computed).
        NotChecked: a CUDA graph is being captured, and this kernel has not been checked before.
        BarrierTimeout: an earlier launch on this device has failed (see failed_waits.py).
    """
    D, S, H, T = check_rows(gates_x, weight_hh, h_0, c_0, batch_sizes, offsets)
    N = gates_x.shape[0]
    h = gates_x.new_empty(N, D, H)
    h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
    gates = torch.empty_like(gates_x) if save == "gates" else None
    c = torch.empty_like(h) if save != "nothing" else None
    if T == 0 or S == 0 or H == 0:
        for rows in (h, gates, c):
            if rows is not None:
                rows.zero_()
        h_n.copy_(h_0)
        c_n.copy_(c_0)
        return LSTMForward(h, h_n, c_n, gates, c)

    precision = precision_of(gates_x, input_precision)
    likely = S if sequences is None else sequences
    variant = None
    if tile is None:
        tile = stored_tile("forward", likely, H, D, gates_x.dtype, gates_x.device, precision)
        if tile is None:
            tile = forward_tile(likely, H, D, gates_x.dtype, Chip.of(gates_x.device), precision)
        kind = (H, D, gates_x.dtype, precision, save, tile)
        variant = RecurrenceVariant("forward", gates_x.device, *kind)
    if likely != S:
        tile = with_batch_programs(tile, S, D, Chip.of(gates_x.device))
    tile.check(S, H)
    weight_hh = with_aligned_columns(weight_hh)
    num_batch_tiles = ceil_div(S, tile.BLOCK_B)
    exchange, arrivals = scratch(gates_x, tile, D, num_batch_tiles, tile.padded(H))
    with trusting(variant), launching(gates_x) as failed:
        compiled = lstm_forward_kernel[tile.grid(D)](
            gates_x,
            weight_hh,
            h_0,
            c_0,
            batch_sizes,
            offsets,
            h,
            h_n,
            c_n,
            h if gates is None else gates,
            h if c is None else c,
            exchange,
            arrivals,
            failed,
            N,
            S,
            T,
            num_batch_tiles,
            tile.padded(H) // tile.BLOCK_K,
            H=H,
            H_PADDED=tile.padded(H),
            D=D,
            WEIGHT_STRIDE=weight_hh.shape[2],
            SAVE_GATES=gates is not None,
            SAVE_CELLS=c is not None,
            INPUT_PRECISION=precision,
            **tile.constants(),
        )
    assert_no_spill(compiled)
    return LSTMForward(h, h_n, c_n, gates, c)
