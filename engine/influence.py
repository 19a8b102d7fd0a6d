"""What each block of a model does to the text that flows through it, and what the model loses without it.

All weights must be in memory: a text flows through the whole model again and again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.flow import Args, Kwargs, batch_size, standing_in
from engine.methods import Context
from engine.models import LoadedModel, blocks


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
def states_between(model: LoadedModel, ids: Tensor) -> tuple[list[Tensor], bool]:
    """What enters each block and what leaves the last, (B, T, hidden) each; whether blocks return a tuple."""
    found: list[Tensor] = []
    tuples: list[bool] = []
    _, modules = blocks(model.network)

    def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        assert isinstance(states, Tensor)
        found.append(states)

    def leave(module: nn.Module, args: Args, output: object) -> None:
        tuples.append(isinstance(output, tuple))
        states = output[0] if isinstance(output, tuple) else output
        assert isinstance(states, Tensor)
        found.append(states)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(modules[-1].register_forward_hook(leave).remove)
        model.network.base_model(input_ids=ids, use_cache=False)
    return found, tuples[0]


def distances(model: LoadedModel, rows: Tensor, context: Context) -> Distances:
    """The distances that every run of blocks moves the states of rows (count, length) of token ids."""
    count = len(blocks(model.network)[1])
    cosines = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    angles = torch.zeros_like(cosines)
    tokens = 0
    parts = batches(rows)
    for number, ids in enumerate(parts):
        context.check_cancelled()
        found, _ = states_between(model, ids)
        units = [functional.normalize(states.flatten(0, 1).float(), dim=-1) for states in found]  # (tokens, hidden)
        for start, before in enumerate(units):
            for stop in range(start + 1, len(units)):
                cosine = (before * units[stop]).sum(-1).clamp(-1, 1)
                cosines[start, stop] += float(cosine.sum())
                angles[start, stop] += float(cosine.arccos().sum()) / torch.pi
        tokens += units[0].shape[0]
        context.progress(number + 1, len(parts), "batches")

    def runs(sums: Tensor) -> list[list[float]]:
        return [sums[start, start + 1 :].tolist() for start in range(count)]

    return Distances(runs(1 - cosines / tokens), runs(angles / tokens))


def losses_without(model: LoadedModel, rows: Tensor, runs: Sequence[range], context: Context) -> list[float]:
    """The mean negative log-likelihood (nats a token) of rows (count, length) without each run of blocks.

    An empty run leaves the model whole. What enters a run is what the blocks before it made of the text, once for all.
    """
    losses = [0.0] * len(runs)
    parts = batches(rows)
    for number, ids in enumerate(parts):
        entering, tuples = states_between(model, ids)
        for place, run in enumerate(runs):
            context.check_cancelled()
            losses[place] += _loss_from(model, ids, entering[run.start], run.stop, tuples)
            context.progress(number * len(runs) + place + 1, len(parts) * len(runs), "runs of blocks")
    return [loss / (rows.shape[0] * (rows.shape[1] - 1)) for loss in losses]


@torch.no_grad()
def _loss_from(model: LoadedModel, ids: Tensor, states: Tensor, first: int, tuples: bool) -> float:
    """The summed loss (nats) of ids (B, T) where `states` enter the block `first`, and no block before it computes."""

    def compute(originals: list[nn.Module], number: int, args: Args, kwargs: Kwargs) -> object:
        if number < first:
            return (states,) if tuples else states
        return originals[number](*args, **kwargs)

    originals: list[nn.Module] = []
    with standing_in(model, functools.partial(compute, originals)) as found:
        originals += found
        logits = model.network(input_ids=ids, use_cache=False).logits
    rows = zip(logits[:, :-1], ids[:, 1:], strict=True)
    return sum(float(functional.cross_entropy(row.float(), labels, reduction="sum")) for row, labels in rows)
