"""Train a decoder on its targets, its own predictions, or a mixture: as few LSTM calls as can be.

An input that comes from the targets is known beforehand. So a step that the model feeds, with all
forced steps after it up to the next such step, is one *run*, and goes through the LSTM as one call.
In round k every sequence has its k-th run, of its own start and length
(:mod:`fastrnn.training.runs`). A batch takes 1 + (the largest number of model-fed steps in a
sequence) calls: one where everything is forced, T where nothing is.

Limit: a run is one call only because no input depends on an output within it. Attention after the
LSTM (:class:`fastrnn.training.LuongAttention`) keeps it so. Input feeding (Luong et al. 2015, 3.3),
where the attention's result goes into the next input, and attention that chooses the input
(Bahdanau et al. 2015) do not: there every step needs the one before it, and a loop of steps is all
there is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastrnn.input.arguments import Lengths, check_lengths
from fastrnn.training.decoder import States, Transform, check_decoder, run_decoder, scorer
from fastrnn.training.runs import plan_runs
from fastrnn.training.scheduled_sampling import ScheduledSampling


class TeacherForced(NamedTuple):
    """What :func:`teacher_forced_decode` returns.

    Attributes:
        outputs: `[B, T, V]`, the projected outputs; at invalid steps those of a zero LSTM output.
        inputs: `[B, T, ...]`, what was embedded for each step, detached; zero at invalid steps.
    """

    outputs: Tensor
    inputs: Tensor


def teacher_forced_decode(
    lstm: nn.RNNBase,
    embed: Transform,
    project: Transform,
    targets: Tensor,
    state: States | None = None,
    *,
    start: Tensor | int | float,
    teacher_forcing: float | ScheduledSampling | Tensor = 1.0,
    per: Literal["step", "element"] = "step",
    lengths: Lengths | None = None,
    attend: Transform | None = None,
    feed: Transform | None = None,
    generator: torch.Generator | None = None,
) -> TeacherForced:
    """Decode `targets`, each step fed with the target before it or with the model's own output.

    `out_t, state = lstm(embed(input_t), state)`, `outputs_t = project(attend(out_t))`, and
    `input_t` is `start` for the first step, then `targets_{t-1}` where step t is forced and
    `feed(outputs_{t-1})` where it is not. It equals that loop, outputs and gradients, to rounding.

    Below, B and T change places where the LSTM is not `batch_first`; `embed`, `project` and
    `attend` always see the batch first.

    Args:
        lstm: a unidirectional fastrnn.LSTM. nn.LSTM where `lengths` are not given and coins are
            tossed per step, so that no call is ragged.
        embed: inputs `[b, n, ...]` of b <= B sequences to `[b, n, I]`: nn.Embedding for tokens.
        project: `[B, n, P]` (or what `attend` returns) to `[B, n, V]`, each step by itself, for any
            n. A dropout in it draws anew for a prediction that is fed.
        targets: tokens `[B, T]`, int64; or values `[B, T, F]`, floating point. Whatever stands at
            invalid steps, -100 and NaN included, is never read.
        state: `(h_0 [L, B, P], c_0 [L, B, H])`, the encoder's last one for instance. Default:
            zeros.
        start: the first input: a token or value, or a tensor of one for each sequence, `[B, ...]`.
        teacher_forcing: the probability that a step is forced; a schedule that has it; or the coins
            themselves, bool, `[T]` or `[B, T]`, True = forced. The first step always gets
            `start`. Default: 1.0.
        per: whether a coin is tossed for each step of the batch or for each step of each sequence.
            Per step there are fewer calls: in the mean 1 + (1 - p)(T - 1). Default: "step".
        lengths: `[B]` integers in [0, T]. On the CPU, or this waits for the GPU. Default: all T.
        attend: `[B, n, P]` to `[B, n, A]`, what the decoder takes from the encoder, each step by
            itself. Default: none.
        feed: `[B, V]` to the next inputs `[B, ...]`, shaped as one step of `targets`. Default:
            `argmax(-1)` for tokens; values must say.
        generator: of the coins. A batch takes T or B T numbers from it, whatever the probability.
            Default: torch's.

    Returns:
        The projected outputs `[B, T, V]`, for a loss over the valid steps
        (:func:`fastrnn.training.sequence_loss`), and the inputs `[B, T, ...]`. Where targets are
        tokens, no gradient passes through what is fed; where they are values, it does unless
        `feed` detaches.

    Raises:
        ValueError: a bidirectional LSTM, or a shape, length or probability that does not fit.
        TypeError: values without `feed`.

    Source: Williams and Zipser, A learning algorithm for continually running fully recurrent neural
    networks, 1989; Bengio et al., Scheduled sampling for sequence prediction with recurrent neural
    networks, 2015.
    """
    check_decoder(lstm)
    form = "[B, T, ...]" if lstm.batch_first else "[T, B, ...]"
    if targets.dim() < 2 or 0 in targets.shape[:2]:
        raise ValueError(
            f"targets must have shape {form} with at least one sequence and one step, got "
            f"{list(targets.shape)}"
        )
    if not lstm.batch_first:
        targets = targets.transpose(0, 1)
    if feed is None:
        if targets.is_floating_point():
            raise TypeError(
                f"targets of {targets.dtype} are values, and how an output becomes an input is not "
                "known: pass feed, for instance feed=lambda y: y"
            )
        feed = most_likely
    batch, steps = targets.shape[:2]
    device = targets.device
    exact = check_lengths([steps] * batch if lengths is None else lengths, batch, steps, exact=True)
    exact = exact.cpu()
    forced = _coins(teacher_forcing, per, batch, steps, lstm.batch_first, generator)
    inputs = torch.cat([_first(start, targets)[:, None], targets[:, :-1]], 1)
    score = scorer(project, attend)

    outs: list[Tensor] = []
    places: list[Tensor] = []
    previous = torch.arange(batch, device=device)
    for k, run in enumerate(plan_runs(forced, exact)):
        rows, kept = run.rows.to(device), run.kept.to(device)
        place = run.rows[:, None] * steps + run.steps
        x = inputs.flatten(0, 1)[place.to(device)]
        if k > 0:
            assert state is not None
            # The output of the last run's last step is its h_n. Of tokens no gradient comes back.
            last = state[0].new_zeros(batch, state[0].shape[2])
            last = last.index_copy(0, previous, state[0][-1])
            with torch.set_grad_enabled(torch.is_grad_enabled() and targets.is_floating_point()):
                fed = feed(score(last[:, None])[:, 0])[rows].to(x.dtype)
            x = torch.cat([fed[:, None], x[:, 1:]], 1)
            inputs[rows, run.begins.to(device)] = fed.detach()
        if state is not None and len(kept) < state[0].shape[1]:
            state = state[0].index_select(1, kept), state[1].index_select(1, kept)
        valid = run.valid
        out, state = run_decoder(lstm, embed(x), state, None if valid is None else run.lengths)
        out, place = out.flatten(0, 1), place.flatten()
        if valid is not None:
            columns = valid.flatten().nonzero().flatten()
            out, place = out.index_select(0, columns.to(device)), place[columns]
        outs.append(out)
        places.append(place)
        previous = rows
    if outs:
        hidden = torch.cat(outs)
        all_rows = hidden.new_zeros(batch * steps, hidden.shape[1])
        hidden = all_rows.index_copy(0, torch.cat(places).to(device), hidden)
    else:
        hidden = embed(inputs[:, :1]).new_zeros(batch * steps, lstm.proj_size or lstm.hidden_size)
    outputs = score(hidden.unflatten(0, (batch, steps)))
    beyond = (torch.arange(steps) >= exact[:, None]).to(device)
    inputs = inputs.detach().masked_fill(beyond[(...,) + (None,) * (inputs.dim() - 2)], 0)
    if not lstm.batch_first:
        outputs, inputs = outputs.transpose(0, 1), inputs.transpose(0, 1)
    return TeacherForced(outputs, inputs)


def most_likely(scores: Tensor) -> Tensor:
    """The index of the highest score: `[..., V]` to `[...]`."""
    return scores.argmax(-1)


def _first(start: Tensor | float, targets: Tensor) -> Tensor:
    """`start` as one step of `targets [B, T, ...]`: `[B, ...]`."""
    first = torch.as_tensor(start, dtype=targets.dtype, device=targets.device)
    expected = targets[:, 0].shape
    if first.dim() and first.shape != expected:
        raise ValueError(
            f"start must be one value, or have shape {list(expected)} (one step of the targets), "
            f"got {list(first.shape)}"
        )
    return first.expand(expected)


def _coins(
    teacher_forcing: float | ScheduledSampling | Tensor,
    per: str,
    batch: int,
    steps: int,
    batch_first: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Which steps are forced: bool `[B, T]` on the CPU."""
    if isinstance(teacher_forcing, Tensor):
        coins = teacher_forcing.cpu()
        if coins.dim() == 2 and not batch_first:
            coins = coins.t()
        if coins.dtype != torch.bool or tuple(coins.shape) not in ((steps,), (batch, steps)):
            order = "[B, T]" if batch_first else "[T, B]"
            raise ValueError(
                f"coins must be bool of shape [{steps}] ([T]) or {order} of {batch} sequences, got "
                f"{teacher_forcing.dtype} {list(teacher_forcing.shape)}"
            )
        return coins.expand(batch, steps)
    if isinstance(teacher_forcing, ScheduledSampling):
        teacher_forcing = teacher_forcing.probability
    if not 0 <= teacher_forcing <= 1:
        raise ValueError(
            f"teacher_forcing must be a probability, from 0 to 1, got {teacher_forcing}"
        )
    if per not in ("step", "element"):
        raise ValueError(f'per must be "step" or "element", got {per!r}')
    shape = (steps,) if per == "step" else (batch, steps)
    device = "cpu" if generator is None else generator.device
    coins = torch.rand(shape, generator=generator, device=device) < teacher_forcing
    return coins.cpu().expand(batch, steps)
