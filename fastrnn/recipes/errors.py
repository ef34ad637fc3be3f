"""What a recipe tells its user instead of a traceback."""

from __future__ import annotations


class RecipeError(Exception):
    """A recipe cannot go on. The message says what was expected, what came, and what to do."""

    status = 1


class UsageError(RecipeError):
    """The command line cannot be understood, or its options contradict each other."""

    status = 2


class Interrupted(RecipeError):
    """The user pressed Ctrl-C. The message says what is kept."""

    status = 130
