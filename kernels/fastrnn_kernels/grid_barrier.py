"""A barrier among the programs of a batch tile, in two halves so that work fits between them.

`arrivals` is one int32 per batch tile and direction, zero when the kernel starts, and only ever
grows: step i is complete when it reaches (i + 1) * participants. A counter that never turns back
needs no reset, no sense bit and no second counter, and cannot be confused by a program that runs a
step ahead; it would overflow after 2^31 arrivals, that is 16 million steps of 128 programs.

All participants must be resident at the same time, or they spin for ever: launch with
launch_cooperative_grid=True. Why this orders memory: kernels/README.md, 'The barrier'.
"""

import triton
import triton.language as tl


@triton.jit
def count_arrival(arrivals_ptr):
    """Publishes every store this program has made so far, and counts it as arrived."""
    # Without it one thread could release while its neighbours' stores are still to come.
    tl.debug_barrier()
    tl.atomic_add(arrivals_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(arrivals_ptr, target):
    """Returns once `target` arrivals were counted: what they published can then be read."""
    while tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
