"""Training programs on real data: `python -m fastrnn RECIPE`.

A recipe is a module of this package's that reads from top to bottom: its settings, its model, its
loop. What recipes share lies beside them, one idea a file.
"""

# Name -> what `python -m fastrnn --help` says of it. The module of that name has `Settings`, a
# dataclass derived from TrainingSettings, and `run(settings: Settings)`.
RECIPES = {
    "vowels": "name the speaker of an utterance (UCI Japanese Vowels, lengths 7 to 29)",
    "g2p": "spell out how a word is pronounced (CMU Pronouncing Dictionary, 126,052 words)",
    "charlm": "continue a text, character by character (Shakespeare's plays, 1.1 million of them)",
    "gaps": "forecast air quality from a record with holes (UCI Air Quality, 9,357 hours)",
}
