"""``python -m bench report``: result files into README's tables, and a plot beside each file.

The newest complete file of each kind and machine is shown, with every case that it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import markdown, plots, results_file
from bench.results_file import Record

Found = list[tuple[Path, Record]]


def markers(part: str) -> tuple[str, str]:
    """The lines of README between which a part stands: "cpu", "gpu" or "clip"."""
    return f"<!-- bench:{part}:begin -->", f"<!-- bench:{part}:end -->"


def write(results: Path, readme: Path) -> list[str]:
    """Draw the plots and put the tables between the markers of ``readme``.

    Returns:
        What was written, a line each.

    Raises:
        ValueError: no complete result, a file of another schema, or no markers for one.
    """
    found = {part: newest(results, kind) for part, kind in _KINDS.items()}
    if not any(found.values()):
        raise ValueError(
            f"{results} holds no complete result; run python -m bench cpu, or gpu on a CUDA machine"
        )
    text = readme.read_text()
    for part, files in found.items():
        begin, end = markers(part)
        counts = (text.count(begin), text.count(end))
        if files and (counts != (1, 1) or text.index(end) < text.index(begin)):
            raise ValueError(
                f"{readme} must hold the lines {begin} and {end}, once and in this order"
            )
    written = []
    for part, files in found.items():
        if not files:
            continue
        texts = []
        for path, record in files:
            image = draw(path, record)
            texts.append(_text(record, None if image is None else _link(image, readme)))
            if image is not None:
                written.append(f"{image}: plot of {path.name}")
        begin, end = markers(part)
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = "\n\n".join([before + begin, *texts, after])
        written.append(
            f"{readme}: tables of {len(files)} result file(s) between {begin} and its end"
        )
    readme.write_text(text)
    return written


def page(results: Path) -> list[str]:
    """Write ``report.md`` from all results in a directory, complete or not.

    Returns:
        What was written, a line each; none where there are no results.
    """
    parts, written = [], []
    for kind in ("lstm", "clip", "cpu"):
        for path in sorted(results.glob(f"{kind}-*.json")):
            record = results_file.load(path)
            if not any(case["status"] == "ok" for case in record["cases"]):
                continue
            image = draw(path, record)
            parts.append(f"# {path.stem}\n\n{_text(record, image.name if image else None)}")
    if parts:
        path = results / "report.md"
        path.write_text("\n\n".join(parts) + "\n")
        written.append(f"{path}: tables")
    return written


_KINDS = {"cpu": "cpu", "gpu": "lstm", "clip": "clip"}
_PLOTS: dict[str, Callable[[Record, Path], None]] = {
    "cpu": plots.plot_cpu,
    "lstm": plots.plot_lstm,
}


def draw(path: Path, record: Record) -> Path | None:
    """The plot beside a result; None where its kind has none."""
    plot = _PLOTS.get(record["kind"])
    if plot is None:
        return None
    image = path.with_suffix(".png")
    plot(record, image)
    return image


def _text(record: Record, image: str | None) -> str:
    if record["kind"] == "clip":
        return markdown.clip_text(record)
    if record["kind"] == "lstm":
        return markdown.lstm_text(record, image)
    return markdown.cpu_text(record, image or "")


def newest(results: Path, kind: str) -> Found:
    """The newest complete result of a kind on each machine.

    Raises:
        ValueError: a file of another schema.
    """
    found: dict[tuple[object, ...], tuple[Path, Record]] = {}
    for path in sorted(results.glob(f"{kind}-*.json")):
        record = results_file.load(path)
        env = record["environment"]
        gpu = env.get("gpu")
        machine = (gpu["name"],) if gpu else (env["cpu"], env["cpus"])
        if record["kind"] != kind or not record["complete"]:
            continue
        if machine not in found or env["date"] > found[machine][1]["environment"]["date"]:
            found[machine] = (path, record)
    return list(found.values())


def _link(path: Path, readme: Path) -> str:
    path, base = path.resolve(), readme.resolve().parent
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
