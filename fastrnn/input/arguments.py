"""Lengths, masks and resets as a caller gives them: checked, and in one form.

What does not fit is refused with what was expected, what came, and what to do. Values that are on
the host are looked at; those elsewhere are checked where they are, without waiting for them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from fastrnn import torch_private
from fastrnn.input.transforms import under_functorch, unwrapped

Lengths: TypeAlias = Tensor | Sequence[int]


class KnownLengths(NamedTuple):
    """Lengths that fit their input.

    Attributes:
        tensor: ``[B]`` int64.
        values: the same numbers, where they are on the host; else None.
    """

    tensor: Tensor
    values: list[int] | None


def check_lengths(lengths: Lengths | int, batch: int, steps: int, exact: bool) -> Tensor:
    """``lengths`` as ``[B]`` int64, refused with the reason where it does not fit the input.

    Args:
        lengths: ``[B]`` integers in [0, T]; one number is refused.
        batch: B.
        steps: T.
        exact: whether the values may be looked at.
    """
    checked = known_lengths(lengths, batch, steps, exact).tensor
    if not exact:
        assert_within(checked, steps)
    return checked


def known_lengths(
    lengths: Lengths | int, batch: int, steps: int, exact: bool, own: Tensor | None = None
) -> KnownLengths:
    """The same as :func:`check_lengths`, with the values where they may be looked at.

    Args:
        lengths: see there, and so are the next three.
        batch: see there.
        steps: see there.
        exact: see there.
        own: ``[B]``, lengths that the input brings with it, which none may exceed. Default: T.
    """
    if isinstance(lengths, Tensor):
        tensor, values = _integers(lengths), None
    else:
        values = _listed(lengths, batch)
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    if tuple(tensor.shape) != (batch,):
        raise ValueError(
            f"lengths must have shape [{batch}] (one per sequence), got {list(tensor.shape)}"
        )
    if not exact:
        return KnownLengths(tensor, None)  # for assert_within, where the data are
    if values is None:
        values = host_values("lengths", tensor)
    if values and min(values) < 0:
        raise ValueError(f"lengths must not be negative, got {min(values)}")
    if own is not None:
        _check_within(values, host_values("the input's lengths", own))
    elif values and max(values) > steps:
        raise ValueError(
            f"lengths must be at most the {steps} steps of the input, got {max(values)}; "
            "pad the input to the longest sequence"
        )
    return KnownLengths(tensor, values)


def assert_within(lengths: Tensor, steps: int, own: Tensor | None = None) -> None:
    """Lengths checked where the data are, without waiting for them; arguments as above."""
    compiling = torch.compiler.is_compiling()
    if compiling and under_functorch():
        return  # a graph cannot look behind vmap; scatter_add refuses such lengths there
    most = steps if own is None else own.to(lengths.device, non_blocking=True)
    whole = lengths if compiling else unwrapped(lengths)  # vmap has no rule for the assertion
    fits = ((whole >= 0) & (whole <= most)).all()
    limit = "T the steps of the input" if own is None else "T the input's own lengths"
    torch_private.assert_async(fits, f"lengths must lie in [0, T], {limit}")


def _check_within(values: Sequence[int], own: Sequence[int]) -> None:
    """Beyond its own length a packed or jagged sequence has nothing to read."""
    for index, (length, has) in enumerate(zip(values, own, strict=True)):
        if length > has:
            raise ValueError(
                f"lengths must be at most those of the input itself, got {length} for sequence "
                f"{index}, which has {has} steps"
            )


def check_flags(name: str, flags: Tensor, shape: Sequence[int], order: str) -> Tensor:
    """A mask or resets, refused with the reason where it does not fit the input.

    Args:
        name: of the argument.
        flags: what was given.
        shape: what it must have.
        order: which axes those are, and why.
    """
    _check_bool(name, flags)
    if list(flags.shape) != list(shape):
        raise ValueError(f"{name} must have shape {list(shape)} ({order}), got {list(flags.shape)}")
    return flags.detach()


def batched_flags(name: str, flags: Tensor | None, steps: int, dim: int) -> Tensor | None:
    """A mask or resets of one unbatched sequence, with the batch's axis.

    Args:
        name: of the argument.
        flags: ``[T]``, or None.
        steps: T.
        dim: where the batch goes.
    """
    if flags is None:
        return None
    _check_bool(name, flags)
    if list(flags.shape) != [steps]:
        raise ValueError(
            f"{name} of an unbatched sequence must have shape [{steps}] (one per step), got "
            f"{list(flags.shape)}"
        )
    return flags.unsqueeze(dim)


def batched_length(lengths: Lengths | int | None) -> Lengths | None:
    """The length of one unbatched sequence, which may come as a number, as a list or tensor."""
    if lengths is None:
        return None
    if isinstance(lengths, Tensor):
        return lengths.reshape(1) if lengths.dim() == 0 else lengths
    return [operator.index(lengths)] if _is_number(lengths) else cast(Lengths, lengths)


def host_values(name: str, tensor: Tensor) -> list[int]:
    """The numbers of a tensor on the host.

    Raises:
        ValueError: it has none: on meta, under FakeTensorMode, while something traces.
    """
    try:
        values: list[int] = tensor.tolist()
    except (RuntimeError, NotImplementedError) as error:
        raise _without_values(name, tensor) from error
    return values


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor on meta, of which no copy can be made on the input's device."""
    if tensor.is_meta and device.type != "meta":
        raise _without_values(name, tensor)


def _without_values(name: str, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{name} must have values, got a {type(tensor).__name__} on {tensor.device} that has none; "
        "on meta, under a fake mode and while tracing give lengths as a list"
    )


def _check_bool(name: str, flags: Tensor) -> None:
    if not isinstance(flags, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(flags).__name__}")
    if flags.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {flags.dtype}; use {name}.bool()")


def _integers(lengths: Tensor) -> Tensor:
    """A tensor of integers as int64."""
    dtype = lengths.dtype
    if dtype == torch.int64:
        return lengths
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {dtype}")
    return lengths.to(torch.int64)


def _listed(lengths: Any, batch: int) -> list[int]:
    """The numbers of anything that lists them in the order of the batch."""
    if isinstance(lengths, (Set, Mapping)):
        raise TypeError(
            "lengths must be a list or tensor in the order of the batch, got a "
            f"{type(lengths).__name__}, which has an order of its own"
        )
    if _is_number(lengths):
        raise TypeError(
            f"lengths must be integers, one per sequence, got {lengths!r}; for a batch of equal "
            f"lengths use [{operator.index(lengths)}] * {batch}"
        )
    try:
        values = lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)
        if set(map(type, values)) <= {int}:
            return values
        if not all(map(_is_number, values)):
            raise TypeError("not integers")
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise TypeError(f"lengths must be integers, one per sequence, got {lengths!r}") from error


def _is_number(value: Any) -> TypeGuard[SupportsIndex]:
    """Whether it is one integer: Python's, numpy's, or a tensor of no dimension."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return False
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
