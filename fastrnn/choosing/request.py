"""What one call of a module asks for: its input, its weights, and what is wanted of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.input.arguments import Lengths
from fastrnn.input.forms import Form, Jagged, Padded
from fastrnn.ways.recurrence import Memory
from fastrnn.ways.torch_lstm import Stack


class Request(NamedTuple):
    """A call, read and checked.

    Attributes:
        form: the input's form.
        lengths: ``[B]``, or None.
        mask: bool, shaped as the form has it, or None.
        resets: likewise.
        flat: the weights of all layers and directions, in their own dtype.
        h_0: ``[L * D, B, P]`` in ``dtype``. None: zeros.
        c_0: ``[L * D, B, H]`` in ``dtype``. None: zeros.
        dtype: of the results; autocast's where it is on.
        stack: the layers.
        backend: what the user asked for.
        memory: likewise.
        cell_states: whether the cell states are an output.
        needs_grad: whether there may be a backward.
        autocast: whether ``dtype`` is autocast's.
        own_class: whether a weight is of a class that says itself what operators do.
    """

    form: Form
    lengths: Lengths | int | None
    mask: Tensor | None
    resets: Tensor | None
    flat: list[Tensor]
    h_0: Tensor | None
    c_0: Tensor | None
    dtype: torch.dtype
    stack: Stack
    backend: str = "auto"
    memory: Memory = "save"
    cell_states: bool = False
    needs_grad: bool = False
    autocast: bool = False
    own_class: bool = False

    @property
    def input_size(self) -> int:
        """I."""
        return self.flat[0].shape[1]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.flat[0].shape[0] // 4

    @property
    def dense(self) -> bool:
        """Whether every sequence has all steps, as the input comes."""
        form = self.form
        if isinstance(form, Jagged) or self.ragged:
            return False
        return isinstance(form, Padded) or form.entries == form.steps * form.batch

    @property
    def ragged(self) -> bool:
        """Whether lengths, mask or resets were given."""
        return not (self.lengths is None and self.mask is None and self.resets is None)

    @property
    def on_host(self) -> bool:
        """Whether what says which steps are valid can be read without waiting for a device."""
        offsets = self.form.offsets if isinstance(self.form, Jagged) else None
        given = (offsets, self.lengths, self.mask, self.resets)
        return all(value.is_cpu for value in given if isinstance(value, Tensor))


def rounded_up(count: int) -> int:
    """To the next power of two: calls of one class have as many sequences, or steps."""
    return 1 << max(0, count - 1).bit_length()
