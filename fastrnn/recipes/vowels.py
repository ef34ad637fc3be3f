"""`python -m fastrnn vowels`: who is speaking? Classification of utterances of any length.

UCI Japanese Vowels, 270 utterances to learn from and 370 to be told by. A bidirectional LSTM reads
the standardised frames, each utterance at its own length; its last states and the mean of its
outputs over valid steps say who it was. Noise on the frames keeps it from learning 270 utterances
by heart.

Model, noise, learning rate and number of epochs were chosen by three-fold cross-validation within
the training set, each fold a third of each speaker's recordings that were made one after another
(accuracy 94-96 %: these folds are harder than the test). The test set is read once, at the end of
a run.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastrnn
from fastrnn.recipes.checkpoint import Checkpoint, training_state
from fastrnn.recipes.compare import PackedLSTM, compare_sides
from fastrnn.recipes.distributed import World, join_world
from fastrnn.recipes.plots import plot_gradient_norms
from fastrnn.recipes.progress import training_progress
from fastrnn.recipes.settings import Option, TrainingSettings
from fastrnn.recipes.side import Clip, Side, in_turn
from fastrnn.recipes.summary import summarize, training_facts
from fastrnn.recipes.text_files import SHIPPED
from fastrnn.recipes.vowels_data import Utterance, Vowels, load_vowels
from fastrnn.training import Standardize, collate_ragged

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """What `python -m fastrnn vowels --help` lists."""

    epochs: int = 60
    batch_size: int = 16
    hidden: int = 64
    lr: float = 2e-3
    max_norm: float = 2.0
    out: Path = Path("runs/vowels")
    threads: int = 1  # steps this small gain nothing from a second, and lose tenfold if it is busy
    noise: Annotated[float, Option("of the training frames, in standard deviations", least=0)] = 1.0
    data: Annotated[
        Path | None, Option("directory of your own vowels_train.txt and vowels_test.txt")
    ] = None


class SpeakerClassifier(nn.Module):
    """Scores of each speaker for an utterance: `W [mean of h_t over valid steps; h_n] + b`."""

    def __init__(self, lstm: fastrnn.LSTM | PackedLSTM, speakers: int) -> None:
        super().__init__()
        self.lstm = lstm
        self.score = nn.Linear(2 * 2 * lstm.hidden_size, speakers)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`x [B, T, I]` and `lengths [B]` to `[B, speakers]`."""
        out, (h_n, _) = self.lstm(x, lengths=lengths)
        mean = out.sum(1) / lengths.to(out)[:, None]  # steps beyond the length are zero
        scores: Tensor = self.score(torch.cat([mean, *h_n], dim=1))
        return scores


def run(settings: Settings) -> float:
    """Train, test, and write the plot and the checkpoint.

    Deterministic on one machine. A resumed run ends as if it had never stopped; on the CPU, bit for
    bit. Sets torch's number of threads.

    Returns:
        The share of the test utterances whose speaker was named.

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
    checkpoint = Checkpoint("vowels", settings.out, world)
    saved = None
    if settings.resume:
        settings, saved = checkpoint.load(settings)
    torch.set_num_threads(settings.threads)
    device = world.device(settings.device)
    data = load_vowels(settings.data or SHIPPED)

    torch.manual_seed(settings.seed)
    sides = make_sides(settings, data, device, world)
    standardize = Standardize.fit(frames for frames, _ in data.train)
    # Order and noise have a generator of their own: they are the same whatever the model draws.
    generator = torch.Generator().manual_seed(settings.seed)
    batches: DataLoader[Utterance] = DataLoader(
        data.train,  # type: ignore[arg-type]  # a list is dataset enough
        settings.batch_size,
        shuffle=True,
        collate_fn=collate_ragged,
        generator=generator,
    )
    if saved is not None:
        checkpoint.restore_training(saved, data.digest, sides, generator)
        standardize.load_state_dict(saved["standardize"])

    checkpoint.make_directory()
    introduce(console, settings, data, sides[0].model)
    started, first_epoch = time.perf_counter(), checkpoint.epoch + 1
    with (
        checkpoint.kept_on_interrupt(),
        training_progress(console, settings.epochs, len(batches), checkpoint.epoch) as progress,
    ):
        for epoch in range(first_epoch, settings.epochs + 1):
            progress.start_epoch(epoch)
            right = torch.zeros((), device=device)
            for x, lengths, speakers in batches:
                x = standardize(x)
                x = (x + settings.noise * torch.randn(x.shape, generator=generator)).to(device)
                mine, weight = world.share(len(x))
                batch = x[mine], lengths[mine], speakers[mine].to(device)
                for side in in_turn(sides):
                    with side.timed():
                        scores = train_step(side, *batch, weight, settings.max_norm)
                    if side is sides[0]:
                        right += weight * len(x) * (scores.argmax(1) == batch[2]).float().mean()
                progress.advance()
            for side in sides:
                side.finish_epoch()
            loss = statistics.fmean(sides[0].losses[-len(batches) :])
            share = world.mean(right) / len(data.train)
            progress.finish_epoch(f"training loss {loss:.4f}, {share:6.1%} right")
            state = training_state(data.digest, sides, generator)
            checkpoint.save(settings, epoch, state | {"standardize": standardize.state_dict()})
    seconds = time.perf_counter() - started

    targets = torch.tensor([speaker for _, speaker in data.test])
    named = [name_speakers(side.model, standardize, data.test, device) for side in sides]
    shares = [float((guess == targets).float().mean()) for guess in named]
    if settings.compare:
        accuracies = ("test accuracy", f"{shares[0]:.1%}", f"{shares[1]:.1%}")
        compare_sides(console, sides[0], sides[1], len(batches), [accuracies])

    norms = sides[0].norms
    plot = settings.out / "gradient_norms.png"
    title = f"vowels: {settings.epochs} epochs, seed {settings.seed}"
    if world.leads:
        plot_gradient_norms(plot, norms, settings.max_norm, len(batches), title)
    summarize(
        console,
        f"{shares[0]:.1%} of the test utterances got the right name "
        f"({int((named[0] == targets).sum())} of {len(targets)})",
        {
            "mistakes": mistakes(named[0], targets, data.speakers),
            **training_facts(settings, first_epoch, seconds, norms),
            "plot": str(plot),
            "checkpoint": str(checkpoint.path),
        },
    )
    return shares[0]


def make_sides(settings: Settings, data: Vowels, device: torch.device, world: World) -> list[Side]:
    """One side by fastrnn; with `--compare` another by torch, from the same weights."""

    def side(name: str, kind: type[fastrnn.LSTM | PackedLSTM], clip: Clip) -> Side:
        lstm = kind(data.coefficients, settings.hidden, batch_first=True, bidirectional=True)
        model = SpeakerClassifier(lstm, len(data.speakers)).to(device)
        optimizer = torch.optim.Adam(model.parameters(), settings.lr)
        return Side(name, model, optimizer, clip, synchronize=settings.compare, world=world)

    sides = [side("fastrnn", fastrnn.LSTM, fastrnn.clip_grad_norm_)]
    if settings.compare:
        sides.append(side("nn.LSTM, packed", PackedLSTM, nn.utils.clip_grad_norm_))
        sides[1].model.load_state_dict(sides[0].model.state_dict())
    return sides


def train_step(
    side: Side, x: Tensor, lengths: Tensor, speakers: Tensor, weight: float, max_norm: float
) -> Tensor:
    """One step of gradient descent. Returns the scores before it, `[B, speakers]`."""
    side.replica.train()
    side.optimizer.zero_grad()
    scores: Tensor = side.replica(x, lengths)
    loss = weight * F.cross_entropy(scores, speakers)
    loss.backward()
    norm = side.clip(side.model.parameters(), max_norm)
    side.optimizer.step()
    side.record(loss, norm)
    return scores.detach()


@torch.no_grad()
def name_speakers(
    model: nn.Module, standardize: Standardize, utterances: list[Utterance], device: torch.device
) -> Tensor:
    """The speaker with the highest score for each utterance, `[len(utterances)]`, on the CPU."""
    model.eval()
    x, lengths, _ = collate_ragged(utterances)
    scores: Tensor = model(standardize(x).to(device), lengths)
    return scores.argmax(1).cpu()


def introduce(console: Console, settings: Settings, data: Vowels, model: nn.Module) -> None:
    """Say what is about to be trained, and on what."""
    lengths = [len(frames) for frames, _ in data.train + data.test]
    weights = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"[bold]vowels[/]  {len(data.train)} utterances of {len(data.speakers)} speakers to learn "
        f"from, {len(data.test)} to be told by;\n"
        f"        {min(lengths)} to {max(lengths)} frames of {data.coefficients} coefficients\n"
        f"        bidirectional LSTM, {settings.hidden} units, {weights:,} weights, "
        f"on {settings.device}\n"
        f"        Adam, lr {settings.lr:g}; gradients clipped at norm {settings.max_norm:g}; "
        f"seed {settings.seed}\n"
    )


def mistakes(named: Tensor, speakers: Tensor, names: list[str], most: int = 3) -> str:
    """Who was taken for whom, the most frequent first: `8 for 3 (2×), ...`."""
    wrong = (named != speakers).nonzero().flatten().tolist()
    counts = Counter((int(speakers[i]), int(named[i])) for i in wrong)
    if not counts:
        return "none"
    told = [
        f"{names[true]} for {names[guess]}" + (f" ({count}×)" if count > 1 else "")
        for (true, guess), count in counts.most_common(most)
    ]
    rest = len(wrong) - sum(count for _, count in counts.most_common(most))
    return ", ".join(told) + (f", and {rest} more" if rest else "")
