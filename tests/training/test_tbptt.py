"""tbptt_chunks and detach_state: what a chunk holds, what is carried, what is learned and kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrnn
from fastrnn.training import detach_state, tbptt_chunks

I, H = 3, 5


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences `[B, T, I]` and targets `[B, T, H]`, NaN after their ends, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    steps = max(lengths)
    x, targets = (torch.randn(len(lengths), steps, f, generator=generator) for f in (I, H))
    padding = torch.arange(steps) >= torch.tensor(lengths)[:, None]
    x[padding], targets[padding] = torch.nan, torch.nan
    return x, targets, torch.tensor(lengths)


def squared_error(out: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    valid = torch.arange(out.shape[1]) < lengths[:, None]
    return (out[valid] - targets[valid]).square().sum()


def in_chunks(
    lstm: Any, x: Tensor, targets: Tensor, lengths: Tensor | None, chunk_len: int, state: Any = None
) -> Any:
    """Accumulate gradients chunk by chunk; returns the final states."""
    for chunk in tbptt_chunks(x, targets, lengths, chunk_len):
        out, after = lstm(chunk.x, chunk.enter(state), lengths=chunk.lengths)
        squared_error(out, chunk.targets, chunk.lengths).backward()
        state = chunk.leave(state, after)
    return state


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk_len", [7, 8, 100], ids="chunk{}".format)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"proj_size": 2}], ids=str)
def test_one_chunk_has_the_gradient_of_full_backpropagation(
    chunk_len: int, options: dict[str, int]
) -> None:
    x, targets, lengths = batch([7, 1, 0, 5])
    targets = targets[..., : options.get("proj_size", H)]
    lstm = fastrnn.LSTM(I, H, batch_first=True, **options)
    out, final = lstm(x, lengths=lengths)
    squared_error(out, targets, lengths).backward()
    whole = gradients(lstm)
    lstm.zero_grad()
    state = in_chunks(lstm, x, targets, lengths, chunk_len)
    torch.testing.assert_close(gradients(lstm), whole)
    torch.testing.assert_close(state, final)


def test_short_chunks_have_another_gradient_and_the_same_states() -> None:
    x, targets, lengths = batch([7, 1, 0, 5])
    lstm = fastrnn.LSTM(I, H, batch_first=True)
    out, final = lstm(x, lengths=lengths)
    squared_error(out, targets, lengths).backward()
    whole = gradients(lstm)
    lstm.zero_grad()
    state = in_chunks(lstm, x, targets, lengths, 2)
    torch.testing.assert_close(state, final)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(gradients(lstm)[:2], whole[:2]))


def test_gradients_are_those_of_each_chunk_from_a_constant_state() -> None:
    x, targets, lengths = batch([5, 3])
    lstm = fastrnn.LSTM(I, H, batch_first=True)
    in_chunks(lstm, x, targets, lengths, 2)
    ours = gradients(lstm)
    lstm.zero_grad()
    plain = nn.LSTM(I, H, batch_first=True)
    plain.load_state_dict(lstm.state_dict())
    for b, length in enumerate([5, 3]):
        state = None
        for start in range(0, length, 2):
            part = slice(start, min(start + 2, length))
            out, state = plain(x[b : b + 1, part], state)
            (out - targets[b : b + 1, part]).square().sum().backward()
            state = (state[0].detach(), state[1].detach())
    torch.testing.assert_close(ours, gradients(plain))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    chunk_len=st.integers(1, 10),
    batch_first=st.booleans(),
)
def test_every_valid_step_is_in_one_chunk(
    lengths: list[int], chunk_len: int, batch_first: bool
) -> None:
    steps = max(lengths)
    x = torch.arange(len(lengths) * steps).view(len(lengths), steps)
    given_x = x if batch_first else x.t()
    seen: list[list[int]] = [[] for _ in lengths]
    chunks = tbptt_chunks(given_x, -given_x, lengths, chunk_len, batch_first=batch_first)
    for number, chunk in enumerate(chunks):
        assert chunk.start == number * chunk_len
        rows, targets = chunk.x, chunk.targets
        assert torch.equal(targets, -rows)
        rows = rows if batch_first else rows.t()
        assert rows.shape == (len(chunk.rows), int(chunk.lengths.max()))
        assert int(chunk.lengths.min()) >= 1
        assert rows.shape[1] <= chunk_len
        for b, row, length in zip(chunk.rows.tolist(), rows, chunk.lengths.tolist()):
            seen[b] += row[:length].tolist()
    assert seen == [row[:length].tolist() for row, length in zip(x, lengths)]


def test_initial_states_enter_and_get_their_gradient() -> None:
    x, targets, lengths = batch([4, 0, 2])
    lstm = fastrnn.LSTM(I, H, batch_first=True)
    initial = tuple(torch.randn(1, 3, H, requires_grad=True) for _ in range(2))
    state = in_chunks(lstm, x, targets, lengths, 2, initial)
    for part, first in zip(state, initial):
        assert torch.equal(part[:, 1], first[:, 1])  # a sequence without a step keeps its own
        assert not part.requires_grad
        assert first.grad is not None
        assert first.grad[:, 0].abs().min() > 0
    expected = lstm(x, initial, lengths=lengths)[1]
    torch.testing.assert_close(state, detach_state(expected))


def test_rows_that_go_on_are_the_ones_that_enter() -> None:
    whole = torch.arange(3.0).view(1, 3, 1)
    x = torch.zeros(3, 4)
    later = list(tbptt_chunks(x, x, [4, 2, 3], 2))[1]
    assert later.rows.tolist() == [0, 2]
    assert later.enter({"h": [whole]})["h"][0].flatten().tolist() == [0, 2]
    after = later.leave({"h": [whole]}, {"h": [torch.tensor([[[10.0], [12.0]]])]})
    assert after["h"][0].flatten().tolist() == [10, 1, 12]
    assert whole.flatten().tolist() == [0, 1, 2]


def test_nothing_is_copied_while_no_sequence_has_ended() -> None:
    x = torch.zeros(2, 6)
    chunks = list(tbptt_chunks(x, x, None, 4))
    assert [chunk.x.data_ptr() - x.data_ptr() for chunk in chunks] == [0, 4 * x.element_size()]
    assert [chunk.x.shape[1] for chunk in chunks] == [4, 2]


class Peak(NamedTuple):
    bytes: Callable[[], int]


@contextmanager
def saved_for_backward() -> Iterator[Peak]:
    """The most bytes that autograd held saved at once; each saved tensor counts for itself."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    now = [0]
    peak = [0]

    def release(size: int) -> None:
        now[0] -= size

    def pack(tensor: Tensor) -> Held:
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        now[0] += size
        peak[0] = max(peak[0], now[0])
        weakref.finalize(held, release, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield Peak(lambda: peak[0])


def peak_of(steps: int, chunk_len: int) -> int:
    x, targets, lengths = batch([steps, steps - 3])
    lstm = fastrnn.LSTM(I, H, batch_first=True)
    with saved_for_backward() as peak:
        in_chunks(lstm, x, targets, lengths, chunk_len)
    return peak.bytes()


def test_memory_does_not_grow_with_the_length() -> None:
    short, long = peak_of(64, 16), peak_of(1024, 16)
    assert long == short
    assert peak_of(1024, 1024) > 20 * long  # full back-propagation through 64 times the steps


def test_detach_state_keeps_the_structure_and_shares_the_memory() -> None:
    class States(NamedTuple):
        h: Tensor
        c: Tensor

    h = torch.ones(2, requires_grad=True) * 2
    detached = detach_state({"a": States(h, h), "b": [h, None], "c": (h,)})
    assert isinstance(detached["a"], States)
    assert isinstance(detached["b"], list)
    assert detached["b"][1] is None
    tensors = [*detached["a"], detached["b"][0], *detached["c"]]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(tensor.data_ptr() == h.data_ptr() for tensor in tensors)
    assert detach_state(None) is None


def test_detach_state_refuses_what_is_no_state() -> None:
    with pytest.raises(TypeError, match="tensors, got str"):
        detach_state("h")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), None, 1), ValueError, r"got \[2, 3\] and \[2, 4\]"),
        ((torch.zeros(2), torch.zeros(2), None, 1), ValueError, r"\[B, T, ...\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), None, 0), ValueError, "at least 1 step, got 0"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [4, 1], 1), ValueError, "at most the 3 steps"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [1], 1), ValueError, r"\[2\] \(one per sequence"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), 1), TypeError, "be integers"),
    ],
    ids=["steps", "rank", "chunk", "too-long", "count", "dtype"],
)
def test_refuses_at_the_call(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tbptt_chunks(*arguments)
