"""Branches off a text's way through a model's blocks, with one block in memory at a time.

A branch leaves the model's own hidden states at some block and goes its own way from there: through a block that is
changed, or past one. Block after block computes what becomes of every branch that has left, and of the model's own
states: a block is read once for all of them, and what stands before a branch is computed once. As many branches are
followed at a time as `HELD` bytes of states allow, those of some blocks: a wave.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from engine.fit import HELD, PREDICTED
from engine.flow import Call, Flow, batch_size, behind, capture, run_block
from engine.methods import Context
from engine.models import LoadedModel, blocks, head

PASSES = "passes of blocks"  # unit of progress
Branch = TypeVar("Branch", bound=Hashable)
Stream = list[Tensor]  # hidden states (B, T, hidden), batch by batch
Go = Callable[[Stream], Stream]  # a block
Way = Callable[[Branch, int, Stream, Go], Stream]
Place = tuple[int, slice, slice]  # a batch, some of its rows, some tokens


@dataclass(frozen=True)
class Ends(Generic[Branch]):
    """What reaches the end of the blocks: the model's own states, and those of the branches of one wave."""

    model: LoadedModel
    flow: Flow
    own: Stream
    branches: dict[Branch, Stream]

    def places(self) -> Iterator[Place]:
        """All tokens in pieces of `PREDICTED` logits, rows or parts of one: behind blocks no token heeds another."""
        most = max(1, PREDICTED // self.model.network.config.get_text_config().vocab_size)
        for batch, ids in enumerate(self.flow.ids):
            count, length = ids.shape
            rows, tokens = max(1, most // length), min(most, length)
            for row, start in itertools.product(range(0, count, rows), range(0, length, tokens)):
                yield batch, slice(row, row + rows), slice(start, start + tokens)

    def predict(self, states: Stream, place: Place) -> Tensor:
        """The log-probabilities (rows, tokens, vocabulary) that the model makes of states at a place, in float32."""
        batch, *here = place
        ids, found = self.flow.ids[batch][*here], states[batch][*here]
        logits: Tensor = behind(self.model, self.model.network, ids, found, self.flow.tuples).logits
        return logits.float().log_softmax(-1)


@torch.no_grad()
def follow(
    model: LoadedModel, rows: Tensor, leaving: Sequence[Sequence[Branch]], way: Way[Branch], context: Context
) -> Iterator[Ends[Branch]]:  # fmt: skip
    """Let a text and its branches pass all blocks; what reaches the end, wave by wave.

    rows: token ids (count, T). leaving: the branches that leave at each block, and behind the last. way: what becomes
    of a branch's states, as they enter the block of that number, by what the block makes of states.
    """
    prefix, modules = blocks(model.network)
    stations = [*(f"{prefix}.{number}" for number in range(len(modules))), head(model.network)[0]]
    flow = capture(model, torch.split(rows, batch_size(rows.shape[1])), context.folder / "branches")
    own = [flow.states[batch] for batch in range(len(flow.states))]
    flow.states.close()
    counts = list(map(len, leaving))
    waves = _waves(counts, max(1, HELD // sum(states.nbytes for states in own)))
    done, passes = 0, passes_of(counts) + sum(len(modules) - wave.start for wave in waves)
    context.progress(0, passes, PASSES)
    for wave in waves:
        entered, branches = own, dict[Branch, Stream]()
        for number, module in list(enumerate(modules))[wave.start :]:
            go = partial(_passed, module, flow.calls[number])
            with model.opened(stations[number]):
                model.prefetch(stations[number + 1])
                branches |= dict.fromkeys(leaving[number] if number in wave else (), entered)
                for branch, states in branches.items():
                    context.check_cancelled()
                    branches[branch] = way(branch, number, states, go)
                entered = go(entered)
            done += len(branches) + 1
            context.progress(done, passes, PASSES)
            if number + 1 == wave.stop:
                own = entered  # what enters the next wave
        behind_all = leaving[-1] if len(modules) in wave else ()
        yield Ends(model, flow, entered, branches | dict.fromkeys(behind_all, entered))


def _passed(module: nn.Module, calls: Sequence[Call], states: Stream) -> Stream:
    """What a block makes of states."""
    return [run_block(module, batch, call) for batch, call in zip(states, calls, strict=True)]


def passes_of(leaving: Sequence[int]) -> int:
    """Blocks that so many branches meet, which leave at each block and behind the last."""
    return sum((len(leaving) - 1 - number) * count for number, count in enumerate(leaving))


def _waves(counts: Sequence[int], most: int) -> list[range]:
    """Blocks in rows with at most so many branches together, where one alone has no more; none left out."""
    found, start, held = list[range](), 0, 0
    for number, count in enumerate(counts):
        if held and count and held + count > most:
            found.append(range(start, number))
            start, held = number, 0
        held += count
    return [*found, range(start, len(counts))]
