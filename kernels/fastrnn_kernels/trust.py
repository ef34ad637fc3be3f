"""Which kernels may be used on the GPU at hand: those that have passed a check there.

The first launch of a variant (what is compiled: pass, H, D, dtype, precision, what is saved, tile)
is preceded by a small problem that must agree with the reference (checking.py). Verdicts are kept
on disk beside the measured tiles, by GPU, driver, Triton and the kernels' source: later processes
only look them up. What fails, or is refused by a compiler, a driver or the GPU, is warned of once
and not tried again: the launch is a :class:`CannotLaunch`, and callers take another way.

FASTRNN_CHECK says when: "first" (the default), "always" (once in each process, whatever was kept),
"0" (never; then only chips are used that the offline gate has compiled for).

While a CUDA graph is captured nothing can be checked: a variant that is not known is an error then.

Limits: refusals are kept for the process and not on disk, for a compiler can be installed and a GPU
be free again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch

from . import checking
from .failed_waits import BarrierTimeout, failed_waits
from .kept_store import KeptStore
from .launch import CannotLaunch
from .tile_store import SOURCES
from .tiling import CHIPS, Chip, Tile
from .torch_private import cuda_driver_version

CheckMode = Literal["0", "first", "always"]

_log = logging.getLogger("fastrnn")


class NotChecked(RuntimeError):
    """A CUDA graph is being captured, and a kernel in it has not been checked before."""


class RecurrenceVariant(NamedTuple):
    """A kernel of the recurrence, as it is compiled.

    Attributes:
        which: "forward" or "backward".
        device: of the tensors.
        H: hidden units.
        D: directions.
        dtype: of the tensors.
        input_precision: of float32 products.
        option: what is saved, forward; whether there is a d_c, backward.
        tile: how it is cut.
    """

    which: Literal["forward", "backward"]
    device: torch.device
    H: int
    D: int
    dtype: torch.dtype
    input_precision: str
    option: Any
    tile: Tile

    def compiled(self) -> RecurrenceVariant:
        """Without the number of batch programs, which is the grid's."""
        return self._replace(tile=replace(self.tile, batch_programs=1))

    def check(self) -> str | None:
        """See checking.py."""
        check: Any = checking.check_forward if self.which == "forward" else checking.check_backward
        shape = (self.H, self.D, self.dtype, self.input_precision)
        found: str | None = check(self.tile, *shape, self.option, self.device)
        return found

    def layer(self) -> Hashable:
        """What a layer is known by before its batch is."""
        return (_with_index(self.device), self.dtype, self.H, self.D)

    def __str__(self) -> str:
        tile = self.tile
        cut = (tile.BLOCK_B, tile.BLOCK_H, tile.BLOCK_K, tile.num_warps, tile.groups)
        words = (self.which, f"H{self.H}", f"D{self.D}", str(self.dtype).removeprefix("torch."))
        rest = (self.input_precision, str(self.option), tile.residency, *map(str, cut))
        return "/".join((*words, *rest, str(tile.in_flight)))


class NormVariant(NamedTuple):
    """The gradients' kernel, as it is compiled.

    Attributes:
        device: of the gradients.
        norm_type: the order of the norm.
        dtypes: of the gradients.
        options: of `gradient_norm.clip_gradients`, as pairs.
    """

    device: torch.device
    norm_type: float
    dtypes: tuple[torch.dtype, ...]
    options: tuple[tuple[str, Any], ...]

    def compiled(self) -> NormVariant:
        """Itself."""
        return self

    def check(self) -> str | None:
        """See checking.py."""
        return checking.check_norm(self.norm_type, self.dtypes, dict(self.options), self.device)

    def layer(self) -> Hashable:
        """The device: the kernel knows no layers."""
        return ("norm", _with_index(self.device))

    def __str__(self) -> str:
        dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        options = "/".join(f"{name}={value}" for name, value in self.options)
        return f"norm-{self.norm_type}/{dtypes}/{options}"


class HelperVariant(NamedTuple):
    """A kernel around the others, as it is compiled; one of those that wait for nobody.

    Attributes:
        which: "threshold" of clips, "layout", or "previous" states.
        device: of the tensors.
        options: of its check in checking.py, as pairs.
    """

    which: Literal["threshold", "layout", "previous"]
    device: torch.device
    options: tuple[tuple[str, Any], ...]

    def compiled(self) -> HelperVariant:
        """Itself."""
        return self

    def check(self) -> str | None:
        """See checking.py."""
        checks: dict[str, Callable[..., str | None]] = {
            "threshold": checking.check_threshold,
            "layout": checking.check_layout,
            "previous": checking.check_previous,
        }
        return checks[self.which](**dict(self.options), device=self.device)

    def layer(self) -> Hashable:
        """The layer's own where its backward needs the kernel; else the device."""
        device = _with_index(self.device)
        if self.which == "previous":
            options = dict(self.options)
            return (device, options["dtype"], options["H"], options["D"])
        return (self.which, device)

    def __str__(self) -> str:
        options = (f"{name}={value}".replace("torch.", "") for name, value in self.options)
        return "/".join((self.which, *options))


Variant = RecurrenceVariant | NormVariant | HelperVariant


def _verdict_from(entry: Any) -> str | None:
    if not (entry is None or isinstance(entry, str)):
        raise ValueError(f"a verdict is null or a reason, got {entry!r}")
    return entry


_CHECKED = (
    *("launch.py", "compiler_options.py", "checking.py", "reference.py"),
    *("bounded_layout.py", "previous_states.py"),
    *("gradient_kernel.py", "gradient_norm.py", "gradient_table.py", "gradient_threshold.py"),
)
verdicts: KeptStore[str | None] = KeptStore(
    "verdicts", "verdicts of checks", "let them be made again", SOURCES + _CHECKED, _verdict_from
)
_trusted: set[Variant] = set()
_refused: dict[Variant, str] = {}
_refused_layers: dict[Hashable, str] = {}


def check_mode() -> CheckMode:
    """What FASTRNN_CHECK says.

    Raises:
        ValueError: nothing that it can.
    """
    given = os.environ.get("FASTRNN_CHECK") or "first"
    for mode in get_args(CheckMode):
        if given == mode:
            return mode
    raise ValueError(f"FASTRNN_CHECK must be one of {', '.join(get_args(CheckMode))}, got {given}")


def refusal(device: torch.device, dtype: torch.dtype, H: int, D: int) -> str | None:
    """Why such a layer was refused before in this process; None where none was."""
    if not _refused_layers:
        return None
    return _refused_layers.get((_with_index(device), dtype, H, D))


def norm_refusal(device: torch.device) -> str | None:
    """Why the gradients' kernel was refused before in this process; None where it was not."""
    return _refused_layers.get(("norm", _with_index(device))) if _refused_layers else None


@contextlib.contextmanager
def trusting(variant: Variant | None) -> Iterator[None]:
    """Lets a launch happen if its variant can be trusted, and remembers if it is refused.

    Args:
        variant: of the launch; None where the caller answers for it.

    Raises:
        CannotLaunch: it has failed a check, or was refused, now or before.
        NotChecked: it is not known, and a CUDA graph is being captured.
    """
    if variant is None:
        yield
        return
    if variant not in _trusted:
        if (reason := verdict(variant)) is not None:
            raise CannotLaunch(reason)
        _trusted.add(variant)
    try:
        yield
    except CannotLaunch as error:
        _trusted.discard(variant)
        _refuse(variant, str(error))
        raise


def verdict(variant: Variant) -> str | None:
    """Why a variant cannot be trusted; None where it can. Checks it if that was not done before.

    Raises:
        NotChecked: see :func:`trusting`.
    """
    compiled, device = variant.compiled(), variant.device
    if compiled in _refused:
        return _refused[compiled]
    mode = check_mode()
    if not _needs_trust(device):
        return None
    if mode == "0":
        chip = Chip.of(device).architecture
        if chip in CHIPS:
            return None
        reason = f"{chip} is used after a check only, and FASTRNN_CHECK=0 forbids it"
        return _refuse(variant, reason)
    kept = verdicts.findings()
    if mode == "first" and (key := _key(compiled)) in kept:
        reason = kept[key]
        return None if reason is None else _refuse(variant, _failed(device, compiled, reason))
    if _is_capturing(device):
        raise NotChecked(
            f"a CUDA graph is being captured, and the kernel {compiled} has not been checked on "
            "this GPU: call the same once before the capture"
        )
    return check_now(variant)


def check_now(variant: Variant) -> str | None:
    """Checks a variant, whatever was known of it, and keeps the verdict.

    Returns:
        Why it cannot be trusted: it has failed, or was refused; None where it can.
    """
    compiled, device = variant.compiled(), variant.device
    try:
        reason = _in_a_thread(compiled.check, device)
        failed_waits(device).reason()  # the check has waited for its launches
    except CannotLaunch as error:
        return _refuse(variant, str(error))
    except torch.OutOfMemoryError:  # for now: it is tried again
        reason = f"there is no memory on {device} to check the kernel {compiled} with"
        _log.warning("another way takes over for now: %s", reason)
        return reason
    except BarrierTimeout:
        reason = "its programs have waited for each other in vain"
    verdicts.add({_key(compiled): reason})
    return None if reason is None else _refuse(variant, _failed(device, compiled, reason))


def forget() -> None:
    """Trusts nothing any more, and reads the verdicts anew."""
    _trusted.clear()
    _refused.clear()
    _refused_layers.clear()
    verdicts.forget()


def _failed(device: torch.device, variant: Variant, reason: str) -> str:
    return (
        f"the kernel {variant} has failed its check on {device}, {reason}; please report it, with "
        "the output of `python -m fastrnn info`"
    )


def _refuse(variant: Variant, reason: str) -> str:
    """Remembers, and warns the first time."""
    if variant.layer() not in _refused_layers:
        _log.warning("a kernel is not used by this process any more: %s", reason)
        _refused_layers[variant.layer()] = reason
    _refused[variant.compiled()] = reason
    return reason


def _needs_trust(device: torch.device) -> bool:
    return device.type == "cuda"


def _key(compiled: Variant) -> str:
    """Its name among the verdicts."""
    return f"{_machine(compiled.device)}/{compiled}"


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _machine(device: torch.device) -> str:
    """The GPU and its driver, as a verdict's key has them."""
    if device.type != "cuda":
        return device.type
    driver = torch.version.hip or cuda_driver_version()
    return f"{torch.cuda.get_device_name(device)}/{driver}"


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _in_a_thread(check: Callable[[], str | None], device: torch.device) -> str | None:
    """Runs a check as if nothing were set around it.

    The caller may be inside an operator, where autograd is out of reach, or in a context of
    autocast, inference mode or another default device. A new thread has none of these.
    """
    found: list[str | None] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            on_gpu = device.type == "cuda"
            with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
                found.append(check())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fastrnn-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
