"""A barrier among the programs of a batch tile, in two halves so that work fits between them.

`arrivals` is one int32 per batch tile and direction, zero when the kernel starts, and only ever
grows: step i is complete when it reaches (i + 1) * participants. A counter that never turns back
needs no reset, no sense bit and no second counter, and cannot be confused by a program that runs a
step ahead; it would overflow after 2^30 arrivals, that is 8 million steps of 128 programs.

All participants must be resident at the same time: launch with launch_cooperative_grid=True. Why
this orders memory: kernels/README.md, 'The barrier'.

A wait that nobody will ever end gives up. It sets the word `failed`, for the host (see
failed_waits.py) and for the programs of other tiles, and raises the counter by so much that every
wait of its tile is over at once: all programs go on to the end of their loops, and leave. What they
have computed is then worthless.
"""

import triton
import triton.language as tl

# A wait ends after the slowest neighbour's step, some microseconds. A poll is one way to the L2
# cache and back, 273 cycles or more (arXiv 2402.13499, H100), so this is ten seconds at the least
# and some tens of seconds where clocks are low or the GPU is busy: longer than anything that
# delays a program which is resident, shorter than a user's patience.
MOST_POLLS: tl.constexpr = tl.constexpr(2**26)
# `failed` lies in the host's memory. Looked at this seldom it costs a wait nothing; and a launch
# of many tiles that has failed still ends soon.
POLLS_PER_LOOK: tl.constexpr = tl.constexpr(1024)
# Above every target, and as far again below the end of int32.
GAVE_UP: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def count_arrival(arrivals_ptr):
    """Publishes every store this program has made so far, and counts it as arrived."""
    # Without it one thread could release while its neighbours' stores are still to come.
    tl.debug_barrier()
    tl.atomic_add(arrivals_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(arrivals_ptr, target, failed_ptr):
    """Returns once `target` arrivals were counted: what they published can then be read.

    Or once this wait, or another one, was given up; `failed` is 1 then.
    """
    polls = 0
    while tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu") < target:
        polls += 1
        if polls % POLLS_PER_LOOK == 0:
            if polls >= MOST_POLLS:
                tl.store(failed_ptr, 1)
            # No branch: each thread reads the word for itself, and one may see it before another.
            failed = tl.load(failed_ptr, volatile=True)
            tl.atomic_max(arrivals_ptr, failed * GAVE_UP, sem="relaxed", scope="gpu")
    tl.debug_barrier()
