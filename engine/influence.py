"""What each block of a model does to the text that flows through it, and what the model loses without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.branches import Go, Stream, follow
from engine.flow import batch_size, capture, run_block
from engine.methods import Context
from engine.models import LoadedModel, blocks

COMPARED = 1 << 22  # numbers of states that are compared at a time
LOSSES = "tokens predicted without blocks"  # unit of progress


@dataclass(frozen=True)
class Distances:
    """How far runs of blocks move the states, mean over tokens: at [l][n - 1] the blocks l to l + n - 1.

    cosine: 1 - the cosine of what enters block l and what enters block l + n; for n = 1 it is ShortGPT's block
        influence. angle: the angle between the two over pi, as Gromov et al. measure it, over all tokens.
    """

    cosine: list[list[float]]
    angle: list[list[float]]


def batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Token ids (B, T) that flow through the model at a time."""
    return torch.split(rows, batch_size(rows.shape[1]))


@torch.no_grad()
def distances(model: LoadedModel, rows: Tensor, context: Context) -> Distances:
    """The distances that every run of blocks moves the states of rows (count, length) of token ids."""
    prefix, modules = blocks(model.network)
    count = len(modules)
    flow = capture(model, batches(rows), context.folder)
    levels = [flow.states]  # what enters each block, and what leaves the last
    for number, module in enumerate(modules):
        context.check_cancelled()
        levels.append(flow.states.like(f"states-{number + 1}", share=count))
        with model.opened(f"{prefix}.{number}"):
            if number + 1 < count:
                model.prefetch(f"{prefix}.{number + 1}")
            for batch, call in enumerate(flow.calls[number]):
                levels[-1][batch] = run_block(module, levels[-2][batch], call)
        context.progress(number + 1, count, "blocks")
    cosines = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    angles = torch.zeros_like(cosines)
    for batch in range(len(flow.ids)):
        states = [level[batch].flatten(0, 1) for level in levels]  # (tokens, hidden)
        step = max(1, COMPARED // (len(levels) * states[0].shape[1]))
        for start in range(0, len(states[0]), step):
            context.check_cancelled()
            some = torch.stack([each[start : start + step] for each in states], 1)  # (tokens, levels, hidden)
            units = functional.normalize(some.float(), dim=-1)
            between = (units @ units.mT).clamp(-1, 1)  # (tokens, levels, levels)
            cosines += between.double().sum(0).cpu()
            angles += between.arccos().double().sum(0).cpu() / torch.pi
    for level in levels:
        level.close()

    def runs(sums: Tensor) -> list[list[float]]:
        return [sums[start, start + 1 :].tolist() for start in range(count)]

    return Distances(runs(1 - cosines / rows.numel()), runs(angles / rows.numel()))


@torch.no_grad()
def losses_without(model: LoadedModel, rows: Tensor, runs: Sequence[range], context: Context) -> list[float]:
    """The mean negative log-likelihood (nats a token) of rows (count, length) without each run of blocks.

    An empty run leaves the model whole.
    """
    sums = [0.0] * len(runs)
    numbers = range(len(blocks(model.network)[1]) + 1)
    leaving = [[place for place, run in enumerate(runs) if run.start == number] for number in numbers]

    def way(place: int, number: int, states: Stream, go: Go) -> Stream:
        return states if number in runs[place] else go(states)

    for ends in follow(model, rows, leaving, way, context):
        places = list(ends.places())
        with model.lingering():
            for number, (batch, some, tokens) in enumerate(places):
                labels = ends.flow.ids[batch][some, 1:][:, tokens]
                for place, states in ends.branches.items():
                    context.check_cancelled()
                    found = ends.predict(states, (batch, some, tokens))[:, : labels.shape[1]].flatten(0, 1)
                    sums[place] += float(functional.nll_loss(found, labels.flatten(), reduction="sum"))
                context.progress(number + 1, len(places), LOSSES)
    return [total / (rows.shape[0] * (rows.shape[1] - 1)) for total in sums]
