"""``python -m bench``: measure, compare, and put what was measured into the documentation."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

if importlib.util.find_spec("rich") is None:
    sys.exit("python -m bench needs rich and matplotlib: pip install 'fastrnn[demo]'")

import torch
from rich.console import Console

from bench import clip, compare, costs, cpu, gpu, lstm, report, results_file, sweep
from bench.measure import CLOCKS
from bench.runner import Limits
from bench.workloads import Shape

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHAPE_HELP = "your own shape in place of the standard ones; may be given several times"
_CLOCK_HELP = "cpu: the processor's time, for one thread on a busy machine (default: wall)"
_REPEAT_HELP = "rotate among N batches (default: lengths drawn anew in every round)"
_RESUME_HELP = "go on with what --out (or the default file) holds"
_LIMIT_HELP = "a case that takes longer hangs: end the process"
_TOY_HELP = "the same cases so small that they say nothing; shows that the command works"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ValueError, OSError) as error:
        sys.exit(f"python -m bench {options.name}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        found.set_defaults(command=run, name=name)
        return found

    cpu_parser = command("cpu", _cpu, "fastrnn against nn.LSTM on this machine's CPU")
    add = cpu_parser.add_argument
    add("--threads", metavar="N,M|all", help="thread settings (default: 1,all; --quick: all)")
    add("--quick", action="store_true", help="small shapes, short: under 40 seconds")
    add("--cases", default="", metavar="REGEX", help="only the cases whose id matches")
    add("--shape", action="append", default=[], type=_shape, metavar="B,T,I,H", help=_SHAPE_HELP)
    add("--budget", type=float, metavar="SECONDS", help="of timing for each case (default: 5)")
    add("--rounds", type=int, default=3, metavar="N", help="at least, whatever they cost")
    add("--clock", choices=list(CLOCKS), default="wall", help=_CLOCK_HELP)
    add("--repeat", type=int, default=0, metavar="N", help=_REPEAT_HELP)
    add("--out", type=Path, metavar="FILE.json", help="where the results go")
    add("--list", action="store_true", help="print the cases' ids and stop")

    sweep_parser = command("sweep", _sweep, "random calls, fastrnn against nn.LSTM on the CPU")
    add = sweep_parser.add_argument
    add("--calls", type=int, default=40, metavar="N", help="of each form (default: 40)")
    add("--budget", type=float, default=0.5, metavar="SECONDS", help="of timing for each call")
    add("--threads", type=int, default=1, metavar="N", help="torch's (default: 1)")
    add("--seed", type=int, default=0, help="of the calls that are drawn (default: 0)")
    add("--out", type=Path, metavar="FILE.json", help="where the results go")

    lstm_parser = command("lstm", _lstm, "fastrnn against cuDNN and others on a GPU")
    _add_lstm(lstm_parser)
    add = lstm_parser.add_argument
    add("--compiled", action="store_true", help="torch.compile(nn.LSTM) too, where it is short")
    add("--reference", action="store_true", help="fastrnn's step loop in PyTorch too")
    add("--no-launches", action="store_true", help="do not count kernels with torch's profiler")
    add("--case-budget", type=float, default=1.0, metavar="SECONDS", help="timing of one case")
    add("--rounds", type=int, default=5, metavar="N", help="at least, whatever they cost")
    add("--compile", type=_part, metavar="I/N", help="no timing: compile part I of N of the cases")

    memory_parser = command("memory", _memory, "peak memory of a step, on a GPU or the CPU")
    _add_lstm(memory_parser)

    clip_parser = command("clip", _clip, "the gradient clip against torch's, and with a step")
    _add_run(clip_parser)
    clip_parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")

    gpu_parser = command("gpu", _gpu, "on a CUDA machine: its tests, then all its benchmarks")
    add = gpu_parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="for all (default: 540)")
    add(
        "--case-limit",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help=f"{_LIMIT_HELP} (default: 90)",
    )
    add("--skip-tests", action="store_true", help="benchmarks only")
    add("--toy", action="store_true", help=_TOY_HELP)

    costs_parser = command("costs", _costs, "fit the models behind the CPU's choice of path")
    add = costs_parser.add_argument
    add("--threads", default="1,2", metavar="N,M", help="thread settings (default: 1,2)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the LSTM (default: fp32)")
    add("--shape", action="append", default=[], type=_shape, metavar="B,T,I,H", help=_SHAPE_HELP)

    roofline_parser = command("roofline", _roofline, "the least time that a GPU could take")
    add = roofline_parser.add_argument
    add("shape", type=_shape, metavar="B,T,I,H", help="of one layer, every sequence of T steps")
    add("--gpu", default="H100 SXM", metavar="NAME", help="as bench/roofline.py has it")
    add("--dtype", choices=list(_DTYPES), default="bf16")
    add("--bidirectional", action="store_true")
    add("--inference", action="store_true", help="forward only")

    report_parser = command("report", _report, "bench/results/*.json into docs/benchmarks.md")
    add = report_parser.add_argument
    add("--results", type=Path, default=results_file.RESULTS, metavar="DIR")
    add("--page", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE")
    add("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="for the summary")

    compare_parser = command("compare", _compare, "what became slower from A.json to B.json")
    add = compare_parser.add_argument
    add("before", type=Path, metavar="A.json")
    add("after", type=Path, metavar="B.json")
    add("--threshold", type=float, default=0.1, metavar="PART", help=compare.THRESHOLD_HELP)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Options of what measures on a device, case after case."""
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--toy", action="store_true", help=_TOY_HELP)
    add("--cases", default="", metavar="REGEX", help="only the cases whose id matches")
    add("--budget", type=float, metavar="SECONDS", help="for all cases (default: no end)")
    add("--case-limit", type=float, metavar="SECONDS", help=_LIMIT_HELP)
    add("--resume", action="store_true", help=_RESUME_HELP)
    add("--out", type=Path, metavar="FILE.json", help="where the results go")


def _add_lstm(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    add = parser.add_argument
    add("--dtypes", type=_dtypes, default=lstm.DTYPES, metavar="bf16,fp32,fp16", help="in order")
    add("--list", action="store_true", help="print the cases' ids and stop")


def _shape(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected four positive integers B,T,I,H, got {text!r}")
    return Shape(*map(int, parts))


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    names = dict.fromkeys(text.split(","))
    if not all(name in _DTYPES for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(_DTYPES)}, got {text!r}")
    return tuple(_DTYPES[name] for name in names)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return int(part), int(parts)


def _cpu(arguments: argparse.Namespace) -> int:
    quick = arguments.quick
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
    if arguments.list:
        print(*(case.id for case in options.select()), sep="\n")
        return 0
    path = arguments.out or results_file.default_path("cpu", options.complete)
    return cpu.run(options, path, _console())


def _sweep(arguments: argparse.Namespace) -> int:
    options = sweep.Options(arguments.calls, arguments.budget, arguments.threads, arguments.seed)
    standard = options == sweep.Options(threads=options.threads)
    path = arguments.out or results_file.default_path("sweep", standard)
    return sweep.run(options, path, _console())


def _lstm(arguments: argparse.Namespace) -> int:
    options = lstm.Options(
        device=_device(arguments),
        dtypes=arguments.dtypes,
        case_budget=0.0 if arguments.toy else arguments.case_budget,
        min_rounds=min(arguments.rounds, 2) if arguments.toy else arguments.rounds,
        cases=arguments.cases,
        toy=arguments.toy,
        launches=not arguments.no_launches,
        compiled=arguments.compiled,
        reference=arguments.reference,
    )
    if arguments.compile:
        part, parts = arguments.compile
        return lstm.compile_kernels(options.select()[part::parts], options.device)
    return _run_lstm(options, arguments)


def _memory(arguments: argparse.Namespace) -> int:
    device = _device(arguments)
    if device.type == "cuda":
        options = lstm.Options(
            device, arguments.dtypes, cases=arguments.cases, toy=arguments.toy, timing=False
        )
        return _run_lstm(options, arguments)
    # On the CPU it is a section of its own, measured in new processes.
    shapes = (Shape(3, 6, 4, 8),) if arguments.toy else ()
    cases = f"^memory/.*(?:{arguments.cases})"
    on_cpu = cpu.Options((torch.get_num_threads(),), shapes=shapes, cases=cases)
    if arguments.list:
        print(*(case.id for case in on_cpu.select()), sep="\n")
        return 0
    return cpu.run(on_cpu, arguments.out or results_file.default_path("memory", False), _console())


def _run_lstm(options: lstm.Options, arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(*(case.id for case in options.select()), sep="\n")
        return 0
    if options.device.type == "cpu" and not options.toy:
        raise ValueError(
            "these cases are sized for a GPU and none is here; use `python -m bench cpu`, "
            "or --toy to see that the command works"
        )
    default = results_file.default_path(options.kind, options.complete, options.device)
    path = arguments.out or default
    return lstm.run(options, path, _console(), _limits(arguments), arguments.resume)


def _clip(arguments: argparse.Namespace) -> int:
    options = clip.Options(
        _device(arguments), quick=arguments.quick, toy=arguments.toy, cases=arguments.cases
    )
    default = results_file.default_path("clip", options.complete, options.device)
    path = arguments.out or default
    return clip.run(options, path, _console(), _limits(arguments), arguments.resume)


def _gpu(arguments: argparse.Namespace) -> int:
    plan = gpu.Plan(
        arguments.out,
        budget=arguments.budget,
        case_limit=arguments.case_limit,
        tests=not arguments.skip_tests,
        toy=arguments.toy,
    )
    return gpu.run(plan, _console())


def _costs(arguments: argparse.Namespace) -> int:
    options = costs.Options(
        cpu.threads_from(arguments.threads),
        _DTYPES[arguments.dtype],
        tuple(arguments.shape) or costs.SHAPES,
    )
    return costs.run(options, _console())


def _roofline(arguments: argparse.Namespace) -> int:
    from bench.roofline import LayerShape, roofline

    shape = LayerShape.dense(
        *arguments.shape,
        directions=2 if arguments.bidirectional else 1,
        dtype=_DTYPES[arguments.dtype],
        training=not arguments.inference,
    )
    print(*roofline(shape, arguments.gpu).lines(), sep="\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    print(*report.write(arguments.results, arguments.page, arguments.readme), sep="\n")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    before, after = results_file.load(arguments.before), results_file.load(arguments.after)
    return compare.run(before, after, arguments.threshold, _console())


def _device(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(arguments.device, 0 if arguments.device == "cuda" else None)


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(arguments.budget, arguments.case_limit)


def _console() -> Console:
    console = Console(highlight=False)
    # A file or a pipe has no width of its own.
    return console if console.is_terminal else Console(highlight=False, width=110)


if __name__ == "__main__":
    sys.exit(main())
