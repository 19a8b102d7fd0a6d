"""What a model's predictions lose when one linear alone is changed, with one block in memory at a time.

Each change begins a stream of hidden states of its own. Block after block computes what becomes of every stream that
has begun, and of the model's own: a block is read once for all of them, and what stands before a change is computed
once. As many changes are followed at a time as `HELD` bytes of states allow, those of some blocks: a wave.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from engine.calibration import BlockLinear, stretches
from engine.fit import HELD, SOLVED
from engine.flow import Call, Flow, batch_size, behind, capture, run_block
from engine.methods import Context
from engine.models import LoadedModel, blocks, head

Change = Callable[[str, Tensor], Tensor]  # of a linear's name and some rows (n, K) of its weight, rows to take instead
PASSES, PREDICTIONS = "passes of blocks", "rows predicted"  # units of progress
States = list[Tensor]  # (B, T, hidden), batch by batch


@torch.inference_mode()
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
    behind_each = [len(modules) - number for number in range(len(stations))]
    done, passes = 0, sum(map(operator.mul, behind_each, map(len, inside))) + sum(behind_each[w.start] for w in waves)

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
                    with _changed(model, name, change):
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


@contextlib.contextmanager
def _changed(model: LoadedModel, name: str, change: Change) -> Iterator[None]:
    """The linear has other weights meanwhile."""
    weight = BlockLinear(name, model.network.get_submodule(name)).weight  # type: ignore[arg-type]
    exact = weight.clone()
    for some in stretches(weight, SOLVED):
        weight[some] = change(name, exact[some])
    try:
        yield
    finally:
        weight.copy_(exact)


def _compared(
    model: LoadedModel, flow: Flow, own: States, streams: dict[str, States], heads: Sequence[str], change: Change,
    context: Context,
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """The divergence of each stream's predictions, and of a changed head's; of one row at a time, for the logits."""
    sums = dict.fromkeys([*streams, *heads], 0.0)
    done, each, rows = 0, len(sums) + 1, sum(map(len, flow.ids))
    context.progress(0, rows * each, PREDICTIONS)
    with model.lingering():
        for batch, ids in enumerate(flow.ids):
            for row in range(len(ids)):

                def predict(states: States, batch: int = batch, row: int = row) -> Tensor:
                    some = slice(row, row + 1)
                    output = behind(model, model.network, flow.ids[batch][some], states[batch][some], flow.tuples)
                    found: Tensor = output.logits[0].float().log_softmax(-1)
                    return found

                known = predict(own)
                for name in sums:
                    context.check_cancelled()
                    with _changed(model, name, change) if name in heads else contextlib.nullcontext():
                        mine = predict(streams.get(name, own))
                    sums[name] += float(kl_div(mine, known, reduction="sum", log_target=True))
                done += each
                context.progress(done, rows * each, PREDICTIONS)
    tokens = sum(ids.numel() for ids in flow.ids)
    yield from ((name, total / tokens) for name, total in sums.items())
