"""A result as Markdown: what docs/benchmarks.md says of it, and README. Rows where we lose stay."""

from __future__ import annotations

from collections.abc import Sequence

from bench import clip_providers, sweep, tables
from bench.results_file import Record
from bench.sections import (
    LSTM_SECTIONS,
    SECTIONS,
    SHORT,
    batch_size,
    compared,
    kind,
    label,
    short,
    verdicts,
)

_OPEN = ("ragged-training", "life")  # the sections that are shown unfolded


def cpu_text(record: Record, image: str) -> str:
    """The tables of a result on a CPU."""
    env, cases = record["environment"], record["cases"]
    threads = sorted({case["threads"] for case in cases})
    parts = [
        f"{env['cpu']} ({env['cpus']} processors, {env['cpu_capability']}), torch {env['torch']}, "
        f"{env['date'][:10]}. Ratios are of medians, above 1 in fastrnn's favour: the geometric "
        "mean, and in brackets the worst case.",
        _summary(record, threads),
        f"![Speed-up over nn.LSTM by case]({image})",
    ]
    for key, section in SECTIONS.items():
        rows = [case for case in cases if case["section"] == key]
        if not rows:
            continue
        body = f"{section.note[0].upper()}{section.note[1:]}.\n\n{_section(key, rows)}"
        parts.append(_fold(key, section.title, body))
    notes = tables.unsupported_notes(cases)
    parts += [f"Not supported: {note}." for note in notes]
    return "\n\n".join(parts)


def _fold(key: str, title: str, body: str) -> str:
    return f"**{title}.** {body}" if key in _OPEN else _folded(title, body)


def _folded(title: str, body: str) -> str:
    """What opens at a click; ``markdown`` is for MkDocs, which otherwise leaves HTML as it is."""
    return f"<details markdown><summary>{title}</summary>\n\n{body}\n\n</details>"


def _summary(record: Record, threads: Sequence[int]) -> str:
    found = {
        (verdict.section, verdict.target, verdict.threads): verdict
        for verdict in verdicts(record["cases"])
    }
    rows = []
    for section, target in dict.fromkeys((key[0], key[1]) for key in found):
        wanted = "" if target.mean is None else tables.times(target.mean)
        wanted += "" if target.worst is None else f" ({tables.times(target.worst)})"
        row = [compared(section, target), wanted.strip()]
        for count in threads:
            verdict = found.get((section, target, count))
            if verdict is None:
                row.append("")
                continue
            word = {True: " met", False: " **missed**", None: ""}[verdict.met]
            row.append(f"{tables.times(verdict.mean)} ({tables.times(verdict.worst)}){word}")
        rows.append(row)
    on = {case["threads"]: tables.setting(case) for case in record["cases"]}
    head = ["", "asked", *(on[count] for count in threads)]
    return _table(head, rows, left=1)


def summary(records: Sequence[Record]) -> str:
    """README's table: each kind of case, the mean and the worst of it on each machine.

    Empty without records.
    """
    columns: list[str] = []
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        on = {case["threads"]: tables.setting(case) for case in record["cases"]}
        gpu = record["environment"]["gpu"]
        machine = record["environment"]["cpu"] if gpu is None else gpu["name"]
        for verdict in verdicts(record["cases"]):
            column = f"{machine}, {on[verdict.threads]}" if gpu is None else machine
            if column not in columns:
                columns.append(column)
            figures = f"{tables.times(verdict.mean)} ({tables.times(verdict.worst)})"
            rows.setdefault(compared(verdict.section, verdict.target), {})[column] = figures
    body = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return _table(["", *columns], body, left=1) if body else ""


def sweep_lines(records: Sequence[Record]) -> str:
    """README's sentence on random calls, one for each machine and number of threads."""
    found = []
    for record in records:
        row = sweep.rows(record)[-1]
        found.append(
            f"- {_where(record)}: in {row.calls} random calls fastrnn is {tables.times(row.mean)} "
            f"as fast as nn.LSTM in the geometric mean and {tables.times(row.worst)} in the worst "
            f"case; {row.below:.0%} of the calls are below {tables.times(sweep.ASKED)}."
        )
    return "\n".join(found)


def sweep_text(record: Record) -> str:
    """The table of random calls on one machine, by form."""
    env = record["environment"]
    head = ["form", "calls", "mean", "worst", f"below {tables.times(sweep.ASKED)}", "the worst"]
    rows = [
        [
            row.form,
            str(row.calls),
            tables.times(row.mean),
            tables.times(row.worst),
            f"{row.below:.0%}",
            f"`{row.worst_id}`",
        ]
        for row in sweep.rows(record)
    ]
    about = f"{_where(record)}, torch {env['torch']}, {env['date'][:10]}."
    return f"{about}\n\n{_table(head, rows, left=1)}"


def _where(record: Record) -> str:
    return f"{tables.machine(record['environment'])}, {tables.setting(record['cases'][0])}"


def _section(key: str, cases: Sequence[Record]) -> str:
    """A row for each case, with columns for each number of threads."""
    threads = sorted({case["threads"] for case in cases})
    providers = SECTIONS[key].providers
    baselines = [name for name in providers if name != "fastrnn"]
    head = ["batch", ""]
    for count in threads:
        if key == "memory":
            head += [short(key, name) for name in providers]
        else:
            head.append(f"{tables.threads_name(count)}, valid steps")
        head += [f"÷ {short(key, name)}" for name in baselines]
    rows: dict[str, list[str]] = {}
    by_id = {(case["id"], case["threads"]): case for case in cases}
    for case in cases:
        row = [batch_size(case), kind(case)]
        for count in threads:
            row += _cells(by_id.get((case["id"], count)), providers, baselines)
        rows[case["id"]] = row
    return _table(head, list(rows.values()), left=2)


def _cells(case: Record | None, providers: Sequence[str], baselines: Sequence[str]) -> list[str]:
    if case is None:
        return [""] * (1 + len(baselines))
    found = case["providers"]
    if case["section"] == "memory":
        cells = [tables.mebibytes(found[name]["peak_bytes"]) for name in providers]
    else:
        cells = [tables.rate(found["fastrnn"]["valid_steps_per_second"]["median"])]
    ratios = case["ratios"]
    return cells + [
        tables.times(ratios[name]["median"]) if name in ratios else "–" for name in baselines
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def lstm_text(record: Record, image: str | None) -> str:
    """The tables of a result on a GPU.

    Args:
        record: of ``python -m bench lstm``.
        image: of the plot; None where there is none.
    """
    env, cases = record["environment"], record["cases"]
    parts = [
        f"{tables.machine(env)}, torch {env['torch']}, {env['date'][:10]}. Times are of a whole "
        "step: forward, and in training backward from gradients of output and h_n. Ratios are of "
        "medians, above 1 in fastrnn's favour: the geometric mean, and in brackets the worst case. "
        "*Of floor*: the least time that the GPU's published figures allow (bench/roofline.py), "
        "over fastrnn's. *cuDNN*: the algorithms that torch's rule selects for the padded batch, "
        "forward and backward.",
        _summary(record, sorted({case["threads"] for case in cases})),
    ]
    if image is not None:
        parts.append(f"![Speed-up, time per step and memory]({image})")
    if not record["complete"]:
        parts.insert(1, _incomplete(record))
    for key, section in LSTM_SECTIONS.items():
        rows = [case for case in cases if case["section"] == key]
        if rows:
            note = f"{section.note[0].upper()}{section.note[1:]}."
            parts.append(_fold(key, section.title, f"{note}\n\n{_lstm_section(key, rows)}"))
    if record.get("not_installed"):
        parts.append(f"Not installed, so not measured: {', '.join(record['not_installed'])}.")
    parts += [f"Not supported: {note}." for note in tables.unsupported_notes(cases)]
    notes = tables.fall_back_notes(cases)
    parts += [f"Without kernels, so the step loop's figures: {note}." for note in notes]
    return "\n\n".join(parts)


def _incomplete(record: Record) -> str:
    left = len(record.get("left_out", []))
    failed = [case for case in record["cases"] if case["status"] == "failed"]
    words = [f"- failed: {label(case)}: {case['error']}" for case in failed if "batch" in case]
    words += [f"- failed: {case['id']}: {case['error']}" for case in failed if "batch" not in case]
    return "\n".join(
        [f"**Not the whole run:** {left} cases left out, {len(failed)} failed.", "", *words]
    )


def _lstm_section(key: str, cases: Sequence[Record]) -> str:
    measured = [case for case in cases if case["status"] == "ok"]
    named = {name for case in measured for name in case["ratios"]}
    baselines = [name for name in SHORT if name in named]
    head = ["batch", "", "fastrnn", *(f"÷ {short(key, name)}" for name in baselines)]
    head += ["valid steps", "of floor", "launches", "peak memory", "cuDNN"]
    rows = []
    for case in cases:
        row = [batch_size(case), kind(case)]
        if case["status"] == "failed":
            rows.append([*row, "failed", *[""] * (len(head) - 3)])
            continue
        ours = case["providers"]["fastrnn"]
        row.append(tables.duration(ours["seconds"]["median"]))
        row += [_times(case["ratios"].get(name)) for name in baselines]
        row.append(tables.rate(ours["valid_steps_per_second"]["median"]))
        row.append(tables.part(ours.get("of_floor")))
        row.append(str(ours.get("launches") or "–"))
        row.append(tables.mebibytes(ours["peak_bytes"]) if "peak_bytes" in ours else "–")
        row.append(_algorithms(case))
        rows.append(row)
    return _table(head, rows, left=2)


def _times(ratio: Record | None) -> str:
    return "–" if ratio is None else tables.times(ratio["median"])


def _algorithms(case: Record) -> str:
    found = case.get("cudnn", {}).get("padded")
    if found is None:
        return "–"
    return " / ".join(dict.fromkeys(found.values()))


def clip_text(record: Record) -> str:
    """The tables of the gradient clip on one machine."""
    env = record["environment"]
    parts = [
        f"{tables.machine(env)}, torch {env['torch']}, {env['date'][:10]}. Medians; ratios above 1 "
        "in fastrnn's favour. *Host*: until fastrnn's call returns."
    ]
    if not record["complete"]:
        parts.append(_incomplete(record))
    titles = {"clip": "clip_grad_norm_", "clip-and-step": "Clip, then a step of fused AdamW"}
    for key, title in titles.items():
        rows = [case for case in record["cases"] if case["section"] == key]
        if rows:
            body = _clip_section(rows)
            parts.append(_folded(title, body))
    parts += [
        f"Without the kernel: {case['id']}: {case['fell_back']}."
        for case in record["cases"]
        if "fell_back" in case
    ]
    return "\n\n".join(parts)


def _clip_section(cases: Sequence[Record]) -> str:
    measured = [case for case in cases if case["status"] == "ok"]
    named = {name for case in measured for name in case["ratios"]}
    rivals = [name for name in clip_providers.LABELS if name in named]
    head = ["on", "tensors", "elements", "dtype", "clipped", "fastrnn", "host"]
    head += [*(f"÷ {clip_providers.LABELS[name]}" for name in rivals), "of floor"]
    rows = []
    for case in cases:
        row = [tables.setting(case), str(case["tensors"]), f"{case['elements']:,}", case["dtype"]]
        row.append("yes" if case["clipped"] else "no")
        if case["status"] == "failed":
            rows.append([*row, "failed", *[""] * (len(head) - len(row) - 1)])
            continue
        ours = case["providers"]["fastrnn"]
        row.append(tables.duration(ours["seconds"]["median"]))
        row.append(tables.duration(ours["host_seconds"]["median"]))
        row += [_times(case["ratios"].get(name)) for name in rivals]
        rows.append([*row, tables.part(ours.get("of_floor"))])
    return _table(head, rows, left=1)
