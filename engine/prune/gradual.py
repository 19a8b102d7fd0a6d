"""Set ever more of the smallest weights to zero while the model trains on: fast at first, then slower and slower.

Gradual magnitude pruning (Zhu & Gupta, 2017, "To prune, or not to prune", arXiv 1710.01878). After step t the sparsity
of each linear is

    s(t) = sparsity * (1 - (1 - t / T)³)    every `every` steps until T = `ramp` of all steps

for early on there is much to spare and time to recover. What is left of the steps heals at the full sparsity. Trains on
the text's true labels; put a repair or a distillation behind it to learn from the original. Weights that are zero stay
zero. With a pattern N:M the whole pattern is cut at T, before that the same share without one.

For high sparsities, which break a model that does not train on. The zeros stay dense in memory, and in the file unless
`storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.fields import RARE
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune._retrain import RetrainParams, retrain, selected, zero_smallest_

TITLE = "Gradual magnitude pruning"
CHANGES = ()


class Params(RetrainParams):
    """Settings of the schedule and the training."""

    every: Annotated[int, RARE] = Field(10, ge=1, le=10_000, description="Steps between two cuts.")
    ramp: Annotated[float, RARE] = Field(
        0.7, gt=0.0, le=1.0, description="Share of the steps after which the full sparsity is reached."
    )

    def cut(self) -> int:
        """At the end of the ramp."""
        return max(1, round(self.ramp * self.steps))


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train the model and cut after each `every` steps."""
    model.load_all()
    chosen = selected(model, params)
    last = params.cut()

    def prune(step: int) -> None:
        if step == last:
            zero_smallest_(chosen, params)
        elif step < last and step % params.every == 0:
            now = sparsity_at(step / last, params)
            zero_smallest_(chosen, params.model_copy(update={"sparsity": now, "pattern": "unstructured"}))
            context.sample("sparsity", now, "1")

    return retrain(model, params, context, prune)


def sparsity_at(done: float, params: Params) -> float:
    """The share of zeros at a point between 0 and 1 of the ramp."""
    final = 0.5 if params.pattern != "unstructured" else params.sparsity
    return final * (1 - (1 - done) ** 3)
