"""The recurrence in plain PyTorch: the oracle of every other path, and one of the two CPU paths.

One layer, one direction, over packed rows (packing.py). At step t, with n active sequences::

    i, f, g, o = split(x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(c_t)             (then W_hr h_t, where there is a projection)

and backwards, with d_h and d_c the gradients that reach h_t and c_t::

    d_c     = d_c + d_h * o * (1 - tanh(c_t)^2)
    d_gates = (d_c * g, d_c * c_{t-1}, d_c * i, d_h * tanh(c_t)), times each activation's derivative
    d_h_{t-1} = d_gates W_hh,   d_c_{t-1} = d_c * f

:func:`lstm_forward` and :func:`lstm_backward` are derived by hand, work in place and are
deterministic. :func:`lstm_composite` says the same in differentiable operations, for double
backward, forward-mode derivatives and vmap. Time runs in blocks of steps whose gates fit into the
cache: the input's product is made block by block, and the weights' gradients are one product a
    block, never one a step.

Notation: N rows, S sequences, I input, H hidden, P output features (H, or proj_size), 4H gates in
the order i, f, g, o.

Source: Hochreiter & Schmidhuber 1997, Gers et al. 2000 (forget gate), Sak et al. 2014 (projection).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastrnn import torch_private

# Elements of a block's gates, [rows, 4H]: 2 MiB in float32, the size of a core's private cache.
BLOCK_ELEMENTS = 512 * 1024
# A block has at least this many rows, that the products of the weights' gradients are efficient.
BLOCK_MIN_ROWS = 128


class LayerWeights(NamedTuple):
    """One direction of one layer, as nn.LSTM names them.

    Attributes:
        ih: ``weight_ih``, ``[4H, I]``.
        hh: ``weight_hh``, ``[4H, P]``.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        hr: ``weight_hr``, ``[P, H]``, or None where P = H.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.hh.shape[0] // 4

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """The weights in this dtype."""
        if self.ih.dtype == dtype:
            return self
        return LayerWeights(
            self.ih.to(dtype),
            self.hh.to(dtype),
            None if self.bias_ih is None else self.bias_ih.to(dtype),
            None if self.bias_hh is None else self.bias_hh.to(dtype),
            None if self.hr is None else self.hr.to(dtype),
        )

    def bias(self) -> Tensor | None:
        """``b_ih + b_hh``, ``[4H]``."""
        if self.bias_ih is None or self.bias_hh is None:
            return None
        return self.bias_ih + self.bias_hh


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Forward(NamedTuple):
    """What a direction computes.

    Attributes:
        h: ``[N, P]`` outputs.
        h_n: ``[S, P]`` final hidden states; shares memory with nothing.
        c_n: ``[S, H]`` final cell states; shares memory with nothing.
        c: ``[N, H]`` cell states, or None where nobody asked.
        saved: what backward needs besides the inputs, the outputs and ``c``.
    """

    h: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None
    saved: tuple[Tensor, ...]


class Gradients(NamedTuple):
    """Gradients of a direction's inputs; None where nobody asked."""

    rows: Tensor | None
    h_0: Tensor
    c_0: Tensor
    weights: tuple[Tensor | None, ...]


class _Block(NamedTuple):
    """Consecutive steps ``[first, last)`` that own rows ``[begin, end)``."""

    first: int
    last: int
    begin: int
    end: int


def _blocks(sizes: Sequence[int], hidden_size: int) -> list[_Block]:
    most = max(BLOCK_MIN_ROWS, BLOCK_ELEMENTS // (4 * hidden_size))
    blocks, first, begin, end = [], 0, 0, 0
    for step, size in enumerate(sizes):
        if end + size - begin > most and step > first:
            blocks.append(_Block(first, step, begin, end))
            first, begin = step, end
        end += size
    if end > begin:
        blocks.append(_Block(first, len(sizes), begin, end))
    return blocks


def _previous(
    step: int, states: Sequence[Tensor], initial: Tensor, sizes: Sequence[int], reverse: bool
) -> Tensor:
    """``[n, F]``: the states that the sequences of step ``step`` come with.

    A sequence takes its initial state at its first step. In the reverse direction that is its last
    row: sequences join while the batch grows.
    """
    before = step + 1 if reverse else step - 1
    size = sizes[step]
    if not 0 <= before < len(sizes):
        return initial[:size]
    known = sizes[before]
    if known == size:
        return states[before]
    if known > size:
        return states[before][:size]
    return torch.cat([states[before], initial[known:size]])


def _all_previous(
    rows: Tensor, initial: Tensor, sizes: Sequence[int], reverse: bool
) -> list[Tensor]:
    """:func:`_previous` of every step, out of the states ``[N, F]`` of all of them.

    Forwards they are views, which may be taken before the states are there.
    """
    if not sizes:
        return []
    if reverse:
        states = rows.split(list(sizes))
        return [_previous(step, states, initial, sizes, True) for step in range(len(sizes))]
    # One split makes the views for less than half of what slices cost.
    following = [*sizes[1:], 0]
    parts = [n for size, left in zip(sizes, following, strict=True) for n in (left, size - left)]
    return [initial[: sizes[0]], *rows.split(parts)[:-2:2]]


def _final(
    states: Sequence[Tensor], initial: Tensor, sizes: Sequence[int], reverse: bool
) -> Tensor:
    """``[S, F]``: each sequence's state after its last step; its initial state if it has none."""
    if not sizes:
        return initial.clone()
    if reverse:
        return torch.cat([states[0], initial[sizes[0] :]])
    parts, done = [], 0
    for size, state in zip(reversed(sizes), reversed(states), strict=True):
        if size > done:
            parts.append(state[done:])
            done = size
    return torch.cat([*parts, initial[done:]])


def lstm_forward(
    rows: Tensor,
    sizes: Sequence[int],
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    *,
    reverse: bool,
    save_gates: bool,
    save_cells: bool,
) -> Forward:
    """One direction over all rows.

    Args:
        rows: ``[N, I]``.
        sizes: active sequences at each step, non-increasing, sum N.
        weights: in the dtype of ``rows``.
        h_0: ``[S, P]``.
        c_0: ``[S, H]``.
        reverse: walk the steps from last to first.
        save_gates: keep the activated gates ``[N, 4H]`` and ``tanh(c)`` ``[N, H]``, which
            :func:`lstm_backward` otherwise computes again.
        save_cells: keep ``c``, which :func:`lstm_backward` needs.

    Returns:
        See :class:`Forward`.
    """
    hidden_size = weights.hidden_size
    input_t = _input_weights(weights).t()
    hh_t = weights.hh.t().contiguous()  # its view costs a small step up to a third more
    blocks = _blocks(sizes, hidden_size)
    most = max((block.end - block.begin for block in blocks), default=0)
    gates = rows.new_empty(rows.shape[0] if save_gates else most, 4 * hidden_size)
    h = rows.new_empty(rows.shape[0], h_0.shape[1])
    h_steps = h.split(list(sizes))
    c, c_steps = None, None
    if save_cells:
        c = rows.new_empty(rows.shape[0], hidden_size)
        c_steps = c.split(list(sizes))
    # Backwards a step's states before it are known only once they are there.
    h_before = None if reverse else _all_previous(h, h_0, sizes, False)
    c_before = None if reverse or c is None else _all_previous(c, c_0, sizes, False)
    c_state = c_0.clone() if c is None else c_0  # updated in place where no step's c is kept
    tanh_c = rows.new_empty(rows.shape[0] if save_gates else h_0.shape[0], hidden_size)
    tanh_steps = tanh_c.split(list(sizes)) if save_gates else None

    for block in reversed(blocks) if reverse else blocks:
        begin = block.begin if save_gates else 0
        block_gates = gates[begin : begin + block.end - block.begin]
        torch.mm(_inputs(rows, block, weights), input_t, out=block_gates)
        views = _gate_views(block_gates, sizes[block.first : block.last], hidden_size)
        steps = range(block.first, block.last)
        for step, gates_t in zip(
            reversed(steps) if reverse else steps,
            zip(*map(reversed, views), strict=True) if reverse else zip(*views, strict=True),
            strict=True,
        ):
            all_gates, i_f, i, f, g, o = gates_t
            h_previous = h_before[step] if h_before else _previous(step, h_steps, h_0, sizes, True)
            torch.addmm(all_gates, h_previous, hh_t, out=all_gates)
            i_f.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            if c_steps is None:
                c_t = c_state[: sizes[step]]
                c_t.mul_(f)
            else:
                c_t = c_steps[step]
                known = c_before[step] if c_before else _previous(step, c_steps, c_0, sizes, True)
                torch.mul(f, known, out=c_t)
            c_t.addcmul_(i, g)
            tanh_t = tanh_c[: sizes[step]] if tanh_steps is None else tanh_steps[step]
            torch.tanh(c_t, out=tanh_t)
            if weights.hr is None:
                torch.mul(tanh_t, o, out=h_steps[step])
            else:
                torch.mm(tanh_t * o, weights.hr.t(), out=h_steps[step])

    h_n = _final(h_steps, h_0, sizes, reverse)
    c_n = c_state if c_steps is None else _final(c_steps, c_0, sizes, reverse)
    return Forward(h, h_n, c_n, c, (gates, tanh_c) if save_gates else ())


def _input_weights(weights: LayerWeights) -> Tensor:
    """``W_ih``, ``[4H, I]``, with the bias as one more column where there is one.

    So the input's product adds the bias, and its gradient's product sums the bias's: neither costs
    a pass over the gates of its own.
    """
    bias = weights.bias()
    return weights.ih if bias is None else torch.cat([weights.ih, bias.unsqueeze(1)], 1)


def _inputs(rows: Tensor, block: _Block, weights: LayerWeights) -> Tensor:
    """A block's rows ``[n, I]``, with a column of ones where there is a bias."""
    own = rows[block.begin : block.end]
    return own if weights.bias_ih is None else functional.pad(own, (0, 1), value=1.0)


def _gate_views(
    gates: Tensor, sizes: Sequence[int], hidden_size: int
) -> tuple[Sequence[Tensor], ...]:
    """Views by step of all gates, of i and f together, and of i, f, g, o."""
    sizes = list(sizes)
    both = gates[:, : 2 * hidden_size]
    return tuple(view.split(sizes) for view in (gates, both, *gates.chunk(4, 1)))


def lstm_backward(
    d_h: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c: Tensor | None,
    rows: Tensor,
    sizes: Sequence[int],
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    h: Tensor,
    c: Tensor,
    saved: Sequence[Tensor],
    *,
    reverse: bool,
    needs_rows: bool,
    needs_weights: Sequence[bool],
) -> Gradients:
    """Gradients of one direction, by backpropagation through time.

    Args:
        d_h: ``[N, P]`` gradient of the outputs; None is zero, as for the next three.
        d_h_n: ``[S, P]``.
        d_c_n: ``[S, H]``.
        d_c: ``[N, H]``, of the cell states.
        rows: as in :func:`lstm_forward`, and so are the next five.
        sizes: see there.
        weights: see there.
        h_0: see there.
        c_0: see there.
        reverse: see there.
        h: ``[N, P]``, its outputs.
        c: ``[N, H]``, its cell states.
        saved: what it saved, or nothing; only read, so that a second backward finds it as it was.
        needs_rows: compute the gradient of ``rows``.
        needs_weights: the same for each of ih, hh, bias_ih, bias_hh, hr.

    Returns:
        See :class:`Gradients`.
    """
    hidden_size, size_h = weights.hidden_size, h_0.shape[1]
    needs_ih, needs_hh, needs_bias_ih, needs_bias_hh, needs_hr = needs_weights
    input_weights = _input_weights(weights)
    needs_bias = needs_bias_ih or needs_bias_hh
    d_input_weights = torch.zeros_like(input_weights) if needs_ih or needs_bias else None
    d_hh = torch.zeros_like(weights.hh) if needs_hh else None
    d_hr = torch.zeros_like(weights.hr) if needs_hr and weights.hr is not None else None
    d_rows = torch.empty_like(rows) if needs_rows else None
    # The gradients that arrive at each sequence's state from the step behind.
    h_state = h_0.new_zeros(h_0.shape) if d_h_n is None else d_h_n.clone()
    c_state = c_0.new_zeros(c_0.shape) if d_c_n is None else d_c_n.clone()

    sizes = list(sizes)
    h_before = _all_previous(h, h_0, sizes, reverse)
    c_before = _all_previous(c, c_0, sizes, reverse)
    d_h_steps = d_h.split(sizes) if d_h is not None else None
    d_c_steps = d_c.split(sizes) if d_c is not None else None
    blocks = _blocks(sizes, hidden_size)
    most = max((block.end - block.begin for block in blocks), default=0)
    gates, all_tanh_c = saved or (None, None)
    hh_t = weights.hh.t()
    d_gates_buffer = rows.new_empty(most, 4 * hidden_size)
    c_buffer = rows.new_empty(most, hidden_size)
    h_buffer = rows.new_empty(most, size_h)
    d_h_buffer = rows.new_empty(most, size_h) if d_hr is not None else None

    for block in blocks if reverse else reversed(blocks):
        count = block.end - block.begin
        block_sizes = sizes[block.first : block.last]
        d_gates, c_previous = d_gates_buffer[:count], c_buffer[:count]
        h_previous = None
        if d_hh is not None or gates is None:
            h_previous = torch.cat(h_before[block.first : block.last], out=h_buffer[:count])
        if gates is not None and all_tanh_c is not None:
            block_gates = gates[block.begin : block.end]
            tanh_c = all_tanh_c[block.begin : block.end]
        else:
            assert h_previous is not None
            block_gates = rows.new_empty(count, 4 * hidden_size)
            torch.mm(_inputs(rows, block, weights), input_weights.t(), out=block_gates)
            activate_(torch.addmm(block_gates, h_previous, hh_t, out=block_gates))
            tanh_c = c[block.begin : block.end].tanh()
        i, f, g, o = block_gates.chunk(4, 1)
        torch.cat(c_before[block.first : block.last], out=c_previous)
        # d_gates starts as what d_c (for i, f, g) and d_m (for o) are multiplied by, m = o tanh(c).
        d_i, d_f, d_g, d_o = d_gates.chunk(4, 1)
        _sigmoid_backward(g, i, into=d_i)
        _sigmoid_backward(c_previous, f, into=d_f)
        _tanh_backward(i, g, into=d_g)
        _sigmoid_backward(tanh_c, o, into=d_o)
        through_tanh = c_previous  # its buffer: the derivative of m by c, o * (1 - tanh(c)^2)
        _tanh_backward(o, tanh_c, into=through_tanh)

        d_by_step, d_o_by_step = d_gates.split(block_sizes), d_o.split(block_sizes)
        d_ifg_by_step = d_gates[:, : 3 * hidden_size].unflatten(1, (3, hidden_size))
        d_ifg_by_step = d_ifg_by_step.split(block_sizes)
        f_by_step, through_by_step = f.split(block_sizes), through_tanh.split(block_sizes)
        d_h_by_block = d_h_buffer[:count].split(block_sizes) if d_h_buffer is not None else None
        size = -1
        at_range = range(len(block_sizes))
        for at in at_range if reverse else reversed(at_range):
            step = block.first + at
            if block_sizes[at] != size:
                size = block_sizes[at]
                d_h_t, d_c_t = h_state[:size], c_state[:size]
                d_c_gates = d_c_t.unsqueeze(1)
            if d_h_steps is not None:
                d_h_t.add_(d_h_steps[step])
            if d_c_steps is not None:
                d_c_t.add_(d_c_steps[step])
            if weights.hr is None:
                d_m = d_h_t
            else:
                d_m = torch.mm(d_h_t, weights.hr)
                if d_h_by_block is not None:
                    d_h_by_block[at].copy_(d_h_t)
            d_c_t.addcmul_(d_m, through_by_step[at])
            d_ifg_by_step[at].mul_(d_c_gates)
            d_o_by_step[at].mul_(d_m)
            d_c_t.mul_(f_by_step[at])
            torch.mm(d_by_step[at], weights.hh, out=d_h_t)

        if d_rows is not None:
            torch.mm(d_gates, weights.ih, out=d_rows[block.begin : block.end])
        if d_input_weights is not None:
            _add_product(d_input_weights, d_gates.t(), _inputs(rows, block, weights))
        if d_hh is not None and h_previous is not None:
            _add_product(d_hh, d_gates.t(), h_previous)
        if d_hr is not None and d_h_buffer is not None:
            _add_product(d_hr, d_h_buffer[:count].t(), tanh_c * o)

    d_ih, d_bias = None, None
    if d_input_weights is not None:
        d_ih = d_input_weights[:, : rows.shape[1]].contiguous() if needs_ih else None
        d_bias = d_input_weights[:, -1].clone() if needs_bias else None
    d_biases = twin_gradients(d_bias, needs_bias_ih, needs_bias_hh)
    return Gradients(d_rows, h_state, c_state, (d_ih, d_hh, *d_biases, d_hr))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; FlopCounterMode counts no ``addmm_``."""
    torch.addmm(total, left, right, out=total)


def activate_(gates: Tensor) -> Tensor:
    """Gates ``[..., 4H]`` to their activations, in place."""
    hidden_size = gates.shape[-1] // 4
    i_f, g, o = gates.split([2 * hidden_size, hidden_size, hidden_size], -1)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return gates


def twin_gradients(
    d_bias: Tensor | None, needs_first: bool, needs_second: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both biases: equal, each in memory of its own."""
    if d_bias is None:
        return None, None
    if needs_first and needs_second:
        return d_bias, d_bias.clone()
    return (d_bias, None) if needs_first else (None, d_bias)


def _sigmoid_backward(d_output: Tensor, output: Tensor, *, into: Tensor) -> None:
    if torch_private.saved_tensors_may_change():  # it knows results named `out` alone
        into.copy_(torch.ops.aten.sigmoid_backward(d_output, output))
    else:
        torch.ops.aten.sigmoid_backward.grad_input(d_output, output, grad_input=into)


def _tanh_backward(d_output: Tensor, output: Tensor, *, into: Tensor) -> None:
    if torch_private.saved_tensors_may_change():
        into.copy_(torch.ops.aten.tanh_backward(d_output, output))
    else:
        torch.ops.aten.tanh_backward.grad_input(d_output, output, grad_input=into)


def lstm_composite(
    rows: Tensor,
    sizes: Sequence[int],
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    *,
    reverse: bool,
) -> Forward:
    """:func:`lstm_forward` in differentiable operations, one step after the other.

    Any order of derivative, forward mode and vmap follow from it; it keeps every step's
    intermediate results and is slower.
    """
    gates_x = functional.linear(rows, weights.ih, weights.bias()).split(list(sizes))
    h_steps: list[Tensor] = [h_0] * len(sizes)
    c_steps: list[Tensor] = [c_0] * len(sizes)
    for step in range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes)):
        h_previous = _previous(step, h_steps, h_0, sizes, reverse)
        c_previous = _previous(step, c_steps, c_0, sizes, reverse)
        gates = gates_x[step] + functional.linear(h_previous, weights.hh)
        h_steps[step], c_steps[step] = composite_step(gates, c_previous, weights.hr)
    h = torch.cat(h_steps) if sizes else rows.new_empty(0, h_0.shape[1])
    c = torch.cat(c_steps) if sizes else rows.new_empty(0, weights.hidden_size)
    h_n = _final(h_steps, h_0, sizes, reverse)
    c_n = _final(c_steps, c_0, sizes, reverse)
    return Forward(h, h_n, c_n, c, ())


def composite_step(gates: Tensor, c_previous: Tensor, hr: Tensor | None) -> tuple[Tensor, Tensor]:
    """H and c of one step in differentiable operations, of its gates before their activation."""
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c_previous + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if hr is None else functional.linear(h, hr), c
