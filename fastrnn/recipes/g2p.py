"""`python -m fastrnn g2p`: how is a word pronounced? From spelling to phonemes.

The CMU Pronouncing Dictionary, 126,052 words. A bidirectional LSTM reads the letters, each word at
its own length; another writes the phonemes, and attends to the letters after the LSTM, so that a
run of teacher-forced steps is one call. Scheduled sampling makes the runs shorter as training goes
on: at first the decoder reads the right phonemes, and ever more often its own.

An epoch is a sample of the training words. The phoneme error rate (insertions, deletions and
substitutions, as a share of the phonemes) counts against the nearest of a word's pronunciations.
Learning rate, its decay and the batch size were chosen on the validation words, which are apart
from the training words; the test words are read once, at the end of a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.recipes.checkpoint import Checkpoint, training_state
from fastrnn.recipes.compare import PackedLSTM, compare_sides
from fastrnn.recipes.distributed import World, join_world
from fastrnn.recipes.error_rate import ErrorRate, error_rate
from fastrnn.recipes.errors import UsageError
from fastrnn.recipes.g2p_data import (
    BOUNDARY,
    DICTIONARY,
    Batch,
    Dictionary,
    Word,
    collate_words,
    load_dictionary,
)
from fastrnn.recipes.plots import plot_gradient_norms
from fastrnn.recipes.progress import training_progress
from fastrnn.recipes.settings import Option, TrainingSettings
from fastrnn.recipes.side import Clip, Side, in_turn
from fastrnn.recipes.summary import summarize, training_facts
from fastrnn.recipes.tables import new_table
from fastrnn.training import (
    Decoded,
    LuongAttention,
    ScheduledSampling,
    beam_decode,
    init_lstm_,
    sequence_loss,
    teacher_forced_decode,
)
from fastrnn.training.attention import Attending
from fastrnn.training.scheduled_sampling import Schedule

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """What `python -m fastrnn g2p --help` lists."""

    epochs: Annotated[
        int, Option("of training, each a new sample of the words", least=1, free=True)
    ] = 30
    batch_size: int = 64
    hidden: int = 128
    lr: float = 4e-3
    max_norm: float = 1.0
    out: Path = Path("runs/g2p")
    threads: int = 1
    lr_half: Annotated[int, Option("steps after which the learning rate is half", least=1)] = 600
    words: Annotated[int, Option("training words in an epoch", least=1)] = 10_000
    schedule: Annotated[
        str, Option("decay of teacher forcing: linear, exponential or inverse_sigmoid")
    ] = "inverse_sigmoid"
    half: Annotated[int, Option("steps after which its probability is 1/2", least=1)] = 3_000
    forced: Annotated[
        float, Option("its lowest probability; 1: every step is teacher-forced", least=0)
    ] = 0.8
    beam: Annotated[int, Option("pronunciations kept side by side in the test", least=1)] = 4
    stress: Annotated[bool, Option("tell AH0, AH1 and AH2 apart")] = False
    data: Annotated[Path | None, Option("dictionary of your own", metavar="FILE")] = None


class Pronouncer(nn.Module):
    """An encoder of letters, and a decoder that writes phonemes.

    Args:
        kind: the class of both LSTMs.
        letters: how many there are.
        phonemes: how many there are, the boundary included.
        hidden: H, units of the decoder, and of the encoder in each direction.
    """

    def __init__(
        self,
        kind: type[fastrnn.LSTM | PackedLSTM],
        letters: int,
        phonemes: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, hidden)
        self.encoder = kind(hidden, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.phonemes = nn.Embedding(phonemes, hidden)
        self.decoder = kind(hidden, hidden, batch_first=True)
        self.attention = LuongAttention(hidden, 2 * hidden)
        self.score = nn.Linear(hidden, phonemes)
        for lstm in (self.encoder, self.decoder):
            init_lstm_(lstm)

    def forward(self, batch: Batch, forced: Tensor) -> Tensor:
        """The scores `[B, T, V]` of each phoneme, at the steps that `forced [T]` forces and not."""
        state, attend = self.encode(batch.letters, batch.letter_lengths)
        outputs, _ = teacher_forced_decode(
            self.decoder,
            self.phonemes,
            self.score,
            batch.phonemes,
            state,
            start=BOUNDARY,
            teacher_forcing=forced,
            lengths=batch.phoneme_lengths,
            attend=attend,
        )
        return outputs

    def pronounce(self, letters: Tensor, lengths: Tensor, beam: int) -> Decoded:
        """Pronunciations `[B, beam, n]` of words `[B, S]`, the likeliest first."""
        state, attend = self.encode(letters, lengths)
        return beam_decode(
            self.decoder,
            self.phonemes,
            self.score,
            state,
            start=BOUNDARY,
            end=BOUNDARY,
            max_steps=2 * letters.shape[1] + 8,
            width=beam,
            attend=attend,
        )

    def encode(self, letters: Tensor, lengths: Tensor) -> tuple[tuple[Tensor, Tensor], Attending]:
        """The decoder's first state, and its attention to the letters `[B, S]`."""
        memory, (h_n, _) = self.encoder(self.letters(letters), lengths=lengths)
        h_0 = self.bridge(torch.cat([*h_n], 1)).tanh()[None]
        return (h_0, torch.zeros_like(h_0)), self.attention.over(memory, lengths)


def run(settings: Settings) -> float:
    """Train, test, and write the plot and the checkpoint.

    Deterministic on one machine. A resumed run ends as if it had never stopped; on the CPU, bit for
    bit. Sets torch's number of threads.

    Returns:
        The phoneme error rate on the test words.

    Raises:
        RecipeError: the data, the checkpoint or the device is not as it should be.
        Interrupted: Ctrl-C; the last checkpoint is kept.
    """
    with join_world() as world:
        return train(settings, world)


def train(settings: Settings, world: World) -> float:
    """What :func:`run` does, as one of the processes that train together."""
    from rich.console import Console

    console = Console(highlight=False, quiet=not world.leads)
    checkpoint = Checkpoint("g2p", settings.out, world)
    saved = None
    if settings.resume:
        settings, saved = checkpoint.load(settings)
    sampling = make_sampling(settings)
    torch.set_num_threads(settings.threads)
    device = world.device(settings.device)
    data = load_dictionary(settings.data or DICTIONARY, settings.stress)

    torch.manual_seed(settings.seed)
    sides = make_sides(settings, data, device, world)
    # The sample, its order and the coins are the same whatever the model draws.
    generator = torch.Generator().manual_seed(settings.seed)
    if saved is not None:
        checkpoint.restore_training(saved, data.digest, sides, generator)
        sampling.load_state_dict(saved["sampling"])

    checkpoint.make_directory()
    introduce(console, settings, data, sides[0].model)
    steps = -(-min(settings.words, len(data.train)) // settings.batch_size)
    started, first_epoch = time.perf_counter(), checkpoint.epoch + 1
    with (
        checkpoint.kept_on_interrupt(),
        training_progress(console, settings.epochs, steps, checkpoint.epoch) as progress,
    ):
        for epoch in range(first_epoch, settings.epochs + 1):
            progress.start_epoch(epoch)
            for batch in sample_batches(data.train, settings, generator):
                coins = torch.rand(batch.phonemes.shape[1], generator=generator)
                forced = coins < sampling.probability
                mine, weight = world.share(len(batch.letters), batch.phoneme_lengths)
                batch = batch.share(mine, device)
                rate = settings.lr / (1 + sampling.steps / settings.lr_half)
                for side in in_turn(sides):
                    set_learning_rate(side.optimizer, rate)
                    with side.timed():
                        train_step(side, batch, forced, weight, settings.max_norm)
                sampling.step()
                progress.advance()
            for side in sides:
                side.finish_epoch()
            loss = statistics.fmean(sides[0].losses[-steps:])
            errors, _ = assess(sides[0].model, data.valid[:1000], device, beam=1)
            progress.finish_epoch(
                f"training loss {loss:.4f}, {errors.symbols:6.2%} of phonemes wrong"
            )
            state = training_state(data.digest, sides, generator)
            checkpoint.save(settings, epoch, state | {"sampling": sampling.state_dict()})
    seconds = time.perf_counter() - started

    results = [assess(side.model, data.test, device, settings.beam) for side in sides]
    rates = [rate for rate, _ in results]
    if settings.compare:
        metrics = [
            ("phonemes wrong", f"{rates[0].symbols:.2%}", f"{rates[1].symbols:.2%}"),
            ("words wrong", f"{rates[0].sequences:.1%}", f"{rates[1].sequences:.1%}"),
        ]
        compare_sides(console, sides[0], sides[1], steps, metrics)
    show_words(console, data, results[0][1])

    norms = sides[0].norms
    plot = settings.out / "gradient_norms.png"
    title = f"g2p: {settings.epochs} epochs, seed {settings.seed}"
    if world.leads:
        plot_gradient_norms(plot, norms, settings.max_norm, steps, title)
    summarize(
        console,
        f"phoneme error rate {rates[0].symbols:.2%} on {len(data.test):,} test words "
        f"({1 - rates[0].sequences:.1%} of the words without error)",
        {
            **training_facts(settings, first_epoch, seconds, norms),
            "forced": f"{sampling.probability:.0%} of the decoder's steps at the end",
            "plot": str(plot),
            "checkpoint": str(checkpoint.path),
        },
    )
    return rates[0].symbols


def make_sampling(settings: Settings) -> ScheduledSampling:
    """The schedule that the settings ask for.

    Raises:
        UsageError: there is no such schedule, or its lowest probability is above 1.
    """
    if settings.schedule not in get_args(Schedule):
        raise UsageError(
            f"--schedule: expected {', '.join(get_args(Schedule))}, got {settings.schedule!r}"
        )
    if settings.forced > 1:
        raise UsageError(f"--forced: expected a probability, at most 1, got {settings.forced}")
    schedule = cast(Schedule, settings.schedule)
    return ScheduledSampling.halving(schedule, settings.half, least=settings.forced)


def make_sides(
    settings: Settings, data: Dictionary, device: torch.device, world: World
) -> list[Side]:
    """One side by fastrnn; with `--compare` another by torch, from the same weights."""

    def side(name: str, model: Pronouncer, clip: Clip) -> Side:
        model = model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), settings.lr)
        return Side(name, model, optimizer, clip, settings.compare, world)

    sizes = (len(data.letters), len(data.phonemes), settings.hidden)
    ours = Pronouncer(fastrnn.LSTM, *sizes)
    sides = [side("fastrnn", ours, fastrnn.clip_grad_norm_)]
    if settings.compare:
        theirs = Pronouncer(PackedLSTM, *sizes)
        theirs.load_state_dict(ours.state_dict())
        sides.append(side("nn.LSTM, packed", theirs, nn.utils.clip_grad_norm_))
    return sides


def sample_batches(
    words: list[Word], settings: Settings, generator: torch.Generator
) -> Iterator[Batch]:
    """An epoch: a sample of the words, each with one of its pronunciations at random."""
    order = torch.randperm(len(words), generator=generator)[: settings.words]
    choices = torch.randint(2**31, (len(order),), generator=generator)
    for some, which in zip(order.split(settings.batch_size), choices.split(settings.batch_size)):
        yield collate_words([words[i] for i in some.tolist()], which.tolist())


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_step(side: Side, batch: Batch, forced: Tensor, weight: float, max_norm: float) -> None:
    """One step of gradient descent."""
    side.replica.train()
    side.optimizer.zero_grad()
    scores: Tensor = side.replica(batch, forced)
    loss = weight * sequence_loss(scores, batch.phonemes, lengths=batch.phoneme_lengths)
    loss.backward()
    norm = side.clip(side.model.parameters(), max_norm)
    side.optimizer.step()
    side.record(loss, norm)


@torch.no_grad()
def assess(
    model: nn.Module, words: list[Word], device: torch.device, beam: int
) -> tuple[ErrorRate, list[list[int]]]:
    """The error rates over words, and the likeliest pronunciation of each."""
    model.eval()
    assert isinstance(model, Pronouncer)
    said: dict[int, list[int]] = {}
    by_length = sorted(range(len(words)), key=lambda i: len(words[i].letters))
    for first in range(0, len(words), 256):
        some = by_length[first : first + 256]
        batch = collate_words([words[i] for i in some])
        decoded = model.pronounce(batch.letters.to(device), batch.letter_lengths, beam)
        best, lengths = decoded.tokens[:, 0].tolist(), decoded.lengths[:, 0].tolist()
        said.update({i: row[:n] for i, row, n in zip(some, best, lengths)})
    written = [said[i] for i in range(len(words))]
    return error_rate(written, [word.pronunciations for word in words]), written


def show_words(
    console: Console, data: Dictionary, written: list[list[int]], most: int = 10
) -> None:
    """Print a few test words, what the model made of them, and the dictionary where it differs."""
    table = new_table("Test words, from A to Z", "written", "dictionary")
    for column in table.columns:
        column.justify = "left"
    count = min(most, len(data.test))
    for i in range(count):
        place = i * len(data.test) // count
        word, own = data.test[place], written[place]
        right = " · ".join(data.spoken(pronunciation) for pronunciation in word.pronunciations)
        same = own in word.pronunciations
        table.add_row(
            word.spelling, data.spoken(own) or "nothing", "[green]same[/]" if same else right
        )
    console.print()
    console.print(table)


def introduce(console: Console, settings: Settings, data: Dictionary, model: nn.Module) -> None:
    """Say what is about to be trained, and on what."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"[bold]g2p[/]  {len(data.train):,} words to learn from, {len(data.valid):,} to watch by, "
        f"{len(data.test):,} to be told by;\n"
        f"     {len(data.letters)} letters to {len(data.phonemes) - 1} phonemes\n"
        f"     encoder and decoder of {settings.hidden} units, {weights:,} weights, "
        f"on {settings.device}\n"
        f"     teacher forcing: {settings.schedule}, half after {settings.half:,} steps, "
        f"at least {settings.forced:g}\n"
        f"     Adam, lr {settings.lr:g}, half after {settings.lr_half:,} steps; "
        f"gradients clipped at norm {settings.max_norm:g}; "
        f"seed {settings.seed}\n"
    )
