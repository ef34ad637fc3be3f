"""The sections of a result, what each must reach, and whether a result reaches it.

Works on the records of a result file, so that the terminal, the pages and the plot say the same.
Ratios are how many times better fastrnn is: more is better, 1 is a tie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.results_file import Record
from bench.timing import geometric_mean


class Target(NamedTuple):
    """What the ratio to a baseline must reach; None where nothing is asked.

    Attributes:
        baselines: providers; the best of them counts.
        mean: geometric mean over the section's cases.
        worst: every case.
        mode: "training" or "inference" where only those cases count.
    """

    baselines: tuple[str, ...]
    mean: float | None = None
    worst: float | None = None
    mode: str | None = None


class Section(NamedTuple):
    """One table.

    Attributes:
        providers: who is measured; of those of ``python -m bench lstm``, who always is.
        targets: what is asked.
        rounds: how many times as many as elsewhere, at least: more where a target is near 1.
    """

    title: str
    note: str
    providers: tuple[str, ...]
    targets: tuple[Target, ...]
    rounds: int = 1


MEMORY_RESOLUTION = 2**20  # bytes; what one measurement may be off by
RAGGED = ("fastrnn", "packed", "padded")
LOOPS = ("lstm-loop", "cell-loop")

CPU_SECTIONS = {
    "ragged-training": Section(
        "Ragged batches, training step",
        "forward, and backward from gradients of output and h_n; packing and unpacking included",
        RAGGED,
        (Target(("packed",), mean=4.0, worst=2.0), Target(("padded",), mean=1.0, worst=0.75)),
    ),
    "ragged-inference": Section(
        "Ragged batches, inference",
        "forward without gradients; packing and unpacking included",
        RAGGED,
        (Target(("packed",), mean=1.3, worst=0.95), Target(("padded",))),
    ),
    "dense": Section(
        "Dense batches, every sequence of full length",
        "no lengths given",
        ("fastrnn", "padded"),
        (Target(("padded",), worst=0.97),),
        rounds=7,
    ),
    "variants": Section(
        "Other dtypes, layers and directions",
        "ragged batches, as above",
        RAGGED,
        (Target(("packed",)), Target(("padded",))),
    ),
    "resets": Section(
        "Resets inside sequences",
        "full length; state zeroed before a step with probability 0.05; against the usual loops",
        ("fastrnn", *LOOPS),
        (
            Target(LOOPS, worst=5.0, mode="training"),
            Target(("lstm-loop",), mode="training"),
            Target(LOOPS, mode="inference"),
            Target(("lstm-loop",), mode="inference"),
        ),
    ),
    "memory": Section(
        "Peak memory of a training step, ragged batches",
        "beyond module and batch, in a new process each; equal within 1 MiB, the method's scatter",
        RAGGED,
        (Target(("packed",), worst=1.0), Target(("padded",))),
    ),
}
_DENSE = ("fastrnn", "padded")
LSTM_SECTIONS = {
    "life": Section(
        "Workloads from life",
        "as users of nn.LSTM run them; with resets, against the usual loops",
        ("fastrnn",),
        (Target(("packed",)), Target(("padded",)), Target(LOOPS)),
    ),
    "raggedness": Section(
        "From no padding to nine tenths",
        "training step; packing and unpacking included",
        RAGGED,
        (Target(("packed",), worst=4.0), Target(("padded",))),
    ),
    "open-field": Section(
        "Where cuDNN has no persistent algorithm",
        "dense, 192 < H <= 1024, bfloat16 and float32, training step",
        _DENSE,
        (Target(("padded",), worst=2.0),),
    ),
    "hard-ground": Section(
        "Where it has one",
        "dense, H <= 128, and float16, training step",
        _DENSE,
        (Target(("padded",), worst=1.0),),
    ),
    "large": Section(
        "Large layers", "dense, H > 1024, training step", _DENSE, (Target(("padded",)),)
    ),
    "batch-and-time": Section(
        "Other batches and lengths", "dense, training step", _DENSE, (Target(("padded",)),)
    ),
}
SECTIONS = CPU_SECTIONS | LSTM_SECTIONS
SHORT = {
    "fastrnn": "fastrnn",
    "reference": "step loop",
    "packed": "packed",
    "padded": "padded",
    "lstm-loop": "LSTM loop",
    "cell-loop": "cell loop",
    "compiled": "compiled",
    "flashrnn": "FlashRNN",
    "torchrl": "TorchRL",
}


def batch_size(case: Record) -> str:
    return "B{batch} T{steps} I{input_size} H{hidden_size}".format(**case)


def kind(case: Record) -> str:
    """What else tells the cases of a section apart."""
    if case["section"] in ("ragged-training", "ragged-inference", "memory"):
        return str(case["lengths"])
    if case["section"] == "raggedness":
        return f"{case['dtype']} {case['lengths'].replace('-', ' ')}"
    if case["section"] in LSTM_SECTIONS:
        named = f"{case['workload']} " if "workload" in case else ""
        return f"{named}{case['dtype']} {case['mode']}"
    variant = case["variant"].replace("-", " ").replace("layers", " layers")
    return f"{variant} {case['mode']}".strip()


def label(case: Record) -> str:
    """A case within its section."""
    return f"{batch_size(case)} {kind(case)}"


class Verdict(NamedTuple):
    """A section's ratios to a baseline with one number of threads, beside the target."""

    section: str
    target: Target
    threads: int
    cases: int
    mean: float
    worst: float
    worst_case: str

    @property
    def met(self) -> bool | None:
        """None where nothing is asked."""
        asked = ((self.mean, self.target.mean), (self.worst, self.target.worst))
        reached = [got >= wanted for got, wanted in asked if wanted is not None]
        return all(reached) if reached else None


def ratio(case: Record, baselines: Iterable[str]) -> float | None:
    """To the best of the baselines; None where none could run."""
    found = [case["ratios"][name]["median"] for name in baselines if name in case["ratios"]]
    if not found:
        return None
    if case["section"] == "memory":
        peaks = [case["providers"][name]["peak_bytes"] for name in ("fastrnn", *baselines)]
        if abs(peaks[0] - min(peaks[1:])) <= MEMORY_RESOLUTION:
            return 1.0
    return min(found)


def verdicts(cases: Iterable[Record]) -> list[Verdict]:
    """Of every section and number of threads that has results, in the order of :data:`SECTIONS`."""
    cases = [case for case in cases if case["status"] == "ok"]
    found = []
    for key, section in SECTIONS.items():
        for target in section.targets:
            for threads in sorted({case["threads"] for case in cases}):
                ratios = {
                    label(case): value
                    for case in cases
                    if (case["section"], case["threads"]) == (key, threads)
                    and target.mode in (None, case["mode"])
                    and (value := ratio(case, target.baselines)) is not None
                }
                if not ratios:
                    continue
                worst = min(ratios, key=lambda name: ratios[name])
                mean = geometric_mean(ratios.values())
                found.append(Verdict(key, target, threads, len(ratios), mean, ratios[worst], worst))
    return found


SUBJECTS = {
    "ragged-training": "ragged training",
    "ragged-inference": "ragged inference",
    "dense": "dense",
    "variants": "other variants",
    "resets": "resets",
    "memory": "peak memory",
    "life": "workloads",
    "raggedness": "raggedness",
    "open-field": "open field",
    "hard-ground": "hard ground",
    "large": "large layers",
    "batch-and-time": "batch and time",
}


def compared(section: str, target: Target) -> str:
    """What a verdict is about: the section's subject and the baseline."""
    subject = SUBJECTS[section]
    if target.mode:
        subject = f"{subject}, {target.mode}"
    if target.baselines == LOOPS:
        return f"{subject} ÷ faster loop"
    return f"{subject} ÷ {short(section, target.baselines[0])}"


def short(section: str, provider: str) -> str:
    """A provider's name where there is little room."""
    if section == "dense" and provider == "padded":
        return "nn.LSTM"
    return SHORT[provider]
