"""What every kernel is compiled with, by its launcher and by the offline gate alike."""

from __future__ import annotations


def compiler_options(
    num_warps: int = 4,
    *,
    num_stages: int | None = None,
    cooperative: bool = False,
    max_registers: int | None = None,
) -> dict[str, object]:
    """The options of a launch and of `triton.compile`.

    A product and a sum are fused into one rounding, as Triton does by default up to 3.9. Said here,
    Triton 3.10's other default changes neither results nor what the offline gate has seen.

    Args:
        num_warps: warps of a program.
        num_stages: of loops that are pipelined; None leaves it to Triton.
        cooperative: whether all programs must be resident at once.
        max_registers: of a thread; None leaves it to the compiler.
    """
    options: dict[str, object] = {
        "num_warps": num_warps,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": cooperative,
    }
    if num_stages is not None:
        options["num_stages"] = num_stages
    if max_registers is not None:
        options["maxnreg"] = max_registers
    return options
