"""What a model's predictions lose when one linear alone is changed, with one block in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from engine.branches import Ends, Go, Stream, follow
from engine.fit import SOLVED
from engine.methods import Context
from engine.models import LoadedModel, blocks, head
from engine.observing import BlockLinear, stretches
from engine.orientation import turned

Change = Callable[[str, Tensor], Tensor]  # of a linear's name and some rows (n, K) of its weight, rows to take instead
PREDICTIONS = "tokens predicted"  # unit of progress


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

    def way(name: str, number: int, states: Stream, go: Go) -> Stream:
        if name not in inside[number]:
            return go(states)
        with _having(model, name, _changed(model, name, change)):
            return go(states)

    for ends in follow(model, rows, inside, way, context):
        yield from _compared(ends, [name for name in inside[-1] if name in ends.branches], change, context)


def _changed(model: LoadedModel, name: str, change: Change) -> Tensor:
    """The weight to put in the place of an open linear's, the way round in which the module holds it."""
    linear = BlockLinear(name, model.network.get_submodule(name))  # type: ignore[arg-type]
    made = torch.empty_like(linear.module.weight)
    rows = turned(linear.module, made)
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


def _compared(ends: Ends[str], heads: Sequence[str], change: Change, context: Context) -> Iterator[tuple[str, float]]:
    """The divergence of each branch's predictions, and of those of changed `heads`."""
    model, sums, others = ends.model, dict.fromkeys(ends.branches, 0.0), dict[str, Tensor]()
    done, each, tokens = 0, len(sums) + 1, sum(ids.numel() for ids in ends.flow.ids)
    context.progress(0, tokens * each, PREDICTIONS)
    with model.lingering():
        for place in ends.places():
            known = ends.predict(ends.own, place)  # which opens the head
            others = others or {name: _changed(model, name, change) for name in heads}
            for name, states in ends.branches.items():
                context.check_cancelled()
                with _having(model, name, others[name]) if name in others else contextlib.nullcontext():
                    mine = ends.predict(states, place)
                sums[name] += float(kl_div(mine, known, reduction="sum", log_target=True))
            done += known.shape[:2].numel() * each
            context.progress(done, tokens * each, PREDICTIONS)
    yield from ((name, total / tokens) for name, total in sums.items())
