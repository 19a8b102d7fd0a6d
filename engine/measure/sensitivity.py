"""How much each block of a model can bear: what speaks for removing it, pruning it, or giving it few bits.

One pass over calibration text for the distances between blocks and for what leaves each when it is damaged; the
perplexity without a block takes the blocks after it only, for what enters it is known. One Measurement, whose details
hold the table:

    blocks: a row for each block, in order
        block            its number, from 0
        influence        1 - mean cosine of what enters and leaves it (ShortGPT, arXiv 2403.03853)
        angle            the angle between the two over pi (arXiv 2403.17887)
        perplexity       of the calibration text without the block (arXiv 2402.02834)
        error_half       relative error of its output when its linears lose half of their weights by Wanda
        error_3_bits     the same when they are rounded to the nearest of 3 bits in groups
    perplexity           of the calibration text, whole
    tokens, protocol     on what was measured

Errors are relative to what the block adds to its input. The value is the smallest perplexity without a block over that
of the whole model: near 1, depth can go.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import JsonValue
from torch import Tensor

from engine import influence
from engine.calibration import token_rows, walk_blocks
from engine.flow import run_block
from engine.methods import Calibrated, Context
from engine.models import LoadedModel, blocks
from engine.observing import Block, BlockLinear
from engine.preflight import SENSED
from engine.records import Measurement

ROWS, LENGTH = 16, SENSED  # sequences and their tokens
BITS = 3
GROUPS = (128, 64, 32)  # weights that share a scale: the first that divides a row


def measure(model: LoadedModel, context: Context) -> Measurement:
    """The sensitivity of every block, measured on calibration text; weights must be dense and in memory.

    Raises:
        BadText: the calibration text is shorter than a sequence.
    """
    rows = token_rows(model.tokenizer, context.calibration, LENGTH, ROWS).to(model.device)
    count = len(blocks(model.network)[1])
    moved = influence.distances(model, rows, context)
    runs = [range(0), *(range(number, number + 1) for number in range(count))]
    whole, *without = (math.exp(min(loss, 700.0)) for loss in influence.losses_without(model, rows, runs, context))
    table: list[JsonValue] = []
    params = Calibrated(samples=ROWS, sequence_length=LENGTH)
    for block in walk_blocks(model, context, params, "norm", keep_blocks=False):
        halved, rounded = errors(block, half_by_wanda), errors(block, to_few_bits)
        table.append(
            {
                "block": block.number,
                "influence": moved.cosine[block.number][0],
                "angle": moved.angle[block.number][0],
                "perplexity": without[block.number],
                "error_half": halved,
                "error_3_bits": rounded,
            }
        )
    details: dict[str, JsonValue] = {
        "protocol": f"{rows.shape[0]} sequences of {LENGTH} tokens of the calibration text, one block at a time",
        "tokens": rows.numel(), "perplexity": whole, "blocks": table,
    }  # fmt: skip
    return Measurement(name="sensitivity", value=min(without) / whole, unit="1", details=details)


@torch.no_grad()
def errors(block: Block, damage: Callable[[BlockLinear], Tensor]) -> float:
    """How far a block's outputs move, relative to what it adds, with all its linears damaged; they come back whole."""
    before = [run_block(block.module, states, call) for states, call in block.batches]
    kept = [linear.weight.clone() for linear in block.linears]
    for linear in block.linears:
        linear.weight.copy_(damage(linear))
    moved = added = 0.0
    try:
        for (states, call), old in zip(block.batches, before, strict=True):
            moved += float((run_block(block.module, states, call).float() - old.float()).square().sum())
            added += float((old.float() - states.float()).square().sum())
    finally:
        for linear, weight in zip(block.linears, kept, strict=True):
            linear.weight.copy_(weight)
    return math.sqrt(moved / max(added, 1e-30))


def half_by_wanda(linear: BlockLinear) -> Tensor:
    """The weight (N, K) without the half of each row whose |weight| x input norm is smallest."""
    score = linear.weight.float().abs()
    if linear.input_norm is not None:  # else an expert that no token reached
        score = score * linear.input_norm
    smallest = torch.argsort(score, dim=1, stable=True)[:, : round(0.5 * score.shape[1])]
    return linear.weight.scatter(1, smallest, 0.0)


def to_few_bits(linear: BlockLinear) -> Tensor:
    """The weight (N, K) rounded to the nearest level of symmetric grids of `BITS` bits."""
    rows, columns = linear.weight.shape
    size = next((size for size in GROUPS if columns % size == 0), columns)
    groups = linear.weight.float().reshape(rows, -1, size)  # (N, groups, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (BITS - 1) - 0.5)
    codes = torch.round(groups / scale).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
    rounded: Tensor = codes * scale
    return rounded.reshape(rows, columns)
