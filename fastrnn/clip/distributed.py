"""Norms of gradients spread over processes: DTensors, as FSDP2 and tensor parallelism make them.

Each process measures its local parts; the sums of p-th powers (for `inf` the largest magnitudes) of
all gradients of a mesh travel in one all_reduce, one number for each gradient; from there on every
process computes the same from the same numbers, so norms and coefficients are equal on all of them.
Scaling is local. What is replicated is counted once: by the process whose coordinate is 0.

Plain gradients may be mixed in; they must be equal on all processes, as DDP leaves them. Under DDP
all gradients are plain and nothing here is needed.

Limits: two or more sharded dimensions of a mesh that does not span all processes take one
all_reduce for each of them. A partial gradient is summed up first, as torch does. What
:func:`why_torch` names goes to torch's own function. FSDP1 has sharded gradients that do not say
so: there, use its `FullyShardedDataParallel.clip_grad_norm_`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fastrnn import torch_private
from fastrnn.clip import gradient_norms
from fastrnn.clip.gradient_norms import Clipped, Recorder, clip_coefficient

_SHARDED = (Shard, torch_private.strided_shard())


def why_torch(grads: Sequence[Tensor], norm_type: float) -> str | None:
    """Why gradients, DTensors among them, have to go to torch's own function; None if not."""
    if not norm_type > 0:
        return f"a norm of order {norm_type} cannot be summed up from parts"
    for grad in grads:
        if not isinstance(grad, DTensor):
            if type(grad) is not Tensor:
                return f"a gradient is a {type(grad).__name__}"
            continue
        if type(grad._local_tensor) is not Tensor:
            return f"the local part of a gradient is a {type(grad._local_tensor).__name__}"
        if grad.device_mesh.get_coordinate() is None:
            return "this process is not in the mesh of a gradient"
        if math.isinf(norm_type) and not grad.numel():
            return "the inf norm of an empty gradient is not defined"
        for placement in grad.placements:
            linear = isinstance(placement, Partial) and placement.reduce_op in ("sum", "avg")
            if not linear and not isinstance(placement, (Replicate, *_SHARDED)):
                return f"a gradient has the placement {placement}"
    return None


def clip_gradients(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    *,
    scale: bool = True,
    zero_nonfinite: bool = False,
    spare_nonfinite: bool = False,
    norm_dtype: torch.dtype | None = None,
    ring: Recorder | None = None,
    checked: bool = False,
) -> Clipped:
    """Measure gradients and scale them in place; see `gradient_norms.clip_gradients`.

    Collective: all processes of the gradients' meshes have to call it with the same arguments.
    Nothing is recorded here.

    Raises:
        NotImplementedError: :func:`why_torch` gives a reason. Nothing was communicated.
    """
    if not checked and (reason := why_torch(grads, norm_type)) is not None:
        raise NotImplementedError(
            f"DTensors must be replicated, sharded or partial sums, of a norm of order above 0: "
            f"{reason}. fastrnn.clip_grad_norm_ hands such gradients to torch."
        )
    norms = _rounded(_global_norms(grads, norm_type), grads, norm_dtype)
    total_norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    if scale and spare_nonfinite:
        scale = math.isfinite(total_norm.item())
    if scale:
        coefficient = scale_gradients(grads, total_norm, max_norm, zero_nonfinite)
    else:
        coefficient = clip_coefficient(total_norm, max_norm, zero_nonfinite)
    return Clipped(total_norm, coefficient, norms)


def scale_gradients(
    grads: list[Tensor], total_norm: Tensor, max_norm: float | Tensor, zero_nonfinite: bool = False
) -> Tensor:
    """Scale the local parts in place; see `gradient_norms.scale_gradients`."""
    locals_ = [local_gradient(grad) for grad in grads]
    # What autograd saves is the DTensor; the local part's version says nothing about it.
    torch.autograd.graph.increment_version(
        [grad for grad, local in zip(grads, locals_) if grad is not local]
    )
    return gradient_norms.scale_gradients(locals_, total_norm, max_norm, zero_nonfinite)


def local_gradient(grad: Tensor) -> Tensor:
    """Return the part of a gradient that is on this process, sharing its memory."""
    return grad._local_tensor if isinstance(grad, DTensor) else grad


def as_torch_returns(total_norm: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Return the total norm as a replicated DTensor where all gradients are DTensors of one mesh.

    Torch returns one then, and its users call `full_tensor()` on it. It takes no others.
    """
    meshes = {grad.device_mesh if isinstance(grad, DTensor) else None for grad in grads}
    if len(meshes) > 1 or (mesh := meshes.pop()) is None:
        return total_norm
    return DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _rounded(norms: Tensor, grads: list[Tensor], norm_dtype: torch.dtype | None) -> Tensor:
    """Return norms rounded each to its gradient's dtype, in the dtype they are promoted to."""
    dtypes = [grad.dtype.to_real() for grad in grads]
    if norm_dtype is not None:
        dtypes = [
            dtype if grad.is_complex() else torch.promote_types(dtype, norm_dtype)
            for dtype, grad in zip(dtypes, grads)
        ]
    promoted = functools.reduce(torch.promote_types, set(dtypes))
    rounded = norms.to(promoted)
    for dtype in set(dtypes) - {promoted}:
        of_this = _on_device([each == dtype for each in dtypes], norms.device)
        rounded = norms.to(dtype).to(promoted).where(of_this, rounded)
    return rounded


def _global_norms(grads: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of each whole gradient, in float32 or wider."""
    parts = [_summed_up(grad) for grad in grads]
    locals_ = [local_gradient(part) for part in parts]
    if math.isinf(norm_type):  # which an empty part does not have
        locals_ = [part if part.numel() else part.new_zeros(1) for part in locals_]
    norms = gradient_norms.measure(locals_, norm_type, torch.float32)
    by_mesh: dict[DeviceMesh, dict[int, set[int]]] = {}  # sharded dimensions of each gradient
    for index, part in enumerate(parts):
        if isinstance(part, DTensor) and (dimensions := _sharded_dimensions(part)):
            by_mesh.setdefault(part.device_mesh, {})[index] = dimensions
    for mesh, sharded in by_mesh.items():
        reduced: set[int] = set().union(*sharded.values())
        if len(reduced) > 1 and mesh.size() == dist.get_world_size():
            reduced = set(range(mesh.ndim))
        coordinate = mesh.get_coordinate() or ()
        contributes = [
            all(coordinate[dimension] == 0 for dimension in reduced - dimensions)
            for dimensions in sharded.values()
        ]
        indices = None
        if len(sharded) < len(grads):
            indices = _on_device([*sharded], norms.device)
        of_mesh = norms if indices is None else norms[indices]
        if not all(contributes):
            of_mesh = of_mesh.where(_on_device(contributes, norms.device), 0)
        whole = _reduce(of_mesh, norm_type, mesh, sorted(reduced))
        norms = whole if indices is None else norms.index_copy(0, indices, whole)
    return norms


def _on_device(values: list[int] | list[bool], device: torch.device) -> Tensor:
    """Return a list as a tensor; nobody waits for the copy to a GPU."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def _summed_up(grad: Tensor) -> Tensor:
    """Return a gradient without partial sums; itself where it has none."""
    if not isinstance(grad, DTensor) or not any(isinstance(p, Partial) for p in grad.placements):
        return grad
    return grad.redistribute(
        placements=[Replicate() if isinstance(p, Partial) else p for p in grad.placements]
    )


def _sharded_dimensions(grad: DTensor) -> set[int]:
    """Return the dimensions of the mesh over which a gradient's elements are spread."""
    return {
        dimension
        for dimension, placement in enumerate(grad.placements)
        if isinstance(placement, _SHARDED) and grad.device_mesh.size(dimension) > 1
    }


def _reduce(norms: Tensor, norm_type: float, mesh: DeviceMesh, dimensions: list[int]) -> Tensor:
    """Return the norms of the whole from the norms of the processes' parts.

    Under CPU offload they travel on the mesh's device, and come back to that of the gradients.
    """
    if math.isinf(norm_type):  # a maximum may lose NaN, so it travels as a flag
        nan = norms.isnan()
        values = torch.cat((nan.to(norms.dtype), norms.masked_fill(nan, 0.0)))
        operation = dist.ReduceOp.MAX
    else:
        values = norms.pow(norm_type)
        operation = dist.ReduceOp.SUM
    if values.device.type != mesh.device_type:
        values = values.to(mesh.device_type)
    if len(dimensions) > 1 and mesh.size() == dist.get_world_size():  # then they are all of them
        dist.all_reduce(values, operation)
    else:
        for dimension in dimensions:
            dist.all_reduce(values, operation, group=mesh.get_group(dimension))
    values = values.to(norms.device)
    if math.isinf(norm_type):
        nan, values = values.chunk(2)
        return values.masked_fill(nan > 0, math.nan)
    return values.pow(1 / norm_type)
