"""The LSTM module: reads the input's form, runs the stack over packed rows, restores the form."""

from __future__ import annotations

import functools
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from fastrnn import torch_private
from fastrnn.choosing import measured
from fastrnn.choosing.backends import Backend, check_backend
from fastrnn.choosing.choose import Choice, choose, dense_on_cpu
from fastrnn.choosing.describe import logs_paths
from fastrnn.choosing.environment import forced_backend, tunes_at_first_sight
from fastrnn.choosing.request import Request
from fastrnn.compute import Computed, Sequences, compute, run_dense_by, run_once
from fastrnn.flops import teach
from fastrnn.input.arguments import Lengths, batched_flags, batched_length
from fastrnn.input.forms import Form, Jagged, Packed, Padded
from fastrnn.input.transforms import have_own_class
from fastrnn.ways.onednn import outside_transforms
from fastrnn.ways.recurrence import CPU, Memory, autocast_dtype, check_memory
from fastrnn.ways.torch_lstm import Stack

States: TypeAlias = tuple[Tensor, Tensor]


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
        backend: "auto", "torch", "reference" or "triton"; see :func:`fastrnn.backends`. Default:
            "auto".
        memory: "save" keeps for backward what forward has computed; "recompute" keeps of it the
            outputs and the cell states, and makes the gates, 4H numbers a step and direction,
            again with one more matrix product. Default: "save".

    Raises:
        ValueError: an argument out of range, in torch's words.
        TypeError: one of the wrong type, in torch's words.
    """

    backend: Backend = "auto"
    memory: Memory = "save"

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
        memory: Memory = "save",
    ) -> None:
        check_backend(backend)
        check_memory(memory)
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
        self.memory = memory
        teach()

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
        if torch_private.tracing_state():
            return self._trace(input, hx, lengths, mask, resets, return_cell_states)
        if issubclass(type(input), Proxy):  # no Tensor, and stands for one
            return self._as_leaf(input, hx, lengths, mask, resets, return_cell_states)
        if not torch.compiler.is_compiling() and torch_private.dispatch_modes():
            teach()  # a counter may be watching
        if lengths is None and mask is None and resets is None and not return_cell_states:
            found = self._dense_on_cpu(input, hx)
            if found is not None:
                return found
        asked, unbatched = self._read(input, hx, lengths, mask, resets, return_cell_states)
        choice = choose(asked)
        if choice.by_rule and tunes_at_first_sight(asked.form.device):
            measured.measure(asked, run_once)
            choice = choose(asked)
        return self._as_given(unbatched, compute(asked, choice))

    def _dense_on_cpu(self, x: Sequences, hx: States | None) -> tuple[Tensor, States] | None:
        """A dense batch on the CPU by an operator of torch's; None for any other call.

        Checks and way are those of a Request. Without one a call takes 15 us less, of the 40 that
        a step of a rollout takes.
        """
        if type(x) is not Tensor or x.device != CPU or x.layout != torch.strided or x.is_nested:
            return None
        if x.dim() != 3:
            return None
        if hx is not None and (type(hx) is not tuple or not all(isinstance(s, Tensor) for s in hx)):
            return None
        if self.backend != "auto" or self.memory != "save" or forced_backend() or logs_paths():
            return None
        if not outside_transforms() or autocast_dtype(CPU) is not None or x.dtype.is_complex:
            return None
        flat, stack, batch_first = self._flat(), self._stack(), self.batch_first
        if have_own_class(flat):
            return None
        train = self._needs_grad(x, *flat, *(() if hx is None else hx))
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
        if not steps:
            return None
        choice = dense_on_cpu(x, flat, stack, (steps, batch), train, x.dtype)
        if choice is None:
            return None
        self.check_input(x, None)
        self._check_weights(flat, CPU, x.dtype)
        h_0, c_0 = (None, None) if hx is None else self._initial_states(x, batch, hx, False)
        output, h_n, c_n = run_dense_by(choice.way, x, flat, h_0, c_0, stack, batch_first, train)
        return output, (h_n, c_n)

    def _read(
        self,
        input: Sequences,
        hx: States | None,
        lengths: Lengths | int | None,
        mask: Tensor | None,
        resets: Tensor | None,
        cell_states: bool,
    ) -> tuple[Request, bool]:
        """What a call asks for, checked; and whether it is one unbatched sequence."""
        unbatched = isinstance(input, Tensor) and not input.is_nested and input.dim() == 2
        if isinstance(input, Tensor) and unbatched:
            dim, steps = 0 if self.batch_first else 1, input.shape[0]
            input = input.unsqueeze(dim)
            lengths = batched_length(lengths)
            mask = batched_flags("mask", mask, steps, dim)
            resets = batched_flags("resets", resets, steps, dim)
        form = self._form(input)
        check_memory(self.memory)
        x, device = form.data, form.device
        autocast = None if x.dtype == torch.float64 else autocast_dtype(device)
        dtype = autocast or x.dtype
        flat = self._flat()
        own_class = have_own_class(flat)
        if not own_class:
            self._check_weights(flat, device, None if autocast else dtype)
        h_0, c_0 = None, None
        if hx is not None:
            h_0, c_0 = self._initial_states(x, form.batch, hx, unbatched)
            if autocast:
                h_0, c_0 = h_0.to(dtype), c_0.to(dtype)
        # An ExpandedWeight does not even say whether it needs a gradient.
        needs_grad = torch.is_grad_enabled() and (own_class or self._needs_grad(x, *flat, h_0, c_0))
        stack = self._stack()
        given = lengths, mask, resets, flat, h_0, c_0, dtype, stack, self.backend, self.memory
        found = Request(form, *given, cell_states, needs_grad, autocast is not None, own_class)
        return found, unbatched

    def _flat(self) -> list[Tensor]:
        """All weights, read anew at every call."""
        known = self._parameters  # where getattr looks only after it has failed elsewhere
        try:
            return [known[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:  # computed, by a parametrization for one
            return [getattr(self, name) for name in self._flat_weights_names]

    def _stack(self) -> Stack:
        dropout = self.dropout if self.training else 0.0
        return Stack(self.num_layers, self.bias, self.bidirectional, self.proj_size > 0, dropout)

    def _needs_grad(self, *tensors: Tensor | None) -> bool:
        """Whether there may be a backward."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )

    def _as_given(self, unbatched: bool, found: Computed) -> tuple[Any, ...]:
        """What forward returns, unbatched where the input was."""
        h_n, c_n, sequences = found
        if unbatched:
            dim = 0 if self.batch_first else 1
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
            sequences = [part.squeeze(dim) for part in sequences if isinstance(part, Tensor)]
        return sequences[0], (h_n, c_n), *sequences[1:]

    def _form(self, input: Sequences) -> Form:
        """The form of the input, checked in torch's words."""
        if isinstance(input, PackedSequence):
            self.check_input(input.data, input.batch_sizes)
            return Packed(input, self.batch_first)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"input must be a tensor or a PackedSequence, got {type(input).__name__}; make a "
                "tensor of numbers with torch.as_tensor, of ragged sequences with "
                "torch.nn.utils.rnn.pad_sequence, and give an LSTM's result on as lstm(x)[0]"
            )
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

    def _initial_states(self, like: Tensor, batch: int, hx: States, unbatched: bool) -> States:
        """``hx`` checked and batched."""
        states = self.num_layers * (2 if self.bidirectional else 1)
        size_h = self.proj_size or self.hidden_size
        if not isinstance(hx, (tuple, list)):
            raise TypeError(
                f"hx must be a pair of tensors (h_0, c_0), got {type(hx).__name__}; an LSTM has "
                "two states where a GRU has one"
            )
        if len(hx) > 2:
            raise RuntimeError("lstm expects two hidden states")
        h_0, c_0 = hx[0], hx[1]
        if not (isinstance(h_0, Tensor) and isinstance(c_0, Tensor)):
            raise TypeError(
                "hx must be a pair of tensors (h_0, c_0), got "
                f"({type(h_0).__name__}, {type(c_0).__name__}); leave hx out for zeros"
            )
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
            expected = (states, batch, width)
            if torch.compiler.is_compiling():  # a PackedSequence's batch is known at run time
                torch._check(state.shape[1] == batch)
            self.check_hidden_size(state, expected, f"Expected hidden[{index}] size {{}}, got {{}}")
            if state.device != like.device:
                self._refuse_device("hidden", like.device, state)
            if state.dtype != like.dtype and not _is_cast(state):
                raise ValueError(
                    f"hidden[{index}] dtype ({state.dtype}) does not match input dtype "
                    f"({like.dtype}). Convert it: hx[{index}].to({like.dtype})"
                )
        return h_0, c_0

    def _check_weights(
        self, flat: list[Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Refuse weights that are not what the sizes say.

        Whatever computes them reads as much memory as the sizes say, so device and shape of each
        are compared, and its dtype unless that is None.
        """
        sizes = self.input_size, self.hidden_size, self.proj_size
        shapes = _weight_shapes(*sizes, self.num_layers, self.bidirectional, self.bias)
        for name, weight, shape in zip(self._flat_weights_names, flat, shapes, strict=True):
            if weight.device != device:
                self._refuse_device("parameter", device, weight)
            if weight.shape != shape:
                raise RuntimeError(
                    f"{name} must have shape {list(shape)}, got {list(weight.shape)}"
                )
            if dtype is not None and weight.dtype != dtype:
                raise ValueError(
                    f"{name} must have the input's dtype {dtype}, got {weight.dtype}; "
                    f"convert it: model.to({dtype})"
                )

    def _weight(self, name: str) -> Tensor:
        weight = self._parameters.get(name)  # which getattr finds by way of a failure
        found: Tensor = getattr(self, name) if weight is None else weight
        return found

    def _refuse_device(self, kind: str, device: torch.device, tensor: Tensor) -> NoReturn:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, found input tensor "
            f"at {device} and {kind} tensor at {tensor.device}"
        )

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Refuse an input of the wrong dtype, rank or width, in torch's words."""
        weight = self._weight(self._flat_weights_names[0])
        if input.dtype != weight.dtype and not _is_cast(input):
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
        """nn.LSTM's, and backend and memory where they are not the default."""
        text = nn.RNNBase.extra_repr(self)
        for name in ("backend", "memory"):
            if getattr(self, name) != getattr(LSTM, name):
                text += f", {name}={getattr(self, name)}"
        return text

    def _trace(self, input: Any, hx: States | None, *ragged: Any) -> tuple[Any, ...]:
        """Under ``torch.jit.trace`` and the exporters built on it: torch's own LSTM operator."""
        if any(argument is not None and argument is not False for argument in ragged):
            raise RuntimeError(
                "torch.jit.trace cannot record lengths, mask, resets or cell states; use "
                "torch.export, or trace fastrnn.revert(model) on a PackedSequence"
            )
        asked, unbatched = self._read(input, hx, None, None, None, False)
        asked = asked._replace(needs_grad=self.training)  # the flag that nn.LSTM records
        return self._as_given(unbatched, compute(asked, Choice("torch", "torch.jit.trace records")))

    def _as_leaf(self, input: Any, hx: Any, *ragged: Any) -> tuple[Any, ...]:
        """Under ``torch.fx.symbolic_trace``: one node that calls the module, as nn.LSTM is."""
        hooks = (self._forward_pre_hooks, self._forward_hooks)
        path = next((n for n, m in input.tracer.root.named_modules() if m is self), "")
        if any(hooks) or not path:
            raise TraceError(
                "torch.fx traces a fastrnn.LSTM inside a model, and without hooks; else use a "
                "Tracer whose is_leaf_module says True for it"
            )
        names = ("lengths", "mask", "resets", "return_cell_states")
        given = {
            n: v for n, v in zip(names, ragged, strict=True) if v is not None and v is not False
        }
        found: tuple[Any, ...] = input.tracer.create_proxy("call_module", path, (input, hx), given)
        return found  # a Proxy, which Python unpacks as a tuple

    def _init_flat_weights(self) -> None:
        """Keep parameters only: a computed weight has a history, which deepcopy refuses."""
        torch_private.init_flat_weights(self)
        self._flat_weights = [
            weight if isinstance(weight, nn.Parameter) else None for weight in self._flat_weights
        ]

    def __prepare_scriptable__(self) -> nn.LSTM:
        """What ``torch.jit.script`` compiles instead: an nn.LSTM with the same parameters.

        torch leaves it in the model around this module; ``fastrnn.convert(model)`` undoes that.
        """
        from fastrnn.convert import to_torch  # late, for it imports this module

        try:
            return to_torch(self)
        except TypeError as error:
            raise RuntimeError(
                f"torch.jit.script cannot compile {type(self).__name__}, a subclass of "
                "fastrnn.LSTM; use torch.export, or torch.jit.trace"
            ) from error


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast makes another dtype of it; integers and complex numbers it leaves alone."""
    return tensor.is_floating_point() and autocast_dtype(tensor.device) is not None


@functools.lru_cache(maxsize=256)
def _shapes(
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
) -> tuple[torch.Size, ...]:
    """Of all weights, in the order of ``_flat_weights_names``."""
    gates, width, directions = 4 * hidden_size, proj_size or hidden_size, 1 + bool(bidirectional)
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        features = directions * width if layer else input_size
        one: list[tuple[int, ...]] = [(gates, features), (gates, width)]
        one += [(gates,), (gates,)] if bias else []
        one += [(width, hidden_size)] if proj_size else []
        shapes += one * directions
    return tuple(map(torch.Size, shapes))


def _weight_shapes(*sizes: int) -> tuple[torch.Size, ...]:
    return _shapes(*sizes)


# A constant to torch.compile, which would ignore the cache, and say so; see backends.py.
_weight_shapes._dynamo_marked_constant = True  # type: ignore[attr-defined]
