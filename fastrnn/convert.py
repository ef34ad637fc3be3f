"""Put fastrnn into somebody else's model, and take it out again.

Three ways in, from the gentlest to the widest:

- ``from_torch`` makes one fastrnn.LSTM that shares an nn.LSTM's parameters; ``to_torch`` undoes it.
- ``convert`` turns every nn.LSTM of a model into a fastrnn.LSTM, in place; ``revert`` undoes it.
- ``patched`` makes code that is not ours build fastrnn.LSTM and call fastrnn's gradient clipping.

Nothing is patched by importing fastrnn.

Limits: a subclass of nn.LSTM has methods that fastrnn knows nothing of, and a TorchScript module
is compiled already; both are left as they are. A parametrized nn.LSTM is of a subclass too, which
torch makes for it; that one is converted.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn import torch_private
from fastrnn.clip import clip_grad_norm_
from fastrnn.lstm import LSTM

__all__ = ["convert", "from_torch", "patched", "revert", "to_torch"]

# Bound here, because inside ``patched()`` the name nn.LSTM is fastrnn's.
TorchLSTM = nn.LSTM


def convert(model: nn.Module) -> int:
    """Turn every nn.LSTM in a model into a fastrnn.LSTM, in place.

    The modules stay the same objects, with the same Parameters, buffers, hooks, parametrizations,
    attributes and training flag; only their class changes. So optimizers, wrappers such as
    DistributedDataParallel, and whoever else holds a reference keep working, and a module that is
    used in several places is converted once. The model itself may be the nn.LSTM.

    Left as they are: subclasses of nn.LSTM, TorchScript modules, and modules whose ``forward`` was
    overwritten on the object (by a wrapper that moves weights about, for instance), because
    fastrnn's would not be called.

    A converted module is no nn.LSTM any more, so what looks for that class passes it by:
    ``isinstance(m, nn.LSTM)`` is False (``isinstance(m, nn.RNNBase)`` holds, and so does
    ``m.mode == "LSTM"``), and ``torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})`` leaves
    it in float32 without a word. Take fastrnn out first; the parameters stay the same::

        fastrnn.revert(model)
        model = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})

    Args:
        model: the model, which is searched with ``model.modules()``.

    Returns:
        How many modules were converted; 0 the second time.

    Raises:
        TypeError: if model is not an nn.Module.
    """
    return _convert_all(model, TorchLSTM, LSTM)


def revert(model: nn.Module) -> int:
    """Turn every fastrnn.LSTM in a model into an nn.LSTM, in place: the inverse of ``convert``.

    Args:
        model: the model, which is searched with ``model.modules()``. Its fastrnn.LSTM modules need
            not come from ``convert``; their ``backend`` and ``memory`` are forgotten.

    Returns:
        How many modules were reverted.

    Raises:
        TypeError: if model is not an nn.Module.
    """
    return _convert_all(model, LSTM, TorchLSTM)


def from_torch(module: nn.LSTM) -> LSTM:
    """Make a fastrnn.LSTM that shares the parameters of an nn.LSTM, which stays as it is.

    Args:
        module: an nn.LSTM, possibly parametrized. Hooks and attributes that it has at this moment
            are taken over.

    Returns:
        A new module with the same Parameter objects.

    Raises:
        TypeError: if module is anything else; a subclass has methods that would be lost.
    """
    return cast(LSTM, _twin(module, TorchLSTM, LSTM, "from_torch expects an nn.LSTM"))


def to_torch(module: LSTM) -> nn.LSTM:
    """Make an nn.LSTM that shares the parameters of a fastrnn.LSTM, which stays as it is.

    Args:
        module: a fastrnn.LSTM, possibly parametrized. Hooks and attributes that it has at this
            moment are taken over.

    Returns:
        A new module with the same Parameter objects.

    Raises:
        TypeError: if module is anything else; a subclass has methods that would be lost.
    """
    return cast(nn.LSTM, _twin(module, LSTM, TorchLSTM, "to_torch expects a fastrnn.LSTM"))


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch.nn, "LSTM", LSTM),
    (torch.nn.modules, "LSTM", LSTM),
    (torch.nn.modules.rnn, "LSTM", LSTM),
    (torch.nn.utils, "clip_grad_norm_", clip_grad_norm_),
    (torch.nn.utils.clip_grad, "clip_grad_norm_", clip_grad_norm_),
)
_patch_lock = threading.Lock()
_patch_depth = 0
_originals: list[Any] = []


@contextmanager
def patched() -> Iterator[None]:
    """Make ``torch.nn.LSTM`` and ``torch.nn.utils.clip_grad_norm_`` fastrnn's inside a block.

    For code that cannot be edited::

        with fastrnn.patched():
            model = somebody_elses.build_model()
            somebody_elses.train(model)

    Models that were built inside keep their fastrnn.LSTM afterwards. Blocks may be nested; when
    the last one ends, by an exception too, torch has its own names again. It can also decorate a
    function.

    Limits: the names are attributes of torch's modules, so they change for every thread of the
    process, and code that did ``from torch.nn import LSTM`` before the block keeps torch's class.
    Inside the block ``isinstance(m, nn.LSTM)`` asks for a fastrnn.LSTM, and an nn.LSTM that was
    built outside cannot be pickled.
    """
    global _patch_depth
    with _patch_lock:
        if _patch_depth == 0:
            _originals[:] = [getattr(owner, name) for owner, name, _ in _PATCHES]
            for owner, name, ours in _PATCHES:
                setattr(owner, name, ours)
        _patch_depth += 1
    try:
        yield
    finally:
        with _patch_lock:
            _patch_depth -= 1
            if _patch_depth == 0:
                for (owner, name, _), original in zip(_PATCHES, _originals):
                    setattr(owner, name, original)
                _originals.clear()


def _convert_all(model: nn.Module, old: type[nn.RNNBase], new: type[nn.RNNBase]) -> int:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {_name(model)}")
    converted = 0
    for module in model.modules():
        if _is_exactly(module, old) and "forward" not in vars(module):
            _become(module, new)
            converted += 1
    return converted


def _twin(
    module: nn.Module, old: type[nn.RNNBase], new: type[nn.RNNBase], expected: str
) -> nn.RNNBase:
    if not _is_exactly(module, old):
        raise TypeError(f"{expected} (and not a subclass of it), got {_name(module)}")
    cls = type(module)
    twin = cls.__new__(cls)
    # The containers are nn.Module's and RNNBase's registries: its own, with the same contents.
    vars(twin).update(
        (name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
        for name, value in vars(module).items()
        if name != "_compiled_call_impl"  # bound to the original
    )
    _become(twin, new)
    return twin


def _is_exactly(module: object, cls: type[nn.RNNBase]) -> TypeGuard[nn.RNNBase]:
    """Whether module is a ``cls`` and of no subclass, but for the one that parametrize makes."""
    if type(module) is cls:
        return True
    if not isinstance(module, cls) or not parametrize.is_parametrized(module):
        return False
    return parametrize.type_before_parametrizations(module) is cls


def _become(module: nn.RNNBase, new: type[nn.RNNBase]) -> None:
    """Change the class of a module that ``_is_exactly`` the other one, as parametrize does it."""
    old = type(module)
    module.__class__ = new
    if parametrize.is_parametrized(module):
        # The class that torch makes for this module alone, with a property for each tensor.
        torch_private.inject_new_class(module)
        for name in cast(nn.ModuleDict, module.parametrizations):
            setattr(type(module), name, vars(old)[name])
    if issubclass(new, LSTM):
        vars(module).update(backend="auto", memory="save")
        # nn.LSTM keeps the weights of its last call. A computed one has a history, which deepcopy
        # refuses, and fastrnn reads the weights anew at every call.
        kept = vars(module)["_flat_weights"]
        kept[:] = [weight if isinstance(weight, nn.Parameter) else None for weight in kept]
    else:
        for name in ("backend", "memory"):
            vars(module).pop(name, None)
        if not parametrize.is_parametrized(module):  # nn.LSTM sees by itself that those changed
            module._init_flat_weights()


def _name(thing: object) -> str:
    cls = type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"
