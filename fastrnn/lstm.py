"""The LSTM module: reads the input's form, runs the stack over packed rows, restores the form."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.backends import Backend, check_backend, resolve_backend
from fastrnn.forms import Form, Jagged, Packed, Padded
from fastrnn.packing import Lengths, PackedLayout, ragged_layout
from fastrnn.reference import LayerWeights
from fastrnn.stack import StackOutput, run_stack

States: TypeAlias = tuple[Tensor, Tensor]
Sequences: TypeAlias = Tensor | PackedSequence


class LSTM(nn.RNNBase):
    r"""A multi-layer LSTM over ragged batches: a drop-in for :class:`torch.nn.LSTM`.

    .. math::

        i, f, g, o &= W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(c_t)

    Parameters, their names, their initial values from the same seed, ``state_dict``, warnings and
    errors are those of nn.LSTM. It derives from :class:`torch.nn.RNNBase`, so
    ``isinstance(module, nn.RNNBase)`` holds; it is no subclass of nn.LSTM, which ``torch.compile``
    refuses.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the states.
        num_layers: L, layers stacked. Default: 1.
        bias: use ``bias_ih`` and ``bias_hh``. Default: True.
        batch_first: input, output, ``mask`` and ``resets`` come as ``[B, T, ...]`` rather than
            ``[T, B, ...]``. Default: False.
        dropout: probability of zeroing an output entry of every layer but the last, in training.
            Default: 0.0.
        bidirectional: D = 2 directions, not 1. Default: False.
        proj_size: P, features of a projection of ``h``; 0 for none (P = H). Default: 0.
        device: of the parameters. Default: torch's.
        dtype: of the parameters. Default: torch's.
        backend: "auto", "reference" or "triton"; see :func:`fastrnn.backends`. Default: "auto".

    Raises:
        ValueError: an argument out of range; TypeError: one of the wrong type; in torch's words.
    """

    backend: Backend = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_backend(backend)
        # Nowhere super() without arguments: it breaks where a method is copied to another class.
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend = backend

    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Lengths | int | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the LSTM over a batch of sequences.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` where ``batch_first``, unbatched ``[T, I]``, a
                PackedSequence, or a nested tensor of layout ``torch.jagged`` ``[B, j, I]``.
            hx: ``(h_0 [L * D, B, P], c_0 [L * D, B, H])``, without B where unbatched. Default:
                zeros.
            lengths: ``[B]`` integers in [0, T], the leading steps of each sequence that are valid;
                a list or a tensor. Default: all.
            mask: bool ``[T, B]``, or ``[B, T]`` where ``batch_first`` or jagged: True = valid,
                anywhere. A masked step leaves the state as it was. Default: all True.
            resets: bool, shaped as ``mask``: True = the state is zeroed before this step, in the
                direction of time; the reverse direction starts afresh after it. Default: none.
            return_cell_states: also return the last layer's cell states. Default: False.

        Returns:
            ``(output, (h_n, c_n))``, and with ``return_cell_states`` ``(output, (h_n, c_n),
            cells)``. ``output`` is ``[T, B, D * P]`` in the form of the input, zero at invalid
            steps; ``h_n`` and ``c_n``, shaped as ``hx``, are the states after each sequence's last
            valid step (its first for the reverse direction), or the initial ones where it has none;
            ``cells`` is ``[T, B, D * H]``. What stands at invalid steps, NaN included, changes
            neither outputs nor gradients. Under autocast the results have autocast's dtype.

        Raises:
            ValueError: a shape or a length that does not fit. Where nn.LSTM has an error for the
                same mistake, its type and words.
            RuntimeError: ``backend="triton"`` cannot run, with the reason.
        """
        if torch.jit.is_tracing():
            return self._trace(input, hx, lengths, mask, resets, return_cell_states)
        unbatched = isinstance(input, Tensor) and not input.is_nested and input.dim() == 2
        if isinstance(input, Tensor) and unbatched:
            dim = 0 if self.batch_first else 1
            input = input.unsqueeze(dim)
            mask = None if mask is None else mask.unsqueeze(dim)
            resets = None if resets is None else resets.unsqueeze(dim)
        if isinstance(lengths, int):  # of an unbatched sequence
            lengths = [lengths]
        form = self._form(input)
        hx = self._initial_states(form, hx, unbatched)
        layers = self._layers()
        self._check_devices(form, hx, layers)
        rows_dtype = self._autocast_dtype(form)

        if lengths is None and mask is None and resets is None:
            layout = form.layout()
        else:
            layout = ragged_layout(form, lengths, mask, resets)
        backend = resolve_backend(self.backend, form.device)
        result = run_stack(
            form.rows(layout).to(rows_dtype),
            layout,
            [[weights.to(rows_dtype) for weights in layer] for layer in layers],
            hx[0].to(rows_dtype),
            hx[1].to(rows_dtype),
            dropout=self.dropout if self.training else 0.0,
            cell_states=return_cell_states,
            backend=backend,
        )
        return self._restore(form, layout, result, unbatched)

    def _restore(
        self, form: Form, layout: PackedLayout, result: StackOutput, unbatched: bool
    ) -> tuple[Any, ...]:
        states = result.h_n, result.c_n
        rows = [result.rows] if result.c is None else [result.rows, result.c]
        sequences = [form.restore(part, layout) for part in rows]
        if unbatched:
            dim = 0 if self.batch_first else 1
            states = states[0].squeeze(1), states[1].squeeze(1)
            sequences = [part.squeeze(dim) for part in sequences if isinstance(part, Tensor)]
        return sequences[0], states, *sequences[1:]

    def _form(self, input: Sequences) -> Form:
        """The form of the input, checked in torch's words."""
        if isinstance(input, PackedSequence):
            self.check_input(input.data, input.batch_sizes)
            return Packed(input, self.batch_first)
        if input.is_nested:
            if input.layout != torch.jagged or input.dim() != 3:
                raise ValueError(
                    "a nested input must have layout torch.jagged and 3 dimensions [B, j, I], got "
                    f"{input.layout} and {input.dim()}; build it with "
                    "torch.nested.nested_tensor(..., layout=torch.jagged)"
                )
            self.check_input(input, None)
            return Jagged(input)
        if input.dim() != 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self.check_input(input, None)
        form = Padded(input, self.batch_first)
        if form.steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return form

    def _initial_states(self, form: Form, hx: States | None, unbatched: bool) -> States:
        """``hx`` checked, batched and in the batch's order; zeros where it is None."""
        directions = 2 if self.bidirectional else 1
        states = self.num_layers * directions
        size_h = self.proj_size or self.hidden_size
        like = form.data
        if hx is None:
            return (
                like.new_zeros(states, form.batch, size_h),
                like.new_zeros(states, form.batch, self.hidden_size),
            )
        h_0, c_0 = hx[0], hx[1]
        if unbatched:
            if h_0.dim() != 2 or c_0.dim() != 2:
                raise RuntimeError(
                    "For unbatched 2-D input, hx and cx should also be 2-D but got "
                    f"({h_0.dim()}-D, {c_0.dim()}-D) tensors"
                )
            h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
        elif h_0.dim() != 3 or c_0.dim() != 3:
            raise RuntimeError(
                "For batched 3-D input, hx and cx should also be 3-D but got "
                f"({h_0.dim()}-D, {c_0.dim()}-D) tensors"
            )
        for index, (state, width) in enumerate(((h_0, size_h), (c_0, self.hidden_size))):
            expected = (states, form.batch, width)
            self.check_hidden_size(state, expected, f"Expected hidden[{index}] size {{}}, got {{}}")
            if state.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
                raise ValueError(
                    f"hidden[{index}] dtype ({state.dtype}) does not match input dtype "
                    f"({like.dtype}). Convert it: hx[{index}].to({like.dtype})"
                )
        return h_0, c_0

    def _layers(self) -> list[list[LayerWeights]]:
        """The weights of each layer and direction, read anew at every call."""
        names = iter(self._flat_weights_names)
        directions = 2 if self.bidirectional else 1

        def direction() -> LayerWeights:
            ih, hh = getattr(self, next(names)), getattr(self, next(names))
            bias_ih = getattr(self, next(names)) if self.bias else None
            bias_hh = getattr(self, next(names)) if self.bias else None
            hr = getattr(self, next(names)) if self.proj_size else None
            return LayerWeights(ih, hh, bias_ih, bias_hh, hr)

        return [[direction() for _ in range(directions)] for _ in range(self.num_layers)]

    def _check_devices(self, form: Form, hx: States, layers: list[list[LayerWeights]]) -> None:
        device = form.device
        for kind, tensors in (("hidden", hx), ("parameter", layers[0][0][:1])):
            for tensor in tensors:
                if tensor is not None and tensor.device != device:
                    raise RuntimeError(
                        f"Input and {kind} tensors are not at the same device, found input tensor "
                        f"at {device} and {kind} tensor at {tensor.device}"
                    )

    def _autocast_dtype(self, form: Form) -> torch.dtype:
        """The dtype the recurrence's inputs are cast to."""
        dtype, kind = form.data.dtype, form.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        return dtype

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Refuse an input of the wrong dtype, rank or width, in torch's words."""
        weight = getattr(self, self._flat_weights_names[0])
        if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})"
            )
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The size of ``c_0``, as nn.LSTM's method of this name."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: States, batch_sizes: Tensor | None
    ) -> None:
        """Check input and states, as nn.LSTM's method of this name."""
        self.check_input(input, batch_sizes)
        sizes = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for index, (state, size) in enumerate(zip(hidden, sizes, strict=True)):
            self.check_hidden_size(state, size, f"Expected hidden[{index}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: States, permutation: Tensor | None
    ) -> States:
        """Permute the batch of both states, as nn.LSTM's method of this name."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        """nn.LSTM's, and the backend where it is not the default."""
        text = nn.RNNBase.extra_repr(self)
        return text if self.backend == "auto" else f"{text}, backend={self.backend}"

    def _trace(self, input: Any, hx: Any, *ragged: Any) -> tuple[Any, ...]:
        """Under ``torch.jit.trace`` and the exporters built on it: torch's own LSTM operator."""
        if any(argument is not None and argument is not False for argument in ragged):
            raise RuntimeError(
                "torch.jit.trace cannot record lengths, mask, resets or cell states; use "
                "torch.export, or trace fastrnn.revert(model) on a PackedSequence"
            )
        from fastrnn.convert import to_torch  # convert is built on this module

        return tuple(to_torch(self)(input, hx))

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which calls this, and name the way out."""
        raise RuntimeError(
            "torch.jit.script cannot compile fastrnn.LSTM. Call fastrnn.revert(model) first, which "
            "puts nn.LSTM back with the same parameters, or use torch.export"
        )
