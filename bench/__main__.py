"""``python -m bench``: measure, and put what was measured into README."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("rich") is None:
    sys.exit("python -m bench needs rich and matplotlib: pip install 'fastrnn[demo]'")

from rich.console import Console

from bench import clip, cpu, report, results_file
from bench.workloads import Shape


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    cpu_parser = commands.add_parser("cpu", help="fastrnn against nn.LSTM on this machine's CPU")
    cpu_parser.set_defaults(command=_cpu)
    add = cpu_parser.add_argument
    add("--threads", metavar="N,M|all", help="thread settings (default: 1,all; --quick: all)")
    add("--quick", action="store_true", help="small shapes, short: under 40 seconds")
    add("--cases", default="", metavar="REGEX", help="only the cases whose id matches")
    add("--shape", action="append", default=[], type=_shape, metavar="B,T,I,H", help=_SHAPE_HELP)
    add("--budget", type=float, metavar="SECONDS", help="of timing for each case (default: 5)")
    add("--rounds", type=int, default=3, metavar="N", help="at least, whatever they cost")
    add("--clock", choices=list(cpu.CLOCKS), default="wall", help=_CLOCK_HELP)
    add("--repeat", type=int, default=0, metavar="N", help=_REPEAT_HELP)
    add("--out", type=Path, metavar="FILE.json", help="where the results go")
    add("--list", action="store_true", help="print the cases' ids and stop")

    clip_parser = commands.add_parser("clip", help="the gradient clip against torch's")
    clip_parser.set_defaults(command=_clip)
    clip_parser.add_argument("--device", choices=["cpu"], default="cpu")
    clip_parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    clip_parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go")

    report_parser = commands.add_parser("report", help="bench/results/*.json into README's tables")
    report_parser.set_defaults(command=_report)
    report_parser.add_argument("--results", type=Path, default=results_file.RESULTS, metavar="DIR")
    report_parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")
    return parser


_SHAPE_HELP = "your own shape in place of the standard ones; may be given several times"
_CLOCK_HELP = "cpu: the processor's time, for one thread on a busy machine (default: wall)"
_REPEAT_HELP = "rotate among N batches (default: lengths drawn anew in every round)"


def _shape(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected four positive integers B,T,I,H, got {text!r}")
    return Shape(*map(int, parts))


def _cpu(arguments: argparse.Namespace) -> int:
    quick = arguments.quick
    try:
        options = cpu.Options(
            threads=cpu.threads_from(arguments.threads or ("all" if quick else "1,all")),
            budget=(0.3 if quick else 5.0) if arguments.budget is None else arguments.budget,
            min_rounds=arguments.rounds,
            repeat=arguments.repeat,
            quick=quick,
            shapes=tuple(arguments.shape),
            cases=arguments.cases,
            clock=arguments.clock,
        )
    except ValueError as error:
        sys.exit(f"python -m bench cpu: {error}")
    if arguments.list:
        print(*(case.id for case in options.select()), sep="\n")
        return 0
    path = arguments.out or results_file.default_path("cpu", options.complete)
    return cpu.run(options, path, _console())


def _console() -> Console:
    console = Console(highlight=False)
    # A file or a pipe has no width of its own.
    return console if console.is_terminal else Console(highlight=False, width=110)


def _clip(arguments: argparse.Namespace) -> int:
    console = _console()
    complete = not arguments.quick
    path = arguments.out or results_file.default_path("clip", complete)
    environment = results_file.environment()
    try:
        rows = clip.run(arguments.device, arguments.quick)
    except AssertionError as error:
        console.print(f"[red]failed[/] {error}")
        return 1
    record = {
        "schema": results_file.SCHEMA,
        "kind": "clip",
        "complete": complete,
        "environment": environment,
        "flags": {"device": arguments.device, "quick": arguments.quick},
        "rows": rows,
    }
    results_file.save(record, path)
    console.print(clip.table(rows), f"results: {path}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    try:
        written = report.write(arguments.results, arguments.readme)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m bench report: {error}")
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
