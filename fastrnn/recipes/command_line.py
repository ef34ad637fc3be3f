"""The command line: which recipe, and how its errors reach the user."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

from fastrnn.recipes import RECIPES
from fastrnn.recipes.errors import RecipeError, UsageError
from fastrnn.recipes.settings import Parser, parse_settings

# Name -> what `python -m fastrnn --help` says of it. The module of that name in fastrnn has
# `main(argv)`, which returns the exit status.
TOOLS = {
    "info": "say what is here and what can run, and why not; for bug reports",
    "check": "compare every kind of computation with torch's, on this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run `python -m fastrnn` with these arguments; by default the process's own.

    Returns:
        The exit status: 0; 1 for an error in data, checkpoint or machine; 2 for one in the command
        line; 130 after Ctrl-C. Errors go to stderr as a sentence, without a traceback.

    Raises:
        SystemExit: after `--help`, with status 0.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except RecipeError as error:
        print(f"fastrnn: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("fastrnn: stopped", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        _overview().parse_args(argv or ["--help"])
    recipe, *rest = argv
    if recipe in TOOLS:
        status: int = importlib.import_module(f"fastrnn.{recipe}").main(rest)
        return status
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, [*RECIPES, *TOOLS], n=1)
        raise UsageError(
            f"there is no recipe {recipe!r}{f', did you mean {near[0]}?' if near else ''}\n"
            f"recipes: {', '.join(RECIPES)}; tools: {', '.join(TOOLS)}; "
            "`python -m fastrnn --help` says what they are"
        )
    module = importlib.import_module(f"fastrnn.recipes.{recipe}")
    settings = parse_settings(recipe, RECIPES[recipe], module.Settings, rest)
    _require_demo_packages()
    module.run(settings)
    return 0


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, RECIPES))
    recipes, tools = (
        "\n".join(f"  {name:{width}}  {summary}" for name, summary in commands.items())
        for commands in (RECIPES, TOOLS)
    )
    parser = Parser(
        prog="python -m fastrnn",
        usage="python -m fastrnn RECIPE|TOOL [options]",
        description="Train an LSTM on real data, and see that it works on this machine.",
        epilog=f"recipes:\n{recipes}\n\ntools:\n{tools}\n\n"
        "`python -m fastrnn NAME --help` lists the options of either.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _require_demo_packages() -> None:
    """Before training, not after it, when the plot is due."""
    for package in ("rich", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"recipes need rich and matplotlib, and {package} cannot be imported ({error}): "
                "pip install 'fastrnn[demo]'"
            ) from error
