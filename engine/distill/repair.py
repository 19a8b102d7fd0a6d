"""Heal the model that earlier steps pruned or quantized: train it to predict as the original does.

Logit distillation of the model as it is, from the original (with more `teachers` from the mean of their probabilities),
with three choices of what may change:

- `all`: every weight; zeros of pruned linears stay zero.
- `lora`: for each linear of the blocks a product of two thin matrices is learned beside it, W + B A (LoRA, Hu et al.,
  2021, arXiv 2106.09685), and merged at the end, masked where zeros must stay.
- `norms and scales`: the weights of norms, all biases but the head's, and of quantized linears in the blocks the
  scales.

`all` heals most and holds an optimizer state for everything; `lora` trains far less, of 4,096 by 4,096 weights a 256th
at rank 8. All three may follow quantization, but not a library's (`quantize/bitsandbytes`), and what comes out has the
same grids but for their scales: `norms and scales` never touches an integer code, w = (code - zero) * scale, where the
gradient goes to the scale. `all` and `lora` are quantization-aware training (as LLM-QAT, Liu et al., 2023, arXiv
2305.17888): the quantized linears of the blocks learn weights that are rounded to the grid for every product, and its
scales; head and embeddings that are quantized stay as they are. Rounding, also of inputs, is passed over by the
gradient (straight-through, Bengio et al., 2013, arXiv 1308.3432).

The adapters are written here: `peft` would be one more package for these few lines. Needs training text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from engine.distill._added import Added, adapters, codes, scales, shifts
from engine.distill._settings import NOTHING_TO_HEAL, CacheParams
from engine.distill._teachers import teachers_of
from engine.fields import With
from engine.headers import Shape
from engine.lesson import Lesson, TrainingParams, read
from engine.methods import Context
from engine.models import LoadedModel
from engine.teachers import shared_vocabulary

TITLE = "Self-repair"
CHANGES = ()
Scope = Literal["all", "lora", "norms and scales"]


class Params(TrainingParams, CacheParams):
    """Settings of what may change, the loss and the training."""

    scope: Scope = Field("all", description="What may change: every weight, low-rank additions, or norms and scales.")
    rank: Annotated[int, With("scope", "lora")] = Field(
        8, ge=1, le=512, description="With scope `lora`: rank of what is added to each linear."
    )
    label_weight: float = Field(0.0, ge=0.0, le=1.0, description="Weight of the true labels beside the teacher.")
    steps: int = Field(100, ge=1, le=1_000_000, description="Optimizer steps.")

    def usual_rate(self, parameters: int) -> float:
        """Ten times as high where little is trained, as is usual for LoRA."""
        return super().usual_rate(parameters) if self.scope == "all" else super().usual_rate(parameters // 100)

    def notes_at_first(self, shape: Shape) -> Sequence[str]:
        """Say that there is nothing to heal, where nobody else teaches the model."""
        own = [] if self.others() else [NOTHING_TO_HEAL]
        return [*super().notes_at_first(shape), *own]

    def processes(self) -> int:
        """Each needs a row of the batch; what is learned beside the network is not in shards."""
        return self.batch if self.scope == "all" else 1

    def keeps_grids(self) -> bool:
        """Codes are learned as such, or stay."""
        return True


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train what may change, and put it in its place."""
    model.load_all()
    folders = params.folders(model.source)
    text = read(model, params, params.file())
    shared = shared_vocabulary(folders, model.network.config.get_text_config().vocab_size)
    teacher, judge = teachers_of(text, folders, model, params, context, shared)
    torch.manual_seed(context.seed)
    added, trainable = learned(model, params)
    beside = {f"{name}:{key}": value for name, each in added.items() for key, value in each.named_parameters()}
    trained = sum(value.numel() for value in beside.values())
    kept = dict(model.network.named_parameters())
    trained += sum(kept[name].numel() for name in (kept if trainable is None else trainable))
    context.log(f"{trained:,} numbers are trained; the model has {model.network.num_parameters():,} parameters")
    for each in added.values():
        each.attach()
    try:
        lesson = Lesson(model, text, params.objective, teacher, judge)
        lesson.teach(params, context, beside=beside, trainable=trainable)
    finally:
        for each in added.values():
            each.detach()
    with torch.no_grad():
        for name, each in added.items():
            each.merge(model, name)
    return model


def learned(model: LoadedModel, params: Params) -> tuple[Mapping[str, Added], list[str] | None]:
    """What is learned beside the network, by names of its modules, and which of its parameters are; None: all."""
    if params.scope == "lora":
        return adapters(model, params.rank), []
    if params.scope == "norms and scales":
        return {**scales(model), **shifts(model)}, []
    if not model.quantized:
        return {}, None
    fixed = {f"{name}.weight" for name in model.quantized}
    return codes(model), [name for name, _ in model.network.named_parameters() if name not in fixed]
