"""Remove whole blocks: those that change the text's states least, or that the model predicts best without.

- `influence`: 1 - the mean cosine of what enters and what leaves (ShortGPT, Men et al., 2024, arXiv 2403.03853).
- `angle`: the angle between the two (The Unreasonable Ineffectiveness of the Deeper Layers, Gromov et al., 2024,
  arXiv 2403.17887; there of contiguous blocks and of the last token, here of all tokens).
- `perplexity`: what the model predicts without them (Shortened LLaMA, Kim et al., 2024, arXiv 2402.02834); slower, one
  pass over the text for each block.
- `greedy`: as `perplexity`, but one goes at a time, and those that are left are judged anew (SLEB, Song et al., 2024,
  arXiv 2402.09025); as many times slower as blocks go.

Contiguous blocks are judged as one run. Free ones are judged one by one on the whole model, but for `greedy`, so that
blocks that each are dispensable may not be so together. A block that goes makes the model smaller and faster, on every
device, by what it was of the whole; the damage is large and wants repair by training after it (distillation with
student `current`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal, cast

from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from engine import fit, headers, influence, scores
from engine.calibration import token_rows
from engine.errors import BadParams
from engine.methods import Calibrated, Context, Survey
from engine.models import LoadedModel, blocks
from engine.sizes import attention_sizes, blocks_of, hidden_size, vocabulary_size
from engine.surgery import check_blocks, keep_blocks

TITLE = "Depth pruning"
CHANGES = ("disk", "memory", "latency")
UNITS = {
    "influence": "influence", "angle": "angle over pi", "perplexity": "loss in nats without it",
    "greedy": "loss in nats without it",
}  # fmt: skip
VERSION = 1  # of what is kept; raise it when the measuring changes


class Params(Calibrated):
    """Settings of depth pruning: how many blocks go, and how they are chosen."""

    share: float = Field(0.25, gt=0.0, lt=1.0, description="Share of the blocks that is removed.")
    count: int = Field(0, ge=0, le=1023, description="How many blocks are removed; 0: as `share` says.")
    by: Literal["influence", "angle", "perplexity", "greedy"] = Field(
        "influence", description="What speaks for a block: how far it moves the states, or the text's perplexity."
    )
    contiguous: bool = Field(False, description="Remove blocks that follow each other, judged as one run.")

    @model_validator(mode="after")
    def _free(self) -> Params:
        if self.contiguous and self.by == "greedy":
            raise ValueError("greedy lets blocks go one at a time, wherever they are. Use perplexity with contiguous")
        return self

    def removed(self, blocks: int) -> int:
        """How many of so many blocks go.

        Raises:
            BadParams: none, or all.
        """
        count = self.count or round(self.share * blocks)
        if blocks == 1:
            raise BadParams("a model of one block can lose none.")
        if count >= blocks:
            raise BadParams(f"all {blocks} blocks would be removed. Keep one at least: count {blocks - 1} or less.")
        if count == 0:
            raise BadParams(f"a share of {self.share:g} of {blocks} blocks is none. Set count, or a larger share.")
        return count

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse to remove none or all, and blocks that would compute otherwise in another place."""
        self.removed(attention_sizes(config)[0])
        check_blocks(config)

    def told_by_a_block(self) -> bool:
        """A model of one block can lose none."""
        return False

    def survey(self, shape: headers.Shape, width: int) -> Survey:
        """What enters each block and leaves the last; or, where losses judge, the text past each run of blocks."""
        total, hidden = blocks_of(shape.config), hidden_size(shape.config)
        if self.by not in ("perplexity", "greedy"):
            states = width * self.samples * self.sequence_length * hidden
            held = min(states, fit.HELD) + (total * states if states <= fit.HELD // total else 0)  # the others in files
            batch = (total + 1) * fit.FLOW_TOKENS * hidden * width
            return Survey(0.0, 0, held + batch + 12 * influence.COMPARED, {})
        runs = total if self.by == "greedy" else total - self.removed(total) + 1
        reading = fit.branching(shape, width, self.samples, self.sequence_length, runs)
        return Survey(self._losses(shape), 0, reading, {})

    def _losses(self, shape: headers.Shape) -> float:
        """Operations for the losses: for each run of blocks the text through those behind it, and the head."""
        total = blocks_of(shape.config)
        count = self.removed(total)
        block = sum(outputs * inputs for outputs, inputs in shape.linears.values()) / total
        head = vocabulary_size(shape) * hidden_size(shape.config)
        left = [total - gone for gone in range(count)] if self.by == "greedy" else [total]
        span = count if self.contiguous else 1
        behind = [blocks - start - span for blocks in left for start in range(blocks - span + 1)]
        tokens = self.samples * self.sequence_length
        return 2.0 * tokens * sum(number * block + head for number in behind)

    def reshaped(
        self, config: dict[str, JsonValue], tensors: headers.Tensors
    ) -> tuple[dict[str, JsonValue], headers.Tensors]:
        """Fewer blocks; which, is not known yet."""
        total = attention_sizes(config)[0]
        return headers.fewer_blocks(config, tensors, total - self.removed(total))


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Judge the blocks, or read what was judged before, and keep the others."""
    total = len(blocks(model.network)[1])
    count = params.removed(total)
    rows = token_rows(model.tokenizer, context.calibration, params.sequence_length, params.samples).to(model.device)
    context.log(f"calibrating on {rows.shape[0]} sequences of {rows.shape[1]} tokens")
    left = list(range(total))
    for each in [1] * count if params.by == "greedy" else [count]:
        left = without(model, left, each, rows, params, context)
    return keep_blocks(model, left)


def without(
    model: LoadedModel, left: list[int], count: int, rows: Tensor, params: Params, context: Context
) -> list[int]:  # fmt: skip
    """The numbers of the blocks that stay of those that are `left` when `count` more go."""
    span = count if params.contiguous else 1
    runs = [range(start, start + span) for start in range(len(left) - span + 1)]
    whole = len(left) == len(blocks(model.network)[1])
    costs = judge(model if whole else keep_blocks(model, left), rows, runs, params, context)
    gone, unit = choose(runs, costs, count), UNITS[params.by]
    for run, cost in zip(runs, costs, strict=True):
        first, last = left[run.start], left[run.stop - 1]
        about = f"block {first}" if span == 1 else f"blocks {first} to {last}"
        context.log(f"{about}: {unit} {cost:.4g}{', removed' if set(run) <= set(gone) else ''}")
    return [number for place, number in enumerate(left) if place not in gone]


def judge(
    model: LoadedModel, rows: Tensor, runs: Sequence[range], params: Params, context: Context
) -> list[float]:  # fmt: skip
    """What each run of blocks is worth; other shares find the distances, and the losses of equally long runs, kept."""
    about: dict[str, JsonValue] = {
        "version": VERSION, "samples": params.samples, "sequence_length": params.sequence_length,
    }  # fmt: skip
    if params.by in ("perplexity", "greedy"):
        about |= {"span": len(runs[0])}
        found = scores.measured(
            model, context, "losses without blocks", about,
            lambda _: list[JsonValue](influence.losses_without(model, rows, runs, context)),
        )  # fmt: skip
        return cast(list[float], found)
    found = scores.measured(
        model, context, "distances of blocks", about, lambda _: asdict(influence.distances(model, rows, context))
    )
    kept = influence.Distances(**cast(dict[str, list[list[float]]], found))
    table = kept.cosine if params.by == "influence" else kept.angle
    return [table[run.start][len(run) - 1] for run in runs]


def choose(runs: Sequence[range], costs: Sequence[float], count: int) -> list[int]:
    """The numbers of the `count` blocks in the cheapest runs; of equal ones the first."""
    order = sorted(range(len(runs)), key=costs.__getitem__)
    needed = count // len(runs[0])
    return sorted(number for place in order[:needed] for number in runs[place])
