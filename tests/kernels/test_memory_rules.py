"""The rules about PTX that the barrier's proof rests on can fail, each for its reason."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("about compiled code", allow_module_level=True)

import torch

from fastrnn_kernels.lstm_backward import lstm_backward
from fastrnn_kernels.lstm_forward import lstm_forward
from fastrnn_kernels.memory_rules import exchange_faults, proxy_faults
from tests.kernels.stand_in_driver import stand_in

# The loop over steps as it is compiled: publish, arrive, wait, load; %rd9 is another pointer.
GOOD = """
    ld.param.b64 %rd1, [kernel_param_7];
    ld.param.b64 %rd9, [kernel_param_8];
    add.s64 %rd2, %rd1, %rd5;
    bar.sync 0;
    @%p1 atom.global.gpu.release.add.u32 %r1, [ %rd9 + 0 ], %r2;
$L__BB0_1:
    ld.global.v4.b32 { %r8 }, [ %rd9 + 16 ];  // gates of the next step
$L__BB0_2:
    @%p1 ld.global.gpu.acquire.b32 %r3, [ %rd9 + 0 ];
    bar.sync 0;
    @%p2 bra $L__BB0_2;
    mad.wide.u32 %rd3, %r4, 2, %rd2;
    ld.global.v4.b32 { %r5 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 64 ], 0x10, %r7;
    st.shared.v4.b32 [ %r6 + 0 ], { %r5 };
    fence.proxy.async.shared::cta;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%f1}, %rd20, %rd21, 1, 1, 1;
    st.global.b32 [ %rd2 + 0 ], { %r589 };
    bar.sync 0;
    @%p1 atom.global.gpu.release.add.u32 %r1, [ %rd9 + 0 ], %r2;
    @%p3 bra $L__BB0_1;
    ret;
"""
BROKEN = {
    "moved-before-the-wait": (
        "    ld.global.v4.b32 { %r8 }, [ %rd9 + 16 ];",
        "    ld.global.v4.b32 { %r8 }, [ %rd2 + 16 ];",
        ["the exchange is loaded before the wait"],
    ),
    "a-path-around-the-wait": (
        "$L__BB0_1:\n",
        "$L__BB0_1:\n    @%p4 bra $L__BB0_3;\n",
        ["the exchange is loaded before the wait"],
    ),
    "no-acquire": (".acquire", "", ["the exchange is loaded before the wait"]),
    "non-coherent": (
        "ld.global.v4.b32 { %r5 }",
        "ld.global.nc.v4.b32 { %r5 }",
        ["the exchange is loaded by the non-coherent path"],
    ),
    "another-parameter": ("param_7", "param_6", ["no load of the exchange was found"]),
}


def broken(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new)
    return text.replace("    mad.wide", "$L__BB0_3:\n    mad.wide")


def test_the_loop_as_it_is_compiled_passes() -> None:
    assert exchange_faults(GOOD, 7) == []
    assert proxy_faults(GOOD) == []


@pytest.mark.parametrize("name", BROKEN)
def test_an_exchange_that_is_read_wrongly_is_found(name: str) -> None:
    old, new, faults = BROKEN[name]
    assert exchange_faults(broken(old, new), 7) == faults


def test_a_product_before_the_fence_is_found() -> None:
    assert proxy_faults(GOOD.replace("    fence.proxy.async.shared::cta;\n", "")) == [
        "no proxy fence between shared memory's stores and a product"
    ]


def test_copies_by_the_asynchronous_proxy_are_found() -> None:
    copied = GOOD.replace("cp.async.cg", "cp.async.bulk")
    assert "the asynchronous proxy copies" in proxy_faults(copied)


@pytest.mark.parametrize("H", [256, 2048], ids=["split", "streamed"])
def test_what_programs_share_is_zero_at_every_launch(H: int) -> None:
    """Counters, and rows of the exchange that no program writes; memory not filled is NaN here."""
    T, S = 2, 3
    sizes = torch.full((T,), S)
    offsets = sizes.cumsum(0) - sizes
    gates, weight = torch.zeros(T * S, 1, 4 * H), torch.zeros(1, 4 * H, H)
    state = torch.zeros(1, S, H)
    with stand_in() as driver:
        for _ in range(2):  # the second may get the first's memory
            found = lstm_forward(gates, weight, state, state, sizes, offsets, save="gates")
            lstm_backward(found.h, state, state, gates, found.h, state, weight, sizes, offsets)
    assert len(driver.launches) == 4
    for launch in driver.launches:
        assert dict(launch.variant.constants)["RESIDENCY"] != "whole"
        assert launch.zero_at_launch == {"exchange_ptr": True, "arrivals_ptr": True}
