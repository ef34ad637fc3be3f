"""``python -m bench report``: result files into docs/benchmarks.md, and a summary into README.

The newest complete file of each kind and machine is shown, with every case that it holds. Plots
stand in the folder ``plots`` beside the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench import markdown, plots, results_file
from bench.results_file import Record

Found = list[tuple[Path, Record]]


def markers(part: str) -> tuple[str, str]:
    """The lines between which a part stands: "cpu", "gpu", "clip" or "sweep".

    In README it is "summary" or "random", of the same results.
    """
    return f"<!-- bench:{part}:begin -->", f"<!-- bench:{part}:end -->"


def write(results: Path, page: Path, readme: Path) -> list[str]:
    """Draw the plots, put the tables between the markers of ``page``, a summary into ``readme``.

    Returns:
        What was written, a line each.

    Raises:
        ValueError: no complete result, a file of another schema, or no markers for one; then
            neither text is changed.
    """
    found = {part: newest(results, kind) for part, kind in _KINDS.items()}
    if not any(found.values()):
        raise ValueError(
            f"{results} holds no complete result; run python -m bench cpu, or gpu on a CUDA machine"
        )
    images: dict[Path, str] = {}
    written = []
    for path, record in [each for files in found.values() for each in files]:
        image = draw(path, record, page.parent / "plots")
        if image is not None:
            images[path] = image.relative_to(page.parent).as_posix()
            written.append(f"{image}: plot of {path.name}")
    parts = {
        part: "\n\n".join(_text(record, images.get(path)) for path, record in files)
        for part, files in found.items()
    }
    records = {part: [record for _, record in files] for part, files in found.items()}
    summary = {
        "summary": markdown.summary(records["cpu"] + records["gpu"]),
        "random": markdown.sweep_lines(records["sweep"]),
    }
    texts = {page: _filled(page, parts), readme: _filled(readme, summary)}
    for path, text in texts.items():
        path.write_text(text)
        written.append(f"{path}: the parts of {sum(map(len, found.values()))} result file(s)")
    return written


def _filled(path: Path, parts: Mapping[str, str]) -> str:
    """The text of a file with each part between its markers; those without results stay."""
    text = path.read_text()
    for part, found in parts.items():
        if not found:
            continue
        begin, end = markers(part)
        counts = (text.count(begin), text.count(end))
        if counts != (1, 1) or text.index(end) < text.index(begin):
            raise ValueError(
                f"{path} must hold the lines {begin} and {end}, once and in this order"
            )
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = "\n\n".join([before + begin, found, after])
    return text


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
            image = draw(path, record, path.parent)
            parts.append(f"# {path.stem}\n\n{_text(record, image.name if image else None)}")
    if parts:
        path = results / "report.md"
        path.write_text("\n\n".join(parts) + "\n")
        written.append(f"{path}: tables")
    return written


_KINDS = {"cpu": "cpu", "gpu": "lstm", "clip": "clip", "sweep": "sweep"}
_PLOTS: dict[str, Callable[[Record, Path], None]] = {
    "cpu": plots.plot_cpu,
    "lstm": plots.plot_lstm,
}


def draw(path: Path, record: Record, folder: Path) -> Path | None:
    """The plot of a result, in ``folder``; None where its kind has none."""
    plot = _PLOTS.get(record["kind"])
    if plot is None:
        return None
    folder.mkdir(exist_ok=True)
    image = folder / path.with_suffix(".png").name
    plot(record, image)
    return image


def _text(record: Record, image: str | None) -> str:
    if record["kind"] == "clip":
        return markdown.clip_text(record)
    if record["kind"] == "sweep":
        return markdown.sweep_text(record)
    if record["kind"] == "lstm":
        return markdown.lstm_text(record, image)
    return markdown.cpu_text(record, image or "")


def newest(results: Path, kind: str) -> Found:
    """The newest complete result of a kind on each machine, for each setting of threads.

    Raises:
        ValueError: a file of another schema.
    """
    found: dict[tuple[object, ...], tuple[Path, Record]] = {}
    for path in sorted(results.glob(f"{kind}-*.json")):
        record = results_file.load(path)
        env = record["environment"]
        gpu = env.get("gpu")
        threads = frozenset(case.get("threads") for case in record["cases"])
        machine = (gpu["name"],) if gpu else (env["cpu"], env["cpus"], threads)
        if record["kind"] != kind or not record["complete"]:
            continue
        if machine not in found or env["date"] > found[machine][1]["environment"]["date"]:
            found[machine] = (path, record)
    return list(found.values())
