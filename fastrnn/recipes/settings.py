"""A recipe's settings: one dataclass is its defaults, its command line and its checkpoint's record.

@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    epochs: int = 60  # a default for an option that all recipes have
    noise: Annotated[float, Option("standard deviation of ...", least=0)] = 1.0  # one of its own
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

from fastrnn.recipes.errors import RecipeError, UsageError


@dataclass(frozen=True)
class Option:
    """What the command line says and checks of one setting.

    Args:
        help: what the setting is, without its default.
        least: the smallest value allowed.
        above: a value that it must exceed.
        infinite: whether a float may be infinite.
        free: whether a resumed run may set it anew.
        metavar: what stands for the value in `--help`. Default: by its type.
    """

    help: str
    least: int | None = None
    above: int | None = None
    infinite: bool = False
    free: bool = False
    metavar: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings that every recipe has. A recipe gives those without a default one of its own."""

    epochs: Annotated[int, Option("passes over the training data", least=1, free=True)]
    batch_size: Annotated[int, Option("sequences in a step, all processes together", least=1)]
    hidden: Annotated[int, Option("hidden units of the LSTM", least=1)]
    lr: Annotated[float, Option("Adam's learning rate", above=0)]
    max_norm: Annotated[
        float,
        Option("gradient norm above which a step is clipped; inf: never", above=0, infinite=True),
    ]
    out: Annotated[Path, Option("directory for the checkpoint and the plot", free=True)]
    threads: Annotated[int, Option("of the CPU that torch may use", least=1)]
    seed: Annotated[int, Option("of weights, order and noise", least=0)] = 0
    device: Annotated[str, Option("where to train: cpu, cuda, cuda:1, ...", free=True)] = "cpu"
    resume: Annotated[bool, Option("go on from the checkpoint in --out", free=True)] = False
    compare: Annotated[
        bool, Option("train torch's nn.LSTM on packed sequences beside it, and show both")
    ] = False
    given: frozenset[str] = frozenset()
    """The settings that were given on the command line; not an option itself."""

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint; but those that say where it is."""
        names = options(type(self)).keys() - {"out", "resume"}
        values = {name: getattr(self, name) for name in sorted(names)}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


_METAVARS: dict[type, str] = {int: "N", float: "X", Path: "DIR"}

SettingsT = TypeVar("SettingsT", bound=TrainingSettings)


def options(settings: type[TrainingSettings]) -> dict[str, tuple[type, Option]]:
    """Each option's type and description, by the name of its setting."""
    found: dict[str, tuple[type, Option]] = {}
    for cls in settings.__mro__[::-1]:
        hints = get_type_hints(cls, include_extras=True) if dataclasses.is_dataclass(cls) else {}
        for name, hint in hints.items():
            # A subclass that gives another default repeats the type, not the description.
            described = [extra for extra in get_args(hint) if isinstance(extra, Option)]
            if described:
                kinds = get_args(get_args(hint)[0]) or get_args(hint)[:1]  # `Path | None`: Path
                found[name] = (kinds[0], described[0])
    return found


def flag(name: str) -> str:
    """`max_norm` as the command line writes it: `--max-norm`."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message."""
        message = message.removeprefix("argument ")
        raise UsageError(f"{message}\n`{self.prog} --help` lists the options")


def parse_settings(
    recipe: str, summary: str, settings: type[SettingsT], argv: list[str]
) -> SettingsT:
    """Read a recipe's command line.

    Raises:
        UsageError: an option that does not exist, or a value that is not allowed.
        SystemExit: after `--help`, with status 0.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    parser = Parser(
        prog=f"python -m fastrnn {recipe}",
        description=summary[0].upper() + summary[1:] + ".",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, (kind, option) in options(settings).items():
        if kind is bool:
            parser.add_argument(flag(name), action="store_true", help=option.help)
            continue
        default = defaults[name]
        parser.add_argument(
            flag(name),
            type=_checked(kind, option),
            metavar=option.metavar or _METAVARS.get(kind, name.upper()),
            help=option.help
            + ("" if default is None else f" (default: {default})").replace("%", "%%"),
        )
    given = vars(parser.parse_args(argv))
    return settings(**given, given=frozenset(given))


def resume_settings(settings: SettingsT, saved: dict[str, Any], path: Path) -> SettingsT:
    """The settings of a checkpoint, with those that this command line may set anew.

    Raises:
        UsageError: an option was given that contradicts the checkpoint.
    """
    known = options(type(settings))
    mine = settings.record()
    if saved.keys() != mine.keys():
        raise RecipeError(
            f"{path} was written by another version of this recipe (its settings are "
            f"{', '.join(sorted(saved))}): start again without --resume"
        )
    clashes = [
        f"{flag(name)} {_shown(mine[name])} (the checkpoint: {_shown(saved[name])})"
        for name in sorted(settings.given)
        if not known[name][1].free and mine[name] != saved[name]
    ]
    if clashes:
        raise UsageError(
            f"cannot resume {path} with other settings: {', '.join(clashes)}. Leave these options "
            "out to go on as it was, or start again without --resume"
        )
    values: dict[str, Any] = {
        name: None if value is None else known[name][0](value)
        for name, value in saved.items()
        if name not in settings.given
    }
    return dataclasses.replace(settings, **values)


def _checked(kind: type, option: Option) -> Any:
    """A converter for argparse: text to a value of this kind within the option's bounds."""
    if kind not in (int, float):
        return kind
    what = "an integer" if kind is int else "a number" if option.infinite else "a finite number"
    if option.least is not None:
        what += f" of at least {option.least}"
    if option.above is not None:
        what += f" above {option.above}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_small = (option.least is not None and value < option.least) or (
            option.above is not None and value <= option.above
        )
        endless = math.isinf(value) and not option.infinite
        # torch's generators take seeds of 64 bits; nothing else here is as large.
        too_large = kind is int and value >= 2**63
        if math.isnan(value) or too_small or endless or too_large:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return convert


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
