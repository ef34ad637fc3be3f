"""The environment's switches: what each is for, and its value, checked.

A process reads each once, when it is first asked for.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch


class Switch(NamedTuple):
    """One environment variable.

    Attributes:
        name: of the variable.
        values: that it can have; empty means that it is not set.
        default: what holds where it is not set.
        meaning: for the user.
    """

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str


SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "FASTRNN_BACKEND",
            ("torch", "reference"),
            "",
            "computes every LSTM so, whatever its backend is, and clips without a kernel",
        ),
        Switch(
            "FASTRNN_CHECK",
            ("0", "first", "always"),
            "first",
            "when a kernel is compared with the reference: never; before its first use on this "
            "machine; before its first use in each process",
        ),
        Switch("FASTRNN_TUNE", ("0", "1"), "0", "measures each new class of calls as it comes"),
        Switch("FASTRNN_LOG", ("paths",), "", "logs which way computes each class of calls"),
        Switch(
            "FASTRNN_ASSERT_NO_SPILL",
            ("0", "1"),
            "0",
            "makes it an error that a kernel spills registers to memory",
        ),
    )
}
# Of others, what decides about kernels and where caches are.
OTHERS = ("XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CC")
PREFIXES = ("FASTRNN_", "TRITON_", "CUDA_MPS_")


@functools.cache
def switch(name: str) -> str:
    """The value of a switch; its default where it is not set.

    Raises:
        ValueError: it has a value that it cannot have.
    """
    known = SWITCHES[name]
    value = os.environ.get(name) or known.default
    if value not in (known.default, *known.values):
        raise ValueError(f"{name} must be one of {', '.join(known.values)}, got {value!r}")
    return value


def forced_backend() -> str:
    """What FASTRNN_BACKEND puts in the place of every module's backend; empty where it does not."""
    return switch("FASTRNN_BACKEND")


# A constant to torch.compile, which would trace the cached function; see can_run_triton.
forced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tunes_at_first_sight(device: torch.device) -> bool:
    """Whether FASTRNN_TUNE asks for a measurement now: not while a CUDA graph is being captured."""
    if torch.compiler.is_compiling() or switch("FASTRNN_TUNE") != "1":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def surroundings() -> dict[str, str]:
    """The variables that are set and matter here, sorted by name."""
    names = (name for name in os.environ if name in OTHERS or name.startswith(PREFIXES))
    return {name: os.environ[name] for name in sorted(names)}


def misspelt() -> list[str]:
    """Names that begin as switches do and are none."""
    return [name for name in surroundings() if name.startswith("FASTRNN_") and name not in SWITCHES]
