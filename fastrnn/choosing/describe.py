"""A call in words: what is asked, and what stands against each way of computing it."""

from __future__ import annotations

import functools
import logging

import torch

from fastrnn.choosing.backends import can_run_triton
from fastrnn.choosing.choose import Choice
from fastrnn.choosing.environment import switch
from fastrnn.choosing.request import Request, rounded_up
from fastrnn.input.forms import Jagged, Packed
from fastrnn.ways import onednn, torch_lstm
from fastrnn.ways.recurrence import CPU

_log = logging.getLogger("fastrnn")


def describe(asked: Request) -> str:
    """The call's class: sizes, layers, dtype and form; B and T up to the next power of two."""
    form, stack = asked.form, asked.stack
    kind = "packed" if isinstance(form, Packed) else "jagged" if isinstance(form, Jagged) else ""
    parts = [f"I{asked.input_size}", f"H{asked.hidden_size}", f"L{stack.num_layers}"]
    parts += [
        f"D{stack.directions}",
        f"B<={rounded_up(form.batch)}",
        f"T<={rounded_up(form.steps)}",
    ]
    given = {"lengths": asked.lengths, "mask": asked.mask, "resets": asked.resets}
    names = [name for name, value in given.items() if value is not None]
    parts += [str(asked.dtype).removeprefix("torch."), *([kind] if kind else []), *names]
    parts.append("training" if asked.needs_grad else "inference")
    return f"{' '.join(parts)} on {form.device}"


def objections(asked: Request) -> dict[str, str]:
    """Why ways cannot compute the call; those that can are not in it."""
    stack, form = asked.stack, asked.form
    projected = asked.flat[1].shape[1] if stack.projection else 0
    found = {
        "torch": torch_lstm.can_run(cell_states=asked.cell_states, memory=asked.memory),
        "triton": can_run_triton(
            form.device, asked.dtype, asked.hidden_size, stack.directions, projected
        ),
    }
    if form.device != CPU:
        found["oneDNN"] = f"it computes on the CPU, the tensors are on {form.device.type}"
    elif not onednn.can_compute(
        form.device,
        asked.dtype,
        backend="auto",
        memory=asked.memory,
        cell_states=asked.cell_states,
        projection=stack.projection,
    ):
        found["oneDNN"] = (
            "it knows float32 and bfloat16, no projection, no cell states and no "
            'memory="recompute"; or it is switched off'
        )
    return {way: reason for way, reason in found.items() if reason is not None}


def logs_paths() -> bool:
    """Whether FASTRNN_LOG=paths is set."""
    return switch("FASTRNN_LOG") == "paths"


# A constant to torch.compile, which would trace the cached function; see environment.py.
logs_paths._dynamo_marked_constant = True  # type: ignore[attr-defined]


def log_path(asked: Request, choice: Choice) -> None:
    """Log which way computes this class of calls, once; where FASTRNN_LOG asks for it."""
    if not torch.compiler.is_compiling():
        _log_once(f"{describe(asked)}: {choice.way}, for {choice.why}")


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)  # asked for, so shown without setting up logging
