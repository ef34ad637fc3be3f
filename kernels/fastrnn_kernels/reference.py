"""The recurrence over packed rows in plain PyTorch, any dtype: what the kernels are held against.

By the tests, and on a user's GPU before a kernel is trusted (checking.py). One row range after
another, with nothing in common with the kernels but the equations. tests/kernels compare it with
nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Callable
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
