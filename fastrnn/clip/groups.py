"""The parameters of a clipper, in the groups that are clipped each by its own norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

Parameters: TypeAlias = (
    Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
)


class Group(NamedTuple):
    """Parameters clipped by one norm.

    max_norm: the largest norm allowed; inf where none is scaled.
    names: of the parameters; where none was given, the place among all parameters.
    parameters: at least one that counts.
    scaled: which of them are scaled; the others are only measured.
    counted: the norms of which of them make up the group's.
    plain: whether all are scaled and count.
    """

    max_norm: float
    names: list[str]
    parameters: list[Tensor]
    scaled: list[bool]
    counted: list[bool]
    plain: bool = True


def read_groups(parameters: Parameters, max_norm: float) -> list[Group]:
    """Read the parameters that a clipper is given.

    Args:
        parameters: see :class:`fastrnn.GradientClipper`.
        max_norm: of the groups that name none; these become one.

    Raises:
        TypeError: a parameter is no tensor, or one of FSDP1's.
        ValueError: there are no parameters, one comes twice, a max_norm is below 0 or NaN, or none
            counts in a norm.
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
        clip, count = bool(entry.get("clip", True)), bool(entry.get("count", True))
        if own is not None and not (clip and count):
            raise ValueError(
                "a group with a max_norm of its own has to be clipped and to count; leave out its "
                '"max_norm", or "clip" and "count"'
            )
        if own is None and shared is not None:
            group = shared
        else:
            group = Group(max_norm if own is None else _checked_max_norm(own), [], [], [], [])
            groups.append(group)
            shared = group if own is None else shared
        members = entry["params"]
        members = [members] if isinstance(members, Tensor) else members
        if (param_names := entry.get("param_names")) is not None:  # an optimizer's
            members = zip(param_names, members)
        for member in members:
            name, parameter = member if isinstance(member, tuple) else (str(len(seen)), member)
            _check_parameter(name, parameter)
            if id(parameter) in seen:
                raise ValueError(f"a parameter comes twice: {name}, of shape {[*parameter.shape]}")
            seen.add(id(parameter))
            group.names.append(name)
            group.parameters.append(parameter)
            group.scaled.append(clip)
            group.counted.append(count)
    if not groups or not all(group.parameters for group in groups):
        raise ValueError(
            "there are no parameters to clip, or none in one of the groups; a generator may have "
            "been used up already"
        )
    if not all(any(group.counted) for group in groups):
        raise ValueError(
            'no parameter counts in the norm: "count": False is for some of the groups, not for all'
        )
    return [
        group._replace(
            max_norm=group.max_norm if any(group.scaled) else math.inf,
            plain=all(group.scaled) and all(group.counted),
        )
        for group in groups
    ]


def _check_parameter(name: str, parameter: Any) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameters must be tensors, got a {type(parameter).__name__}")
    if getattr(parameter, "_fsdp_flattened", False):  # FSDP1 marks what it has flattened so
        raise TypeError(
            f"parameter {name} belongs to FullyShardedDataParallel, which shards it without saying "
            "so: each process would find a norm of its own. Call the module's clip_grad_norm_ "
            "(FullyShardedDataParallel.clip_grad_norm_), or shard by fully_shard (FSDP2)"
        )


def _checked_max_norm(max_norm: float) -> float:
    max_norm = float(max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    return max_norm
