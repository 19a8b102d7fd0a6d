"""Pruning that trains: the model learns on while its weights go, so that the others make up for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from engine.calibration import BlockLinear, token_rows
from engine.methods import Context
from engine.models import LoadedModel, blocks, linears
from engine.preflight import calibration_file
from engine.prune._masks import SparsityParams, keep_largest, note_pruned
from engine.training import Extras, Prune, Schedule, train


class RetrainParams(SparsityParams):
    """Settings of a pruning with training: how sparse, and how long, fast and on what it trains."""

    steps: int = Field(300, ge=2, le=1_000_000, description="Optimizer steps.")
    batch: int = Field(16, ge=1, le=1024, description="Sequences in each step.")
    sequence_length: int = Field(128, ge=8, le=8192, description="Tokens of each sequence.")
    learning_rate: float = Field(1e-3, gt=0.0, le=1e10, description="Highest learning rate.")
    text: str = Field("demo", description="Training text: `demo`, or a text or JSONL file.")


def retrain(
    model: LoadedModel,
    params: RetrainParams,
    context: Context,
    prune: Prune,
    penalty: Callable[[int], Tensor | None] = lambda step: None,
) -> LoadedModel:
    """Train the model on its true labels with the `penalty` of each step beside the loss, and `prune` after it.

    Zeros stay zero: of the selected linears from the beginning.
    """
    rows = token_rows(model.tokenizer, calibration_file(params.text), params.sequence_length)
    now = 0

    def begin(step: int) -> None:
        nonlocal now
        now = step

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = model.network(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, -2).float(), batch[:, 1:].flatten())
        price = penalty(now)
        return loss if price is None else loss + price

    schedule = Schedule(params.steps, params.batch, params.learning_rate)
    train(model, rows, loss_of, schedule, context, prune, Extras(begin=begin))
    return model


def selected(model: LoadedModel, params: RetrainParams) -> list[BlockLinear]:
    """The linears of all blocks that the settings select; all their zeros count as pruned from now on."""
    prefix, modules = blocks(model.network)
    named = [
        BlockLinear(f"{prefix}.{number}.{path}", linear)
        for number, block in enumerate(modules)
        for path, linear in linears(block)
    ]
    chosen = [linear for linear in named if params.selects(linear.name)]
    for linear in chosen:
        note_pruned(model, linear.name, params)
    return chosen


def zero_smallest_(chosen: list[BlockLinear], params: SparsityParams) -> None:
    """Set the weights of smallest magnitude of each linear to zero."""
    for linear in chosen:
        keep = keep_largest(linear.weight.abs(), params, linear.name, by_row=False)
        linear.weight.masked_fill_(~keep, 0)
