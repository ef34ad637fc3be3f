"""torch.onnx.export writes ONNX's own LSTM, and onnxruntime computes from it what we do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastrnn
from tests.oracle import make_state

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install fastrnn[onnx]")
pytest.importorskip("onnxscript", reason="pip install fastrnn[onnx]")

I, H = 3, 5

# Of torch's own code, and of what it calls.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]


def export(model, arguments, dynamic_shapes):
    return torch.onnx.export(
        model, arguments, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes
    )


def run(program, *arguments):
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    given = dict(zip(names, (argument.numpy() for argument in arguments), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, given)]


CONFIGURATIONS = {
    "plain": {},
    "2-layers-bidirectional": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
}


class Model(nn.Module):
    """An LSTM among other layers, with and without lengths and a state."""

    def __init__(self, **config):
        super().__init__()
        self.lstm = fastrnn.LSTM(I, H, **config)

    def forward(self, x, lengths=None, h_0=None, c_0=None):
        hx = None if h_0 is None else (h_0, c_0)
        output, (h_n, c_n) = self.lstm(x * 2, hx, lengths=lengths)
        return output.relu(), h_n, c_n


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths"])
def test_any_number_of_steps_and_sequences(ragged, config):
    model = Model(**config).eval()
    time, batch = (1, 0) if model.lstm.batch_first else (0, 1)
    dim = torch.export.Dim.DYNAMIC
    shapes = [{time: dim, batch: dim}, {0: dim} if ragged else None, {1: dim}, {1: dim}]

    def arguments(steps, lengths):
        x = torch.randn(steps, len(lengths), I)
        for index, length in enumerate(lengths if ragged else ()):
            x[length:, index] = torch.nan
        x = x.transpose(0, 1).contiguous() if model.lstm.batch_first else x
        lengths = torch.tensor(lengths) if ragged else None
        return x, lengths, *make_state(model.lstm, x.shape[batch])

    program = export(model, arguments(6, [4, 6, 2, 5]), tuple(shapes))
    nodes = [node.op_type for node in program.model.graph]
    assert nodes.count("LSTM") == model.lstm.num_layers
    for steps, lengths in ((6, [3, 6, 0, 1]), (9, [9, 2]), (2, [1, 1, 2])):
        given = arguments(steps, lengths)
        found = run(program, *(value for value in given if value is not None))
        torch.testing.assert_close(found, [*model(*given)], rtol=1e-5, atol=1e-6)


def test_a_model_without_a_state_or_lengths():
    model, x = Model().eval(), torch.randn(4, 2, I)
    found = run(export(model, (x,), None), x)
    torch.testing.assert_close(found, [*model(x)], rtol=1e-5, atol=1e-6)


class Masked(Model):
    def forward(self, x, mask):
        return self.lstm(x, mask=mask)[0]


def test_what_onnx_cannot_say_is_refused_with_the_way_out():
    arguments = torch.randn(4, 2, I), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(
        torch.onnx.OnnxExporterError, match=r"no words for a mask; use torch\.export"
    ):
        export(Masked().eval(), arguments, None)


def test_one_unbatched_sequence():
    model, x = Model().eval(), torch.randn(4, I)
    found = run(export(model, (x,), None), x)
    torch.testing.assert_close(found, [*model(x)], rtol=1e-5, atol=1e-6)
