"""Pruning that trains: the model learns on while its weights go, so that the others make up for them."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, model_validator
from torch import Tensor

from engine import rescue
from engine.lesson import Lesson, TrainingParams, judge_of, read
from engine.losses import Objective
from engine.methods import Context
from engine.models import LoadedModel, blocks, linears
from engine.observing import BlockLinear
from engine.prune._masks import SparsityParams, note_pruned
from engine.sparsity import by_magnitude
from engine.training import Prune

LABELS = Objective(label_weight=1.0)  # no teacher


class RetrainParams(SparsityParams, TrainingParams):
    """Settings of a pruning with training: how sparse, and how long, fast and on what it trains."""

    steps: int = Field(300, ge=2, le=1_000_000, description="Optimizer steps.")

    def cut(self) -> int:
        """After how many steps the last weights go."""
        return self.steps

    @model_validator(mode="after")
    def _ends_sparse(self) -> RetrainParams:
        end = rescue.end(rescue.read(self.learning_rate_factors), self.steps)
        if end < self.cut():
            raise ValueError(f"the training cannot end after step {end}: its last weights go after step {self.cut()}")
        return self


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
    text = read(model, params, params.file())
    lesson = Lesson(model, text, LABELS, None, judge_of(model, text, context))
    now = 0

    def begin(step: int) -> None:
        nonlocal now
        now = step

    def loss_of(numbers: Tensor) -> Tensor:
        loss, price = lesson.batch_loss(numbers), penalty(now)
        return loss if price is None else loss + price

    lesson.teach(params, context, loss_of, begin=begin, prune=prune)
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
        keep = by_magnitude(linear.weight, params.sparsity, params.pattern)
        linear.weight.masked_fill_(~keep, 0)
