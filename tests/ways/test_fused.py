"""The kernels' way: what surrounds the launches."""

from __future__ import annotations

import subprocess
import sys

SWITCHES = [
    "pass",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
    "backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cudnn.allow_tf32 = False",
    "backends.cudnn.rnn.fp32_precision = 'ieee'",
    "backends.cudnn.rnn.fp32_precision = 'ieee'; backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.cudnn.fp32_precision = 'ieee'; torch.set_float32_matmul_precision('high')",
]
# torch's older switches raise after some of these, so each has a process of its own.
PRODUCTS = """
import os, sys
import torch
from torch import backends
from fastrnn.ways.fused import input_precision, products_of

matmul, cuda = backends.cuda.matmul, torch.device("cuda")

def read(switch):
    try:
        return switch()
    except RuntimeError as error:
        return str(error)

def state():
    return [
        matmul.fp32_precision,
        backends.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
        read(lambda: matmul.allow_tf32),
        read(torch.get_float32_matmul_precision),
    ]

def check(setting):
    exec(setting)
    before = state()
    for precision in ("tf32", "tf32x3", input_precision()):
        try:
            with products_of(precision, cuda, torch.float32):
                assert (matmul.fp32_precision == "tf32") == (precision == "tf32")
                1 / 0
        except ZeroDivisionError:
            pass
        assert state() == before
        for others in ((cuda, torch.bfloat16), (torch.device("cpu"), torch.float32)):
            with products_of(precision, *others):
                assert state() == before

for number, setting in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        check(setting)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"after {setting}")
"""


def test_products_have_the_rnns_precision_and_every_switch_is_put_back():
    command = [sys.executable, "-W", "ignore", "-c", PRODUCTS, *SWITCHES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
