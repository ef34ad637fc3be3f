"""Results on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.providers import LABELS
from bench.results_file import Record
from bench.sections import SECTIONS, SHORT, compared, kind, label, short, verdicts

_WIDE = 104  # columns from which a section's table has valid steps and the ratios' spread
_BUSY = 0.3  # load for each processor from which times scatter


_TITLES = {
    "cpu": "fastrnn against nn.LSTM",
    "lstm": "fastrnn against nn.LSTM",
    "memory": "Peak memory of fastrnn and nn.LSTM",
    "clip": "clip_grad_norm_ against torch's",
}


def machine(env: Record) -> str:
    """The processor, or the GPU with its software and how it multiplies float32."""
    gpu = env.get("gpu")
    if gpu is None:
        return f"{env['cpu']}, {env['cpus']} processors, {env['cpu_capability']}"
    tf32 = gpu["tf32"]
    on_off = {name: "on" if value == "tf32" else "off" for name, value in tf32.items()}
    return (
        f"{gpu['name']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, Triton {gpu['triton']}, "
        f"TF32 {on_off['rnn']} in RNNs and {on_off['matmul']} in other products"
    )


def heading(record: Record) -> RenderableType:
    """The machine, and a warning where it is busy."""
    env = record["environment"]
    lines = [
        Text(
            f"{_TITLES[record['kind']]} on {'the CPU' if env['gpu'] is None else 'a GPU'}", "bold"
        ),
        Text(f"{machine(env)} · torch {env['torch']} · Python {env['python']}"),
    ]
    if record.get("not_installed"):
        lines.append(Text(f"not installed: {', '.join(record['not_installed'])}", "dim"))
    load = env["load_average_before"]
    if load is not None and load > _BUSY * env["cpus"]:
        lines.append(Text(f"busy machine (load average {load:.1f}): times will scatter", "yellow"))
    return Group(*lines)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds >= 1:
        return f"{_three(seconds)} s"
    if seconds >= 1e-3:
        return f"{_three(seconds * 1e3)} ms"
    return f"{_three(seconds * 1e6)} µs"


def rate(per_second: float) -> str:
    """Of valid steps, in three digits."""
    if per_second >= 999.5e3:
        return f"{_three(per_second / 1e6)} M/s"
    return f"{_three(per_second / 1e3)} k/s"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.1f}×"


def _three(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def threads_name(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def setting(case: Record) -> str:
    """On what a case ran: so many threads, or the GPU."""
    return "GPU" if case.get("device") == "cuda" else threads_name(case["threads"])


def plain_table(title: str, note: str = "") -> Table:
    """A table without lines, its title above and a note below."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=note or None,
        caption_justify="left",
        caption_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )


def section_table(cases: list[Record], width: int) -> RenderableType:
    """One section with one number of threads, for a terminal of ``width`` columns."""
    key = cases[0]["section"]
    section = SECTIONS[key]
    named = {name for case in cases for name in case.get("providers", section.providers)}
    providers = [name for name in SHORT if name in named]
    baselines = [name for name in providers if name != "fastrnn"]
    measured = [case["providers"] for case in cases if case["status"] == "ok"]
    wide = width >= _WIDE
    timed = wide and any("seconds" in found["fastrnn"] for found in measured)
    held = wide and any("of_floor" in found["fastrnn"] for found in measured)
    table = plain_table(f"{section.title} · {setting(cases[0])}", section.note)
    for name in "BTIH":
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=wide)
    for name in providers:
        table.add_column(short(key, name), justify="right", no_wrap=True)
    if timed:
        table.add_column("valid steps", justify="right", no_wrap=True)
    if held:
        table.add_column("of floor", justify="right", no_wrap=True)
    for name in baselines:
        table.add_column(f"÷ {short(key, name)}", justify="right", no_wrap=True)
    for case in cases:
        row: list[RenderableType] = [
            *(str(case[size]) for size in ("batch", "steps", "input_size", "hidden_size")),
            kind(case),
        ]
        if case["status"] == "failed":
            table.add_row(*row, failed())
            continue
        found = case["providers"]
        row += [_figure(found.get(name)) for name in providers]
        if timed:
            row.append(rate(found["fastrnn"]["valid_steps_per_second"]["median"]))
        if held:
            row.append(part(found["fastrnn"].get("of_floor")))
        row += [ratio_cell(case["ratios"].get(name), wide) for name in baselines]
        table.add_row(*row)
    return Group(table, "")


def part(of_floor: float | None) -> str:
    """How much of what is possible was reached."""
    return "–" if of_floor is None else f"{of_floor:.0%}"


def _figure(provider: Record | None) -> RenderableType:
    if provider is None:
        return Text("–", "dim")
    if "unsupported" in provider:
        return Text("not supp.", "dim")
    if "seconds" in provider:
        return duration(provider["seconds"]["median"])
    return mebibytes(provider["peak_bytes"]) if "peak_bytes" in provider else Text("–", "dim")


def failed() -> Text:
    """In place of a case's figures."""
    return Text("failed", "red")


def spread_cell(provider: Record | None) -> RenderableType:
    """A provider's time, and half its spread."""
    if provider is None or "seconds" not in provider:
        return Text("–", "dim")
    found = provider["seconds"]
    return Text.assemble(
        duration(found["median"]),
        (f" ±{min((found['p80'] - found['p20']) / 2 / found['median'], 9.99):.0%}", "dim"),
    )


def ratio_cell(ratio: Record | None, wide: bool = False) -> RenderableType:
    """How many times better fastrnn is; with the spread where there is room."""
    if ratio is None:
        return Text("–", "dim")
    text = Text(times(ratio["median"]), "red" if ratio["median"] < 1 else "green")
    if wide and "p20" in ratio:
        half = (ratio["p80"] - ratio["p20"]) / 2 / ratio["median"]
        text.append(f" ±{min(half, 9.99):>3.0%}", "dim")
    return text


def summary(cases: list[Record], timed: bool = True) -> RenderableType:
    """Every target beside what was reached, then every case that misses one or failed.

    Args:
        cases: of a result.
        timed: its ratios are of times, which the targets are about.
    """
    found = verdicts(cases) if timed else []
    settings = {case["threads"]: setting(case) for case in cases}
    lines: list[RenderableType] = []
    for threads in sorted({verdict.threads for verdict in found}):
        table = plain_table(f"Targets · {settings[threads]}")
        table.add_column("", no_wrap=True)
        for name in ("asked: mean", "each", "reached: mean", "worst"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        for verdict in found:
            if verdict.threads != threads:
                continue
            target = verdict.target
            table.add_row(
                compared(verdict.section, target),
                *("" if ratio is None else times(ratio) for ratio in (target.mean, target.worst)),
                times(verdict.mean),
                times(verdict.worst),
                {True: Text("met", "green"), False: Text("missed", "red"), None: ""}[verdict.met],
            )
        lines += [table, ""]
    lines += [
        Text.assemble(
            ("missed ", "red"),
            f"{compared(verdict.section, verdict.target)}, {settings[verdict.threads]}: "
            f"worst {times(verdict.worst)} at {verdict.worst_case}",
        )
        for verdict in found
        if verdict.met is False
    ]
    lines += [
        Text.assemble(
            ("failed ", "red"),
            f"{case['id']}, {setting(case)}: {case['error']}",
        )
        for case in cases
        if case["status"] == "failed"
    ]
    lines += [Text(f"not supported: {note}", "dim") for note in unsupported_notes(cases)]
    lines += [Text(f"without kernels: {note}", "yellow") for note in fall_back_notes(cases)]
    return Group(*lines)


def unsupported_notes(cases: list[Record]) -> list[str]:
    """What torch said where a provider could not run, each once."""
    notes = {
        f"{LABELS[name]}, {label(case)}: {provider['unsupported']}": None
        for case in cases
        for name, provider in case.get("providers", {}).items()
        if "unsupported" in provider
    }
    return list(notes)


def fall_back_notes(cases: list[Record]) -> list[str]:
    """Why fastrnn's step loop was measured on a GPU in place of its kernels."""
    return [f"{label(case)}: {case['fell_back']}" for case in cases if "fell_back" in case]
