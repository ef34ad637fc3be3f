"""Which of cuDNN's algorithms torch takes for an LSTM on a GPU.

torch does not say which it took, so its rule is repeated here: ``get_algo`` in
aten/src/ATen/native/cudnn/RNN.cpp, the branches for LSTM. What it comes to:

- PackedSequence, projections and float64: always ``STANDARD``, a matrix product a step;
- up to 192 hidden units forward and 128 backward: ``PERSIST_STATIC_SMALL_H``;
- float16 alone, one layer in one direction, some sizes on some GPUs: ``PERSIST_STATIC``;
- everything else, so bfloat16 and float32 beyond the small sizes: ``STANDARD``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Algorithm = Literal["STANDARD", "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H"]

SMALL_H_FORWARD, SMALL_H_BACKWARD = 192, 128


class Layers(NamedTuple):
    """What of an LSTM and its batch the rule asks for.

    Attributes:
        batch: B.
        steps: T.
        input_size: I.
        hidden_size: H.
        dtype: that it computes in.
        num_layers: L.
        bidirectional: D = 2.
        proj_size: P; 0 for no projection.
        packed: the input is a PackedSequence.
    """

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    packed: bool = False


class Gpu(NamedTuple):
    """What of a GPU the rule asks for.

    Attributes:
        capability: CUDA's compute capability, such as (9, 0).
        multiprocessors: their number.
    """

    capability: tuple[int, int]
    multiprocessors: int

    @staticmethod
    def of(device: torch.device) -> Gpu:
        """The one that is here."""
        properties = torch.cuda.get_device_properties(device)
        return Gpu(torch.cuda.get_device_capability(device), properties.multi_processor_count)


def algorithm(layers: Layers, gpu: Gpu, *, forward: bool) -> Algorithm:
    """The algorithm that torch's rule selects.

    Args:
        layers: the LSTM and its batch.
        gpu: that it runs on.
        forward: of the forward pass; False for the backward pass.
    """
    if layers.proj_size or layers.packed or layers.dtype == torch.float64:
        return "STANDARD"
    small = SMALL_H_FORWARD if forward else SMALL_H_BACKWARD
    if gpu.capability[0] >= 6 and layers.hidden_size <= small:
        return "PERSIST_STATIC_SMALL_H"
    if layers.dtype == torch.float16 and _persistent_shape(layers):
        return "PERSIST_STATIC" if _persistent_batch(layers, gpu) else "STANDARD"
    return "STANDARD"


def _persistent_shape(layers: Layers) -> bool:
    one = layers.num_layers == 1 and not layers.bidirectional
    input_size, hidden_size = layers.input_size, layers.hidden_size
    return one and hidden_size <= 1024 and hidden_size % 128 == 0 and input_size % 128 == 0


def _persistent_batch(layers: Layers, gpu: Gpu) -> bool:
    batch, steps = layers.batch, layers.steps
    major, minor = gpu.capability
    if major == 7:
        long_enough = (
            (steps >= 40 and batch <= 128)
            or (steps >= 20 and batch <= 96)
            or (steps >= 10 and batch <= 32)
        )
        well_sized = (batch % 16 == 0 and batch not in (80, 112)) or batch == 8
        return minor != 5 and long_enough and well_sized
    if major >= 8 and gpu.multiprocessors >= 98:
        return minor != 6 and batch % 8 == 0 and batch <= 128
    return False
