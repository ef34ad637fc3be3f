"""fastrnn: LSTMs over ragged batches, for one changed line.

Importing it needs torch only and changes nothing: triton is imported when a kernel is first needed,
and nothing is patched before :func:`patched` is entered.
"""

from fastrnn.choosing.backends import backends, limit_multiprocessors
from fastrnn.clip import GradientClipper, clip_grad_norm_
from fastrnn.convert import convert, patched, revert
from fastrnn.explain import explain
from fastrnn.lstm import LSTM
from fastrnn.tune import tune

__all__ = [
    "LSTM",
    "GradientClipper",
    "backends",
    "clip_grad_norm_",
    "convert",
    "explain",
    "limit_multiprocessors",
    "patched",
    "revert",
    "tune",
]
__version__ = "0.1.0"
