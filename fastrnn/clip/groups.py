"""The parameters of a clipper, in the groups that are clipped each by its own norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

Parameters: TypeAlias = (
    Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
)


class Group(NamedTuple):
    """Parameters clipped by one norm.

    max_norm: the largest norm allowed.
    names: of the parameters; where none was given, the place among all parameters.
    parameters: at least one.
    """

    max_norm: float
    names: list[str]
    parameters: list[Tensor]


def read_groups(parameters: Parameters, max_norm: float) -> list[Group]:
    """Read the parameters that a clipper is given.

    Args:
        parameters: see :class:`fastrnn.GradientClipper`.
        max_norm: of the groups that name none; these become one.

    Raises:
        TypeError: a parameter is no tensor.
        ValueError: there are no parameters, one comes twice, or a max_norm is below 0 or NaN.
    """
    if isinstance(parameters, Optimizer | nn.Module):
        has = "param_groups" if isinstance(parameters, Optimizer) else "parameters()"
        name = type(parameters).__name__
        raise TypeError(f"parameters must be tensors or param groups, got a {name}; pass its {has}")
    given: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not all(isinstance(entry, dict) for entry in given):
        given = [{"params": given}]
    max_norm = _checked_max_norm(max_norm)
    groups: list[Group] = []
    shared: Group | None = None
    seen: set[int] = set()
    for entry in given:
        own = entry.get("max_norm")
        if own is None and shared is not None:
            group = shared
        else:
            group = Group(max_norm if own is None else _checked_max_norm(own), [], [])
            groups.append(group)
            shared = group if own is None else shared
        members = entry["params"]
        members = [members] if isinstance(members, Tensor) else members
        if (param_names := entry.get("param_names")) is not None:  # an optimizer's
            members = zip(param_names, members)
        for member in members:
            name, parameter = member if isinstance(member, tuple) else (str(len(seen)), member)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters must be tensors, got a {type(parameter).__name__}")
            if id(parameter) in seen:
                raise ValueError(f"a parameter comes twice: {name}, of shape {[*parameter.shape]}")
            seen.add(id(parameter))
            group.names.append(name)
            group.parameters.append(parameter)
    if not groups or not all(group.parameters for group in groups):
        raise ValueError(
            "there are no parameters to clip, or none in one of the groups; a generator may have "
            "been used up already"
        )
    return groups


def _checked_max_norm(max_norm: float) -> float:
    max_norm = float(max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    return max_norm
