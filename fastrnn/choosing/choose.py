"""Which way computes a call, and why: one function for each kind of device.

- ``torch``: torch's own LSTM, all layers in one call; :mod:`fastrnn.ways.torch_lstm`.
- ``cell``: torch's cell, for one step on the CPU; there too.
- ``dense``: torch's LSTM on the CPU, where oneDNN computes it; :mod:`fastrnn.ways.dense`.
- ``padded``: oneDNN over a padded batch as it stands; :mod:`fastrnn.ways.padded`.
- ``rectangles``: oneDNN over pieces of a ragged batch; :mod:`fastrnn.ways.rectangles`.
- ``loop``: the step loop in PyTorch; :mod:`fastrnn.ways.step_loop`.
- ``triton``: the kernels; :mod:`fastrnn.ways.fused`.
- ``composite``: differentiable operations, under functorch and forward-mode derivatives.
- ``operator``: one opaque node a layer, while torch.compile or torch.export traces.
- ``onnx``: ONNX's own LSTM, while torch.onnx.export traces; :mod:`fastrnn.ways.onnx_lstm`.

Nobody who puts fastrnn in nn.LSTM's place shall lose, so torch's own code is one of the ways, and
runs wherever no other is known to be faster. What is asked for by name runs, or raises.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fastrnn.choosing import cudnn, measured
from fastrnn.choosing.arrange import Work, arrange
from fastrnn.choosing.backends import can_run_triton, check_backend
from fastrnn.choosing.environment import forced_backend
from fastrnn.choosing.request import Request
from fastrnn.input.forms import Packed, Padded
from fastrnn.input.packing import Layout, PaddedLayout, RectangleLayout
from fastrnn.input.transforms import is_traced
from fastrnn.ways import onednn, torch_lstm
from fastrnn.ways.dense import can_run_dense
from fastrnn.ways.recurrence import CPU
from fastrnn.ways.torch_lstm import Stack
from fastrnn.ways.widening import wide_hidden_size

Way: TypeAlias = Literal[
    "torch",
    "cell",
    "dense",
    "padded",
    "rectangles",
    "loop",
    "triton",
    "composite",
    "operator",
    "onnx",
]
WAYS: tuple[Way, ...] = get_args(Way)

# Steps up to which torch's loop in C++ is the faster one in training: at each step its backward
# makes tensors where ours writes into buffers, which costs more than our fixed 0.5 ms from 6 steps
# on (float64 and projections, B from 1 to 64, H from 16 to 256). Forward alone it always is.
TORCH_STEPS = 5
# Steps up to which a launch of the kernels is not worth it; not yet measured on a GPU.
KERNEL_STEPS = 8

# What torch computes on the CPU as exactly as our ways do. 16-bit numbers it rounds at each step,
# and is taken for them in few steps only: for bfloat16, and where projections keep oneDNN out.
TORCH_DTYPES = (torch.float32, torch.float64)
# Sequences up to which torch's cell is the faster one forward.
CELL_BATCH = 32

_log = logging.getLogger("fastrnn")


class Choice(NamedTuple):
    """The way that computes a call.

    Attributes:
        way: its name.
        why: the reason, for the user.
        layout: of the batch, where the choice needed it.
        backend: what a layer is told: "auto" may take oneDNN, "triton" no other, and
            "triton-or-reference" the step loop where a GPU refuses a launch; "torch", in a graph,
            torch's own LSTM.
        by_rule: whether torch's way and the kernels both could run, and no measurement decided.
    """

    way: Way
    why: str
    layout: Layout | PaddedLayout | None = None
    backend: Literal["auto", "torch", "reference", "triton", "triton-or-reference"] = "auto"
    by_rule: bool = False


ONE_STEP = Choice("cell", "one step of a few sequences is fastest by torch's cell")
DENSE = Choice("dense", "every sequence has all steps, and oneDNN computes them")
SHORT = Choice(
    "torch", f"torch's loop in C++ is the fastest forward, and backward up to {TORCH_STEPS} steps"
)
LOOP = Choice("loop", "backward through many steps this loop is faster than torch's")


def choose(asked: Request) -> Choice:
    """The way that computes a call.

    Raises:
        RuntimeError: what was asked for by name cannot run, with the reason.
        ValueError: it does not exist.
        TypeError: the dtype is complex, and torch's own code is not allowed.
    """
    if forced := forced_backend():
        asked = asked._replace(backend=forced)
    if torch.compiler.is_compiling():
        return _traced(asked)
    if not onednn.outside_transforms():
        return Choice("composite", "functorch or a forward-mode derivative is active")
    if asked.own_class and _no_torch(asked) is None:
        return Choice("torch", "the weights are of a class of their own")
    if is_traced(asked.form.data, *asked.flat[:1]):
        return _without_data(asked)
    if asked.backend != "auto" or asked.dtype.is_complex:
        return _asked_for(asked)
    if asked.form.device == CPU:
        return _on_cpu(asked)
    choice = _on_gpu(asked) if asked.form.device.type == "cuda" else _elsewhere(asked)
    _log_once(f"backend='auto' on {asked.form.device.type}: {choice.way}, for {choice.why}")
    return choice


def dense_on_cpu(
    x: Tensor,
    flat: list[Tensor],
    stack: Stack,
    shape: tuple[int, int],
    train: bool,
    dtype: torch.dtype,
) -> Choice | None:
    """The way for a dense batch on the CPU, without cell states; None where torch is no match.

    Args:
        x: the input.
        flat: the weights of all layers and directions.
        stack: the layers.
        shape: T and B.
        train: whether there may be a backward.
        dtype: of the results.
    """
    (steps, batch), exact = shape, dtype in TORCH_DTYPES
    if steps == 1 and exact and not stack.projection and (train or batch <= CELL_BATCH):
        return ONE_STEP
    if not stack.projection and onednn.available(CPU, dtype) and can_run_dense(x, dtype, flat):
        return DENSE
    if steps <= TORCH_STEPS:
        return SHORT if exact or stack.projection else None
    return SHORT if exact and not train else None


def _asked_for(asked: Request) -> Choice:
    """What was asked for by name; and complex numbers, which torch alone computes."""
    check_backend(asked.backend)
    name = f'backend="{asked.backend}" was asked for'
    if asked.dtype.is_complex and asked.backend in ("reference", "triton"):
        raise TypeError(
            f'backend="{asked.backend}" computes real numbers, got {asked.dtype}; use '
            'backend="torch" or "auto", which take torch\'s own LSTM'
        )
    if asked.backend == "triton":
        reason = _no_kernels(asked)
        if reason is None:
            return Choice("triton", name, backend="triton")
        raise RuntimeError(
            f'backend="triton" cannot run: {reason}. Use backend="auto", which takes the fastest '
            "that can."
        )
    if asked.backend == "reference":
        return Choice("loop", name, backend="reference")
    reason = _no_torch(asked)
    if reason is None:
        return Choice("torch", f"{asked.dtype} is complex" if asked.backend == "auto" else name)
    if asked.dtype.is_complex:
        raise TypeError(f"{asked.dtype} is computed by torch's own LSTM alone: {reason}")
    _log_once(f'backend="torch": the step loop runs, for {reason}')
    return Choice("loop", reason)


def _on_cpu(asked: Request) -> Choice:
    form, dtype, stack, train = asked.form, asked.dtype, asked.stack, asked.needs_grad
    short = False
    if _no_torch(asked) is None:
        if asked.dense:
            shape = form.steps, form.batch
            found = dense_on_cpu(form.data, asked.flat, stack, shape, train, dtype)
            if found is not None:
                return found
        few = form.steps <= TORCH_STEPS
        short = few and (dtype != torch.float16 or stack.projection)
        short = short or (not train and dtype in TORCH_DTYPES)
    if not onednn.can_compute(
        form.device,
        dtype,
        backend="auto",
        memory=asked.memory,
        cell_states=asked.cell_states,
        projection=stack.projection,
    ):
        return SHORT if short else LOOP
    if short and form.steps <= TORCH_STEPS and isinstance(form, Packed) and not asked.ragged:
        return SHORT  # without asking what else could be, which takes as long as two steps
    choice = _arranged(asked)
    return SHORT if short and choice.way == "loop" else choice


def _arranged(asked: Request) -> Choice:
    """OneDNN or the step loop, by the models of costs.py."""
    dtype = onednn.compute_dtype(asked.dtype)
    sizes = asked.input_size, asked.hidden_size
    work = Work(*sizes, asked.needs_grad, dtype, asked.flat)
    may_pad = not (asked.stack.bidirectional and asked.h_0 is not None)  # see padded.py
    layout = arrange(asked.form, asked.lengths, asked.mask, asked.resets, work, may_pad=may_pad)
    if layout is None or isinstance(layout, PaddedLayout):
        return Choice("padded", "little is padding", layout)
    if isinstance(layout, RectangleLayout):
        return Choice("rectangles", "few dense pieces hold the batch", layout)
    return Choice("loop", "much would be padding", layout)


def _on_gpu(asked: Request) -> Choice:
    reason = _no_kernels(asked)
    if reason is not None:
        return _elsewhere(asked, reason)
    if (reason := _no_torch(asked)) is not None:
        return Choice("triton", reason, backend="triton-or-reference")
    way, why, by_rule = measured.fastest(asked), "it was measured to be the fastest here", False
    if way is None:
        reason, by_rule = _torch_is_faster(asked), True
        way = "triton" if reason is None else "torch"
        why = reason or "one launch computes all steps, and no padding"
    if way == "torch":
        return Choice("torch", why, by_rule=by_rule)
    return Choice("triton", why, backend="triton-or-reference", by_rule=by_rule)


def _elsewhere(asked: Request, no_kernels: str | None = None) -> Choice:
    """On devices that have no kernels: torch, and never the step loop where torch can."""
    reason = _no_torch(asked)
    if reason is None:
        return Choice("torch", no_kernels or f"there are no kernels for {asked.form.device.type}")
    return Choice("loop", reason)


def _traced(asked: Request) -> Choice:
    """One node a layer; which kernels it holds cannot hang on sizes that are known at run time."""
    if _exporting_to_onnx():
        return _for_onnx(asked)
    why = "torch.compile or torch.export traces"
    if asked.backend == "auto" and _no_kernels(asked) is None:
        return Choice("operator", why, backend="triton-or-reference")
    on_cpu = asked.backend == "auto" and asked.form.device == CPU
    if asked.backend in ("auto", "torch") and not on_cpu and _no_torch(asked) is None:
        return Choice("operator", why, backend="torch")
    backend = "auto" if asked.backend == "auto" else _asked_for(asked).backend
    return Choice("operator", why, backend=backend)


def _exporting_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# A constant to torch.compile, which takes torch's function for one that says no; see backends.py.
_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _for_onnx(asked: Request) -> Choice:
    """ONNX's LSTM, and nothing else: it has no word for our operator."""
    refused = {
        "a packed or jagged input": not isinstance(asked.form, Padded),
        "a mask": asked.mask is not None,
        "resets": asked.resets is not None,
        "the cell states": asked.cell_states,
        "proj_size": asked.stack.projection,
    }
    found = " and ".join(name for name, given in refused.items() if given)
    if found:
        raise RuntimeError(
            "torch.onnx.export can say a padded input, hx and lengths in ONNX, which has no words "
            f"for {found}; use torch.export, or call with lengths"
        )
    return Choice("onnx", "torch.onnx.export traces")


def _without_data(asked: Request) -> Choice:
    """Torch's own code where it can, which every mode of torch's knows; else one node a layer."""
    why = "the tensors have no data, or make_fx traces"
    by_name = asked.backend in ("reference", "triton")
    if by_name or asked.ragged or not isinstance(asked.form, Padded) or _no_torch(asked):
        return Choice("operator", why, backend=_asked_for(asked).backend)
    return Choice("torch", why)


def _no_torch(asked: Request) -> str | None:
    return torch_lstm.can_run(cell_states=asked.cell_states, memory=asked.memory)


def _no_kernels(asked: Request) -> str | None:
    stack = asked.stack
    projected = asked.flat[1].shape[1] if stack.projection else 0
    return can_run_triton(
        asked.form.device, asked.dtype, asked.hidden_size, stack.directions, projected
    )


def _torch_is_faster(asked: Request) -> str | None:
    """Why torch is taken for a call that the kernels could run; by rule, not by measurement."""
    form, stack = asked.form, asked.stack
    if not asked.on_host:
        return None  # torch would wait for the lengths
    if form.steps <= KERNEL_STEPS:
        return f"there are at most {KERNEL_STEPS} steps"
    if asked.dtype == torch.float32 and _streams(asked):
        return "float32 weights of this size do not stay on chip"
    if not asked.dense:
        return None
    layers = cudnn.Layers(
        form.batch,
        form.steps,
        asked.input_size,
        asked.hidden_size,
        asked.dtype,
        stack.num_layers,
        stack.bidirectional,
    )
    gpu = cudnn.Gpu.of(form.device)
    passes = (True, False) if asked.needs_grad else (True,)
    found = [cudnn.algorithm(layers, gpu, forward=forward) for forward in passes]
    return None if "STANDARD" in found else f"cuDNN has a persistent kernel ({found[0]})"


def _streams(asked: Request) -> bool:
    """Whether the kernels would read W_hh from memory at each step."""
    from fastrnn.ways.fused import input_precision
    from fastrnn_kernels.tiling import Chip, backward_tile, forward_tile

    chip, precision = Chip.of(asked.form.device), input_precision()
    size = wide_hidden_size(asked.hidden_size)
    shape = asked.form.batch, size, asked.stack.directions, asked.dtype, chip, precision
    passes = (forward_tile, backward_tile) if asked.needs_grad else (forward_tile,)
    return any(tile(*shape).residency == "streamed" for tile in passes)


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
