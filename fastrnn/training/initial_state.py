"""An initial state that is learned rather than zero."""

from __future__ import annotations

from torch import Tensor, nn


class LearnedInitialState(nn.Module):
    """Parameters `h_0` and `c_0`, the same for every sequence of a batch.

    ```
    initial = LearnedInitialState(lstm)
    out, (h_n, c_n) = lstm(x, initial(batch=len(x)), lengths=lengths)
    ```

    Args:
        lstm: fastrnn.LSTM or nn.LSTM, whose sizes, dtype and device are taken; it is not kept.

    Attributes:
        h_0: `[L * D, P]`, zeros at first, which is where an LSTM starts without it.
        c_0: `[L * D, H]`, likewise.
    """

    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
        weight = next(lstm.parameters())
        self.h_0 = nn.Parameter(weight.new_zeros(rows, lstm.proj_size or lstm.hidden_size))
        self.c_0 = nn.Parameter(weight.new_zeros(rows, lstm.hidden_size))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """The states of `batch` sequences: `(h_0 [L * D, B, P], c_0 [L * D, B, H])`, contiguous."""
        h_0, c_0 = (
            state[:, None].expand(-1, batch, -1).contiguous() for state in (self.h_0, self.c_0)
        )
        return h_0, c_0

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"h_0={list(self.h_0.shape)}, c_0={list(self.c_0.shape)}"
