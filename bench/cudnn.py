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

from bench.workloads import Case

Algorithm = Literal["STANDARD", "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H"]

SMALL_H_FORWARD, SMALL_H_BACKWARD = 192, 128


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


def algorithm(
    case: Case, gpu: Gpu, *, packed: bool, forward: bool, proj_size: int = 0
) -> Algorithm:
    """The algorithm that torch's rule selects for nn.LSTM.

    Args:
        case: dtype, sizes, layers and directions.
        gpu: that it runs on.
        packed: the input is a PackedSequence.
        forward: of the forward pass; False for the backward pass.
        proj_size: nn.LSTM's.
    """
    if proj_size or packed:
        return "STANDARD"
    small = SMALL_H_FORWARD if forward else SMALL_H_BACKWARD
    if case.dtype != torch.float64 and gpu.capability[0] >= 6 and case.shape.hidden_size <= small:
        return "PERSIST_STATIC_SMALL_H"
    if case.dtype == torch.float16 and _persistent_shape(case) and _persistent_batch(case, gpu):
        return "PERSIST_STATIC"
    return "STANDARD"


def _persistent_shape(case: Case) -> bool:
    _, _, input_size, hidden_size = case.shape
    one = case.num_layers == 1 and not case.bidirectional
    return one and hidden_size <= 1024 and hidden_size % 128 == 0 and input_size % 128 == 0


def _persistent_batch(case: Case, gpu: Gpu) -> bool:
    batch, steps = case.shape.batch, case.shape.steps
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
