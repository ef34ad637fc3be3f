"""The private names of torch that fastrnn relies on: all of them, and what each is for.

torch promises nothing of them. A release without one is noticed here, at import, and named.
tests/test_torch_private.py sees to it that no other file uses any. What only some users need is
looked up when it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, graph
from torch.nn.utils import parametrize
from torch.utils import _foreach_utils, _python_dispatch

try:
    # Transforms of torch.func, and batches of gradients that torch.autograd.grad makes.
    functorch_active = torch._C._are_functorch_transforms_active
    functorch_level = torch._C._functorch.maybe_current_level
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    is_batched = torch._C._functorch.is_batchedtensor
    is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
    get_unwrapped = torch._C._functorch.get_unwrapped
    getattr(graph, "_allow_mutation_on_saved_tensors_enabled")  # noqa: B009 - see below
    getattr(forward_ad, "_current_level")  # noqa: B009

    # Graphs that are being recorded, and modes that see each operator.
    tracing_state = torch._C._get_tracing_state  # two calls less than torch.jit.is_tracing
    is_tracing = torch._C._is_tracing
    dispatch_mode = torch._C._get_dispatch_mode
    FAKE = torch._C._TorchDispatchModeKey.FAKE
    PROXY = torch._C._TorchDispatchModeKey.PROXY
    dispatch_modes = torch._C._len_torch_dispatch_stack
    dispatch_modes_before = torch._ops._len_torch_dispatch_stack_pre_dispatch
    dispatch_mode_stack = _python_dispatch._get_current_dispatch_mode_stack
    disable_dispatch_modes = _python_dispatch._disable_current_modes
    disabled_torch_function = torch._C._disabled_torch_function_impl
    DisableTorchFunction = torch._C.DisableTorchFunction
    DispatchKey = torch._C.DispatchKey
    ExcludeDispatchKey = torch._C._SetExcludeDispatchKeyGuard

    # Whether a backward comes once more.
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

    # Assertions that wait for no device; work on many tensors at once.
    assert_async = torch._assert_async
    foreach_norm = torch._foreach_norm
    foreach_mul_ = torch._foreach_mul_
    group_tensors = _foreach_utils._group_tensors_by_device_and_dtype

    # oneDNN and cuDNN.
    has_mkldnn = torch._C._has_mkldnn
    mkldnn_enabled = torch._C._get_mkldnn_enabled
    has_avx512_bfloat16 = torch.cpu._is_avx512_bf16_supported
    has_amx = torch.cpu._is_amx_tile_supported
    cudnn_wants_one_chunk = torch._use_cudnn_rnn_flatten_weight
    cudnn_to_one_chunk = torch._cudnn_rnn_flatten_weight

    # How nn.LSTM gathers its weights; and the class that torch makes for one parametrized module.
    init_flat_weights = nn.RNNBase._init_flat_weights
    inject_new_class = parametrize._inject_new_class
except AttributeError as error:
    raise ImportError(
        f"fastrnn needs a private name that torch {torch.__version__} does not have: {error}; "
        "install a torch of the versions that README.md names"
    ) from error

# oneDNN's LSTM for one direction of one layer: in no documentation, and all of the CPU's speed.
# Without it torch's own LSTM computes.
has_onednn_lstm: bool = has_mkldnn and hasattr(torch, "mkldnn_rnn_layer")


def dual_level() -> int:
    """How deep forward-mode derivatives are nested; -1 outside of all."""
    return forward_ad._current_level


def saved_tensors_may_change() -> bool:
    """Whether torch.autograd.graph.allow_mutation_on_saved_tensors is in force."""
    return graph._allow_mutation_on_saved_tensors_enabled


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a FakeTensor."""
    from torch._subclasses.fake_tensor import FakeTensor  # not at once, for it imports much

    return isinstance(tensor, FakeTensor)


def onednn_multiplies_bfloat16() -> bool:
    """Whether oneDNN may use the processor's instructions for it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def strided_shard() -> type:
    """How a DTensor is placed where FSDP2 shards what tensor parallelism has sharded."""
    from torch.distributed.tensor.placement_types import _StridedShard  # nor does all need this

    return _StridedShard
