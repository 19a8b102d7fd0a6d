"""What a model's predictions lose when one linear alone is changed, with one block in memory at a time.

Each change begins a stream of hidden states of its own. Block after block computes what becomes of every stream that
has begun, and of the model's own: a block is read once for all of them, and what stands before a change is computed
once. As many changes are followed at a time as `HELD` bytes of states allow, those of some blocks: a wave.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers.pytorch_utils import Conv1D

from engine.calibration import BlockLinear, stretches
from engine.fit import HELD, SOLVED
from engine.flow import Call, Flow, batch_size, behind, capture, run_block
from engine.methods import Context
from engine.models import LoadedModel, blocks, head

Change = Callable[[str, Tensor], Tensor]  # of a linear's name and some rows (n, K) of its weight, rows to take instead
PASSES, PREDICTIONS = "passes of blocks", "tokens predicted"  # units of progress
LOGITS = 1 << 24  # that are compared at a time
States = list[Tensor]  # (B, T, hidden), batch by batch


@torch.no_grad()
def divergences(
    model: LoadedModel, rows: Tensor, names: Sequence[str], change: Change, context: Context
) -> Iterator[tuple[str, float]]:
    """The KL divergence (nats a token) of the model's predictions when one of its linears is changed, from its own.

    rows: token ids (count, T). names: linears of the blocks, or the head; each is as it was when the next is changed.
    """
    if not names:
        return
    prefix, modules = blocks(model.network)
    stations = [*(f"{prefix}.{number}" for number in range(len(modules))), head(model.network)[0]]
    inside = [[name for name in names if f"{name}.".startswith(f"{station}.")] for station in stations]
    flow = capture(model, torch.split(rows, batch_size(rows.shape[1])), context.folder / "perturbed")
    own = [flow.states[batch] for batch in range(len(flow.states))]
    most = max(1, HELD // sum(states.nbytes for states in own))
    waves = _waves([len(each) for each in inside], most)
    left = [len(modules) - number for number in range(len(stations))]  # blocks from each station on
    done, passes = 0, sum(map(operator.mul, left, map(len, inside))) + sum(left[wave.start] for wave in waves)

    def passed(module: nn.Module, states: States, calls: Sequence[Call]) -> States:
        nonlocal done
        context.check_cancelled()
        found = [run_block(module, batch, call) for batch, call in zip(states, calls, strict=True)]
        done += 1
        context.progress(done, passes, PASSES)
        return found

    context.progress(0, passes, PASSES)
    for wave in waves:
        entered, streams = own, dict[str, States]()
        for number, module in list(enumerate(modules))[wave.start :]:
            calls = flow.calls[number]
            with model.opened(stations[number]):
                model.prefetch(stations[number + 1])
                for name, states in streams.items():
                    streams[name] = passed(module, states, calls)
                for name in inside[number] if number in wave else ():
                    with _having(model, name, _changed(model, name, change)):
                        streams[name] = passed(module, entered, calls)
                entered = passed(module, entered, calls)
            if number + 1 == wave.stop:
                own = entered  # what enters the next wave
        yield from _compared(model, flow, entered, streams, inside[-1] if len(modules) in wave else (), change, context)


def _waves(counts: Sequence[int], most: int) -> list[range]:
    """Stations in rows with at most so many changes together, where one station alone has no more; none left out."""
    found, start, held = list[range](), 0, 0
    for number, count in enumerate(counts):
        if held and count and held + count > most:
            found.append(range(start, number))
            start, held = number, 0
        held += count
    return [*found, range(start, len(counts))]


def _changed(model: LoadedModel, name: str, change: Change) -> Tensor:
    """The weight to put in the place of an open linear's, the way round in which the module holds it."""
    linear = BlockLinear(name, model.network.get_submodule(name))  # type: ignore[arg-type]
    made = torch.empty_like(linear.module.weight)
    rows = made.t() if isinstance(linear.module, Conv1D) else made
    for some in stretches(linear.weight, SOLVED):
        rows[some] = change(name, linear.weight[some])
    return made


@contextlib.contextmanager
def _having(model: LoadedModel, name: str, weight: Tensor) -> Iterator[None]:
    """The module has another weight meanwhile."""
    parameter = model.network.get_submodule(name).get_parameter("weight")
    exact = parameter.data
    parameter.data = weight
    try:
        yield
    finally:
        parameter.data = exact


def _compared(
    model: LoadedModel, flow: Flow, own: States, streams: dict[str, States], heads: Sequence[str], change: Change,
    context: Context,
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """The divergence of each stream's predictions, and of a changed head's; some tokens at a time, for the logits."""
    sums, others = dict.fromkeys([*streams, *heads], 0.0), dict[str, Tensor]()
    done, each, tokens = 0, len(sums) + 1, sum(ids.numel() for ids in flow.ids)
    context.progress(0, tokens * each, PREDICTIONS)

    def predict(states: States, batch: int, here: tuple[slice, slice]) -> Tensor:
        output = behind(model, model.network, flow.ids[batch][here], states[batch][here], flow.tuples)
        found: Tensor = output.logits[0].float().log_softmax(-1)
        return found

    with model.lingering():
        for batch, ids in enumerate(flow.ids):
            for row, some in itertools.product(range(len(ids)), _spans(ids.shape[1], model)):
                here = (slice(row, row + 1), some)
                known = predict(own, batch, here)  # which opens the head
                others = others or {name: _changed(model, name, change) for name in heads}
                for name in sums:
                    context.check_cancelled()
                    with _having(model, name, others[name]) if name in others else contextlib.nullcontext():
                        mine = predict(streams.get(name, own), batch, here)
                    sums[name] += float(kl_div(mine, known, reduction="sum", log_target=True))
                done += len(known) * each
                context.progress(done, tokens * each, PREDICTIONS)
    yield from ((name, total / tokens) for name, total in sums.items())


def _spans(length: int, model: LoadedModel) -> Iterator[slice]:
    """A row's tokens in spans of as many logits as are compared at a time: what follows blocks heeds no other token."""
    step = max(1, LOGITS // model.network.config.get_text_config().vocab_size)
    return (slice(start, start + step) for start in range(0, length, step))
