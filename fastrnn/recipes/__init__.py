"""Training programs on real data: `python -m fastrnn RECIPE`.

A recipe is a module of this package's that reads from top to bottom: its settings, its model, its
loop. What recipes share lies beside them, one idea a file.
"""

# Name -> what `python -m fastrnn --help` says of it. The module of that name has `Settings`, a
# dataclass derived from TrainingSettings, and `run(request: Request[Settings])`.
RECIPES = {
    "vowels": "name the speaker of an utterance (UCI Japanese Vowels, lengths 7 to 29)",
}
