"""What the kernels compute, in plain PyTorch, any dtype: what they are held against.

By the tests, and on a user's GPU before a kernel is trusted (checking.py). One row range after
another, with nothing in common with the kernels but the equations. tests/kernels compare it with
nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Lengths sorted in decreasing order, as rows: PackedSequence's order.

    Attributes:
        lengths: of the sequences.
        T: steps.
    """

    lengths: tuple[int, ...]
    T: int

    @property
    def batch_sizes(self) -> torch.Tensor:
        """Active sequences of each step [T]."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.stack([(lengths > t).sum() for t in range(self.T)])

    @property
    def offsets(self) -> torch.Tensor:
        """First row of each step [T]."""
        return self.batch_sizes.cumsum(0) - self.batch_sizes

    @property
    def N(self) -> int:
        """Valid rows."""
        return sum(self.lengths)


def rows_of(*lengths: int, T: int | None = None) -> Rows:
    """Rows for these lengths; T may exceed the longest (steps in which nobody is active)."""
    ordered = tuple(sorted(lengths, reverse=True))
    return Rows(ordered, max(ordered) if T is None else T)


def reference(
    gates_x: torch.Tensor,
    weight_hh: torch.Tensor,
    h_0: torch.Tensor,
    c_0: torch.Tensor,
    rows: Rows,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> tuple[torch.Tensor, ...]:
    """The forward pass; differentiable.

    Args:
        gates_x: as the launchers take it [N, D, 4H]; N may exceed the valid rows.
        weight_hh: recurrent weights [D, 4H, H].
        h_0: initial hidden state [D, S, H].
        c_0: initial cell state [D, S, H].
        rows: which rows there are.
        product: of h and a transposed weight.

    Returns:
        h [N, D, H], h_n, c_n [D, S, H], gates [N, D, 4H], c [N, D, H].
    """
    N, D, H = gates_x.shape[0], gates_x.shape[1], gates_x.shape[2] // 4
    sizes, offsets = rows.batch_sizes.tolist(), rows.offsets.tolist()
    h_rows, c_rows, gate_rows, h_n, c_n = [], [], [], [], []
    for d in range(D):
        h, c = h_0[d], c_0[d]
        h_of, c_of, gates_of = {}, {}, {}
        for t in range(rows.T) if d == 0 else reversed(range(rows.T)):
            n = sizes[t]
            a = gates_x[offsets[t] : offsets[t] + n, d] + product(h[:n], weight_hh[d].T)
            i, f, g, o = a.split(H, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            new_c = f * c[:n] + i * g
            new_h = o * new_c.tanh()
            h, c = torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]])
            h_of[t], c_of[t], gates_of[t] = new_h, new_c, torch.cat([i, f, g, o], dim=1)
        steps = range(rows.T)
        rest = gates_x.new_zeros(N - rows.N, 4 * H)
        h_rows.append(torch.cat([*(h_of[t] for t in steps), rest[:, :H]]))
        c_rows.append(torch.cat([*(c_of[t] for t in steps), rest[:, :H]]))
        gate_rows.append(torch.cat([*(gates_of[t] for t in steps), rest]))
        h_n.append(h)
        c_n.append(c)
    return (
        torch.stack(h_rows, dim=1),
        torch.stack(h_n),
        torch.stack(c_n),
        torch.stack(gate_rows, dim=1),
        torch.stack(c_rows, dim=1),
    )


def reference_previous(h: torch.Tensor, h_0: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The state before each row [D, N, H], as `previous_states.previous_states` has it."""
    N, D, H = h.shape
    sizes, offsets = rows.batch_sizes.tolist(), rows.offsets.tolist()
    found = h.new_zeros(D, N, H)
    for t, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        for d, before in enumerate((t - 1, t + 1)[:D]):
            known = min(size, sizes[before]) if 0 <= before < rows.T else 0
            found[d, offset : offset + size] = h_0[d, :size]
            if known:
                source = offsets[before]
                found[d, offset : offset + known] = h[source : source + known, d]
    return found


def reference_layout(
    valid: Sequence[Sequence[bool]], resets: Sequence[Sequence[bool]] | None, *, time_major: bool
) -> dict[str, torch.Tensor]:
    """The layout of a padded batch, step by step on the host.

    Args:
        valid: which steps are [B][T].
        resets: before which the state is zeroed [B][T].
        time_major: whether the flattened input is [T, B], or else [B, T].

    Returns:
        The fields of `bounded_layout.BoundedLayout`, but for those that are None.
    """
    B, T = len(valid), len(valid[0])
    N, slots_each = B * T, 1 if resets is None else T
    slots: list[list[int]] = [[] for _ in range(B * slots_each)]  # the places of their steps
    last_slots, keeps = [], []
    for b in range(B):
        count = begin = 0
        reset, keeps_h_0 = False, True
        for t in range(T):
            reset |= resets is not None and resets[b][t]
            if valid[b][t]:
                begin = count if reset else begin
                keeps_h_0 &= count > 0 or not reset
                slots[b * slots_each + begin].append(t * B + b if time_major else b * T + t)
                count, reset = count + 1, False
        last_slots.append(b * slots_each + begin)
        keeps.append(keeps_h_0)
    order = sorted(range(len(slots)), key=lambda slot: -len(slots[slot]))
    active, sizes, places = [slots[slot] for slot in order], [], []
    for t in range(T):
        while active and len(active[-1]) <= t:
            active.pop()
        sizes.append(len(active))
        places += [steps[t] for steps in active]
    used, batch_sizes = len(places), torch.tensor(sizes)
    spread = torch.full((N,), N - 1)
    spread[places] = torch.arange(used)
    ranks = torch.tensor(order).argsort()
    first_slots, last = torch.arange(B) * slots_each, torch.tensor(last_slots)
    found = {
        "fits": torch.tensor(True),
        "batch_sizes": batch_sizes,
        "offsets": batch_sizes.cumsum(0) - batch_sizes,
        "gather": torch.tensor(places + [0] * (N - used)),
        "valid": (torch.arange(N) < used).unsqueeze(1),
        "spread": spread,
        "owner": torch.tensor(order) // slots_each,
        "leaves": ranks[last].unsqueeze(0),
    }
    if resets is not None:
        enters = torch.zeros(2, len(slots), dtype=torch.bool)
        enters[0, ranks[first_slots]] = torch.tensor(keeps)
        enters[1, ranks[last]] = True
        found |= {"enters": enters, "leaves": torch.stack((ranks[last], ranks[first_slots]))}
    return found
