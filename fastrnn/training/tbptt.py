"""Truncated back-propagation through time: sequences in chunks, the state carried between them.

Memory for the backward pass is that of one chunk, however long the sequences are. What a step
learns from is its own chunk; what came before reaches it through the state alone.

Source: R. J. Williams and J. Peng, "An efficient gradient-based algorithm for on-line training of
recurrent network trajectories", Neural Computation 2(4), 1990; here with both of its intervals
equal to the chunk's length, as is usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fastrnn.input.arguments import Lengths, check_lengths

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive steps of those sequences of a batch that have not ended; B' of B.

    Attributes:
        x: ``[B', t, ...]``, or ``[t, B', ...]`` where not ``batch_first``; t is the longest of
            ``lengths``, at most ``chunk_len``.
        targets: of these steps, in the same order of dimensions.
        lengths: ``[B']`` int64 on the CPU, each in [1, t]: the chunk's valid steps.
        rows: ``[B']`` int64 on the CPU, which sequences of the batch these are, ascending.
        start: how many steps came before.
        batch: B.
    """

    x: Tensor
    targets: Tensor
    lengths: Tensor
    rows: Tensor
    start: int
    batch: int

    def enter(self, state: State) -> State:
        """The states that this chunk's sequences start from.

        Args:
            state: of the whole batch: a tensor ``[..., B, F]``, or tuples, lists or dicts of such,
                as ``(h, c)``; None for zeros.

        Returns:
            The same with B' rows. Nothing is detached, so that gradients reach an initial state
            that is a parameter.
        """
        if len(self.rows) == self.batch:
            return state
        entering: State = _map(lambda rows: rows.index_select(-2, self._rows_on(rows)), state)
        return entering

    def leave(self, state: State, after: State) -> State:
        """The state of the whole batch after this chunk, cut off from the graph.

        Args:
            state: of the whole batch before this chunk, as given to :meth:`enter`.
            after: of this chunk's sequences after it, ``[..., B', F]``, as the LSTM returns it.

        Returns:
            `after`, detached, in the rows of these sequences, and `state` in the others: a sequence
            that has ended keeps its final state, one without any step its initial one.
        """
        if len(self.rows) == self.batch:
            return detach_state(after)
        if state is None:
            state = _map(self._zeros, after)

        def put(whole: Tensor, part: Tensor) -> Tensor:
            return whole.detach().index_copy(-2, self._rows_on(whole), part.detach().to(whole))

        left: State = _map(put, state, after)
        return left

    def _zeros(self, part: Tensor) -> Tensor:
        return part.new_zeros(*part.shape[:-2], self.batch, part.shape[-1])

    def _rows_on(self, like: Tensor) -> Tensor:
        return self.rows.to(like.device)


def tbptt_chunks(
    x: Tensor,
    targets: Tensor,
    lengths: Lengths | None,
    chunk_len: int,
    *,
    batch_first: bool = True,
) -> Iterator[Chunk]:
    """Cut a ragged batch into chunks of at most `chunk_len` steps, first to last.

    ```
    state = None
    for chunk in tbptt_chunks(x, targets, lengths, chunk_len=64):
        out, after = lstm(chunk.x, chunk.enter(state), lengths=chunk.lengths)
        optimizer.zero_grad()
        loss(out, chunk.targets, chunk.lengths).backward()
        optimizer.step()
        state = chunk.leave(state, after)
    # state: the final states of all B sequences
    ```

    A sequence that has ended drops out of the chunks after it, so the last chunks hold fewer
    sequences, and the very last may hold fewer steps. Where `chunk_len` is at least the longest
    sequence there is one chunk, and its gradient is that of full back-propagation. Resets, or
    whatever else each step has, are cut by ``[chunk.rows, chunk.start : chunk.start + t]``.

    Args:
        x: ``[B, T, ...]``: features or token numbers, any dtype.
        targets: ``[B, T, ...]``: one for each step.
        lengths: ``[B]`` integers in [0, T], the leading steps that are valid; None: all. On a GPU
            they are copied to the host once.
        chunk_len: the most steps in a chunk, at least 1.
        batch_first: whether B comes before T in `x` and `targets`. Default: True.

    Yields:
        The chunks. Slices of `x` and `targets`, copied only where a sequence has dropped out; what
        stands after a sequence's end may be in them, so the loss must be given the lengths.

    Raises:
        ValueError: a shape, a length or `chunk_len` that does not fit; at the call, not later.
        TypeError: lengths that are not integers.
    """
    first, second = ("B", "T") if batch_first else ("T", "B")
    if x.dim() < 2 or x.shape[:2] != targets.shape[:2]:
        raise ValueError(
            f"x and targets must have shapes [{first}, {second}, ...] with one {first} and one "
            f"{second}, got {list(x.shape)} and {list(targets.shape)}"
        )
    if chunk_len < 1:
        raise ValueError(f"chunk_len must be at least 1 step, got {chunk_len}")
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if isinstance(lengths, Tensor):
        lengths = lengths.cpu()
    on_host = check_lengths([steps] * batch if lengths is None else lengths, batch, steps, True)
    return _chunks(x, targets, on_host, chunk_len, 0 if batch_first else 1)


def _chunks(
    x: Tensor, targets: Tensor, lengths: Tensor, chunk_len: int, batch_dim: int
) -> Iterator[Chunk]:
    longest = int(lengths.max()) if len(lengths) else 0
    for start in range(0, longest, chunk_len):
        rows = (lengths > start).nonzero().squeeze(1)
        left = (lengths[rows] - start).clamp(max=chunk_len)
        width = int(left.max())
        parts = [part.narrow(1 - batch_dim, start, width) for part in (x, targets)]
        if len(rows) < len(lengths):
            parts = [part.index_select(batch_dim, rows.to(part.device)) for part in parts]
        yield Chunk(parts[0], parts[1], left, rows, start, len(lengths))


def detach_state(state: State) -> State:
    """The same state, cut off from the graph that computed it.

    Args:
        state: a tensor, or tuples, lists or dicts of such, as ``(h, c)``; None stays None.

    Returns:
        The same structure with detached tensors, which share the memory of those given.

    Raises:
        TypeError: something else is among them.
    """
    detached: State = _map(Tensor.detach, state)
    return detached


def _map(function: Any, state: Any, *others: Any) -> Any:
    """`function` of each tensor of a nested state, and of those in the same place of `others`."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, dict):
        return {key: _map(function, state[key], *(o[key] for o in others)) for key in state}
    if isinstance(state, (tuple, list)):
        mapped = [_map(function, *parts) for parts in zip(state, *others, strict=True)]
        if hasattr(state, "_fields"):  # a named tuple
            return type(state)(*mapped)
        return type(state)(mapped)
    raise TypeError(
        "a state must be a tensor, or tuples, lists or dicts of tensors, got "
        f"{type(state).__name__}"
    )
