"""The recurrence over a padded batch as it stands: dense input, and batches too small to pack.

Every direction is one call of torch's oneDNN LSTM over all T * B rows, differentiated by torch
itself. Where sequences end early the carry feature of onednn.py keeps their cell states exact,
zeros replace the input's padding, and outputs of padded steps are zero.

Where a graph of the backward is asked for (``create_graph=True``), a hook on the call's node
replaces its gradients by those of :func:`fastrnn.reference.lstm_composite`, which can be
differentiated again.
torch 2.13 differentiates that backward itself; the hook serves versions not tried.

Limits: those of onednn.py. In the reverse direction padding comes first, and passes zero states
    only;
with initial states of its own such a batch is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import onednn, reference
from fastrnn.packing import PackedLayout
from fastrnn.recurrence import LayerOutput, side_by_side
from fastrnn.reference import LayerWeights


def can_run_padded(rows: Tensor) -> bool:
    """Whether oneDNN can run these rows and torch can differentiate it as asked."""
    return (
        not torch.compiler.is_compiling()
        and onednn.available(rows)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def run_padded(
    rows: Tensor,
    layout: PackedLayout,
    weights: Sequence[LayerWeights],
    h_0: Tensor,
    c_0: Tensor,
) -> LayerOutput:
    """All directions of one layer over a padded batch.

    Args:
        rows: ``[T * B, I]`` float32.
        layout: in which every sequence has all the rows; of them ``layout.padding`` are padding.
        weights: of each direction, without projections.
        h_0: ``[D, B, H]``; zeros where there is padding and D is 2.
        c_0: ``[D, B, H]``, likewise.

    Returns:
        See :class:`LayerOutput`; outputs in the padding are zero, and ``c`` is None.
    """
    padding = None if layout.padding is None else layout.padding.unsqueeze(1)
    if padding is not None:
        rows = torch.cat([rows.masked_fill(padding, 0.0), padding.to(rows.dtype)], 1)
    x = rows.contiguous().view(-1, layout.sequences, rows.shape[1])
    outputs, h_finals, c_finals = [], [], []
    for index, direction in enumerate(weights):
        output, h_n, c_n = _run_direction(
            x, direction, h_0[index], c_0[index], layout.padding, reverse=index == 1
        )
        if padding is not None:
            output = output.masked_fill(padding, 0.0)
            if index == 0 and layout.last is not None:  # the last step may be padding
                h_n = output.index_select(0, layout.last)
        outputs.append(output)
        h_finals.append(h_n)
        c_finals.append(c_n)
    return LayerOutput(side_by_side(outputs), torch.stack(h_finals), torch.stack(c_finals), None)


def _run_direction(
    x: Tensor,
    weights: LayerWeights,
    h_0: Tensor,
    c_0: Tensor,
    padding: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[T * B, H]`` and final states ``[B, H]``."""
    operands = onednn.operands(weights, carry=padding is not None)
    inputs = (x, *operands, h_0.contiguous(), c_0.contiguous())
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    output, h_n, c_n, _ = onednn.dense_forward(
        x, operands, inputs[5], inputs[6], reverse=reverse, save=save
    )
    if save and output.grad_fn is not None:
        output.grad_fn.register_hook(_DifferentiableBackward(inputs, reverse))
    return output.view(-1, h_n.shape[1]), h_n, c_n


class _DifferentiableBackward:
    """The hook: replaces the node's gradients where they are to be differentiated again."""

    def __init__(self, inputs: tuple[Tensor, ...], reverse: bool) -> None:
        self.inputs, self.reverse = inputs, reverse

    def __call__(
        self, d_inputs: tuple[Tensor | None, ...], d_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            return None
        # Views, so that a gradient reaches an input here only through this call.
        views = [tensor.view_as(tensor) for tensor in self.inputs]
        x, ih, hh, bias_ih, bias_hh, h_0, c_0 = views
        steps, batch = x.shape[:2]
        run = reference.lstm_composite(
            x.flatten(0, 1),
            [batch] * steps,
            LayerWeights(ih, hh, bias_ih, bias_hh),
            h_0,
            c_0,
            reverse=self.reverse,
        )
        reached = [
            (output, gradient.view_as(output))
            for output, gradient in zip((run.h, run.h_n, run.c_n), d_outputs, strict=False)
            if gradient is not None
        ]
        wanted = [view for view, d in zip(views, d_inputs, strict=True) if d is not None]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in reached],
                wanted,
                [gradient for _, gradient in reached],
                create_graph=True,
                allow_unused=True,
            )
        )
        return tuple(None if d is None else next(found) for d in d_inputs)
