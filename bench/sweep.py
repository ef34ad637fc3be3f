"""``python -m bench sweep``: random calls as programs make them, fastrnn against nn.LSTM.

A table of chosen shapes says nothing of those between; this draws calls from a seed: dense, packed,
with lengths (against packing, which is what they replace), and single steps with a state, as in
rollouts and decoders; in float32, float64 and bfloat16, with projections, layers and directions;
in training and without gradients. Each is verified, then timed with both sides in turns. Where
fastrnn seems to lose, ten times the rounds decide.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from bench import results_file
from bench.results_file import Record
from bench.timing import geometric_mean, interleave, speedup

FORMS = ("dense", "packed", "lengths", "step")
# What is asked of every call, and below which it is measured again with more rounds.
ASKED = 0.9
AGAIN = 10
# Of the largest magnitude of a tensor; bfloat16 is computed in another order of roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2}
# Multiplications of a forward pass at most: a call takes a fraction of a second.
MOST_WORK = 4e8


class Call(NamedTuple):
    """One call.

    Attributes:
        form: of :data:`FORMS`.
        training: forward and backward, rather than forward without gradients.
        dtype: of everything.
        batch: B.
        steps: T.
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bidirectional: D = 2.
        proj_size: P.
    """

    form: str
    training: bool
    dtype: torch.dtype
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    proj_size: int

    @property
    def id(self) -> str:
        parts = [self.form, f"T{self.steps}", f"B{self.batch}", f"I{self.input_size}"]
        parts += [f"H{self.hidden_size}", f"L{self.num_layers}"]
        parts += ["bidirectional"] * self.bidirectional + [f"P{self.proj_size}"] * bool(
            self.proj_size
        )
        return "-".join([*parts, str(self.dtype)[6:], "training" if self.training else "inference"])


def draw(form: str, rng: random.Random) -> Call:
    """A call of this form, small enough to be timed."""
    while True:
        hidden_size = rng.choice((8, 16, 32, 64, 100, 128, 200, 256))
        call = Call(
            form,
            rng.random() < 0.5,
            rng.choice((torch.float32,) * 5 + (torch.float64,) * 2 + (torch.bfloat16,)),
            rng.choice((1, 2, 4, 8, 16, 32, 64, 128)),
            1 if form == "step" else rng.choice((1, 2, 3, 5, 8, 12, 20, 35, 50, 100, 200)),
            rng.choice((1, 4, 12, 32, 64, 128, 256)),
            hidden_size,
            rng.choice((1, 1, 1, 2, 3)),
            form != "step" and rng.random() < 0.3,
            hidden_size // 2 if rng.random() < 0.15 else 0,
        )
        weights = 4 * hidden_size * (call.input_size + hidden_size) * call.num_layers
        if call.batch * call.steps * weights * (1 + call.bidirectional) < MOST_WORK:
            return call


class Sides:
    """A call by both modules, which hold the same weights."""

    def __init__(self, call: Call, seed: int) -> None:
        torch.manual_seed(seed)
        sizes = call.input_size, call.hidden_size, call.num_layers
        options: dict[str, Any] = {
            "bidirectional": call.bidirectional,
            "proj_size": call.proj_size,
            "dtype": call.dtype,
        }
        self.call = call
        self.modules: dict[str, nn.Module] = {
            "nn.LSTM": nn.LSTM(*sizes, **options),
            "fastrnn": fastrnn.LSTM(*sizes, **options),
        }
        self.modules["fastrnn"].load_state_dict(self.modules["nn.LSTM"].state_dict())
        for module in self.modules.values():
            module.train(call.training)
        shape = call.steps, call.batch, call.input_size
        self.x = torch.randn(shape, dtype=call.dtype, requires_grad=call.training)
        count = call.num_layers * (1 + call.bidirectional)
        widths = call.proj_size or call.hidden_size, call.hidden_size
        self.state = tuple(torch.randn(count, call.batch, w, dtype=call.dtype) for w in widths)
        generator = torch.Generator().manual_seed(seed)
        least = max(1, call.steps // 10)
        self.lengths = torch.randint(least, call.steps + 1, (call.batch,), generator=generator)
        self.lengths[0] = call.steps

    def run(self, name: str) -> list[Tensor]:
        """The outputs, and in training all gradients."""
        module, form = self.modules[name], self.call.form
        with torch.set_grad_enabled(self.call.training):
            if form == "step":
                output, states = module(self.x, self.state)
            elif form == "dense":
                output, states = module(self.x)
            elif form == "lengths" and name == "fastrnn":
                output, states = module(self.x, lengths=self.lengths)
            else:
                packed = pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
                output, states = module(packed)
                output = pad_packed_sequence(output)[0] if form == "lengths" else output.data
            if not self.call.training:
                return [output, *states]
            inputs = [self.x, *module.parameters()]
            return [output, *states, *torch.autograd.grad(output.sum(), inputs)]

    def runs(self) -> dict[str, Callable[[None], object]]:
        """What is timed, by name."""
        return {name: lambda _, name=name: self.run(name) for name in self.modules}

    def differs(self) -> str | None:
        """What of fastrnn's results is not nn.LSTM's; None where all is."""
        allowed = TOLERANCE[self.call.dtype]
        for index, (ours, theirs) in enumerate(zip(self.run("fastrnn"), self.run("nn.LSTM"))):
            scale = float(theirs.abs().max().clamp(min=1e-30))
            error = float((ours - theirs).abs().max()) / scale
            if not error <= allowed:
                return f"result {index} differs by {error:.1e} of its largest magnitude"
        return None


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        calls: of each form.
        budget: seconds of timing for each call.
        threads: torch's.
        seed: of the calls that are drawn.
    """

    calls: int = 40
    budget: float = 0.5
    threads: int = 1
    seed: int = 0


def run(options: Options, path: Path, console: Console) -> int:
    """Measure, print a row for each form, write the results.

    Returns:
        The exit status: 0, or 1 where a result was wrong.
    """
    rng = random.Random(options.seed)
    calls = [draw(form, rng) for form in FORMS for _ in range(options.calls)]
    flags = {"calls": options.calls, "budget": options.budget, "seed": options.seed}
    record = results_file.new_record("sweep", flags, torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for index, call in enumerate(track(calls, "calls", console=console, transient=True)):
            record["cases"].append(measure(call, index, options))
    finally:
        torch.set_num_threads(before)
    wrong = [case for case in record["cases"] if case["status"] == "failed"]
    record["complete"] = not wrong and options == Options(threads=options.threads)
    record["environment"]["load_average_after"] = results_file.load_average()
    results_file.save(record, path)
    console.print(table(record))
    for case in wrong:
        console.print(f"[red]{case['id']}: {case['error']}[/]")
    console.print(f"results: {path}")
    return 1 if wrong else 0


def measure(call: Call, seed: int, options: Options) -> Record:
    """One call's record."""
    record: Record = {"id": call.id, "section": call.form, "threads": options.threads}
    sides = Sides(call, seed)
    if (reason := sides.differs()) is not None:
        return record | {"status": "failed", "error": reason}
    ratio = _ratio(sides, options.budget)
    if ratio < ASKED:
        ratio = _ratio(sides, AGAIN * options.budget, min_rounds=9 * AGAIN)
    return record | {"status": "ok", "ratios": {"nn.LSTM": {"median": ratio}}}


def _ratio(sides: Sides, budget: float, min_rounds: int = 9) -> float:
    """How many times faster fastrnn is."""
    samples = interleave(
        sides.runs(),
        lambda _: None,
        lambda _: None,
        budget=budget,
        min_rounds=min_rounds,
        max_rounds=100_000,
    )
    return speedup(samples["nn.LSTM"].seconds, samples["fastrnn"].seconds).median


class Row(NamedTuple):
    """What the calls of one form come to."""

    form: str
    calls: int
    mean: float
    worst: float
    worst_id: str
    below: float


def rows(record: Record) -> list[Row]:
    """By form, and all of them."""
    found = []
    for form in (*FORMS, "all"):
        cases = [
            c for c in record["cases"] if c["status"] == "ok" and form in (c["section"], "all")
        ]
        if not cases:
            continue
        ratios = {case["id"]: case["ratios"]["nn.LSTM"]["median"] for case in cases}
        worst = min(ratios, key=lambda name: ratios[name])
        below = sum(ratio < ASKED for ratio in ratios.values()) / len(ratios)
        mean = geometric_mean(ratios.values())
        found.append(Row(form, len(ratios), mean, ratios[worst], worst, below))
    return found


def table(record: Record) -> Table:
    """How many times faster than nn.LSTM, by form."""
    shown = Table(title="times faster than nn.LSTM")
    for name in ("form", "calls", "mean", "worst", f"below {ASKED}", "the worst"):
        shown.add_column(name)
    for row in rows(record):
        figures = f"{row.mean:.2f}", f"{row.worst:.2f}", f"{row.below:.0%}"
        shown.add_row(row.form, str(row.calls), *figures, row.worst_id)
    return shown
