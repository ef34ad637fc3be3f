"""The recurrence over packed rows in plain PyTorch, any dtype: the oracle of the kernels' tests.

Written for these tests alone, one row range after another, with nothing in common with the kernels
but the equations. test_reference.py compares it with nn.LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Lengths sorted in decreasing order, as rows: PackedSequence's order."""

    lengths: tuple[int, ...]
    T: int

    @property
    def batch_sizes(self) -> torch.Tensor:
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.stack([(lengths > t).sum() for t in range(self.T)])

    @property
    def offsets(self) -> torch.Tensor:
        return self.batch_sizes.cumsum(0) - self.batch_sizes

    @property
    def N(self) -> int:
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
) -> tuple[torch.Tensor, ...]:
    """h [N, D, H], h_n, c_n [D, S, H], gates [N, D, 4H], c [N, D, H]; differentiable."""
    N, D, H = gates_x.shape[0], gates_x.shape[1], gates_x.shape[2] // 4
    sizes, offsets = rows.batch_sizes.tolist(), rows.offsets.tolist()
    h_rows, c_rows, gate_rows, h_n, c_n = [], [], [], [], []
    for d in range(D):
        h, c = h_0[d], c_0[d]
        h_of, c_of, gates_of = {}, {}, {}
        for t in range(rows.T) if d == 0 else reversed(range(rows.T)):
            n = sizes[t]
            a = gates_x[offsets[t] : offsets[t] + n, d] + h[:n] @ weight_hh[d].T
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
