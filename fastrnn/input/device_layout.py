"""Layouts of batches whose lengths nobody may look at, by the Triton kernels.

The same as :func:`fastrnn.input.packing.ragged_layout` makes of operations of torch, in three
launches and a sort; and with the way back, from places of the input to rows.

Limits: padded input; not under ``torch.compile``, which makes few kernels of many operations too.
"""

from __future__ import annotations

import logging

from torch import Tensor

from fastrnn import torch_private
from fastrnn.input.packing import Addressing, PackedLayout, Steps, ThereAndBack

_log = logging.getLogger("fastrnn")


def bounded_layout(
    form: Addressing, lengths: Tensor | None, mask: Tensor | None, resets: Tensor | None
) -> PackedLayout | None:
    """The bounded layout of a padded batch; None where its kernels are not used.

    Args:
        form: the input's form, with at least one step and sequence.
        lengths: ``[B]`` int64, or None for all steps; like the next two on the form's device.
        mask: bool ``[B, T]``, or None.
        resets: bool ``[B, T]``, or None.
    """
    from fastrnn_kernels import bounded_layout as kernels
    from fastrnn_kernels.launch import CannotLaunch

    try:
        found = kernels.bounded_layout(
            *(form.batch, form.steps, lengths, mask, resets),
            time_major=form.time_major,
            device=form.device,
        )
    except CannotLaunch as error:  # which was warned of, and is remembered
        _log.info("torch's operations stand in for the kernels of the layout: %s", error)
        return None
    if lengths is not None:
        torch_private.assert_async(
            found.fits, "lengths must lie in [0, T], T the steps of the input"
        )
    layout = PackedLayout(
        form.batch * form.steps,
        found.owner.shape[0],
        found.batch_sizes,
        found.gather,
        found.owner,
        found.enters,
        found.leaves,
        exact=False,
        there_and_back=ThereAndBack(found.gather, found.spread, found.valid),
    )
    layout.keep_steps(form.device, Steps(found.batch_sizes, found.offsets))
    return layout
