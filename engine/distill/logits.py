"""Train a smaller student to predict as the model does: softened logits and true labels.

Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531). With z the teacher's and y the student's
logits, the loss of each token is

    (1 - label_weight) * T² * KL(softmax(z / T) || softmax(y / T)) + label_weight * CE(label, softmax(y))

T² keeps the gradient's size when T changes. The student is every k-th block of the model (DistilBERT's
way, the best start), a new network of a given size, or the model as earlier steps left it, to repair
what pruning broke. The teacher is always the original model of the recipe. Needs training text.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from engine.calibration import token_rows
from engine.distill._student import every_kth, of_size
from engine.methods import Context
from engine.methods import Params as Base
from engine.models import LoadedModel, load
from engine.preflight import calibration_file
from engine.training import Schedule, train

TITLE = "Logit distillation"
CHANGES = ("disk", "memory", "latency")
WHOLE = True


class Params(Base):
    """Settings of the student, the loss and the training."""

    student: Literal["blocks", "size", "current"] = Field(
        "blocks", description="Every k-th block of the model, a new network of a given size, or the model as it is."
    )
    keep_every: int = Field(2, ge=1, le=64, description="With student `blocks`: keep every k-th block.")
    hidden_size: int = Field(128, ge=8, le=16384, description="With student `size`: width of the new network.")
    num_blocks: int = Field(2, ge=1, le=256, description="With student `size`: blocks of the new network.")
    temperature: float = Field(1.0, ge=0.1, le=100.0, description="Softens both distributions; 1 changes nothing.")
    label_weight: float = Field(0.5, ge=0.0, le=1.0, description="Weight of the true labels beside the teacher.")
    steps: int = Field(300, ge=1, le=1_000_000, description="Optimizer steps.")
    batch: int = Field(16, ge=1, le=1024, description="Sequences in each step.")
    sequence_length: int = Field(128, ge=8, le=8192, description="Tokens of each sequence.")
    learning_rate: float = Field(1e-3, gt=0.0, le=1e10, description="Highest learning rate.")
    text: str = Field("demo", description="Training text: `demo`, or a text or JSONL file.")


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Build the student and train it; the teacher is loaded from the recipe's model."""
    rows = token_rows(model.tokenizer, calibration_file(params.text), params.sequence_length)
    model.load_all()
    teacher = load(model.source, str(model.network.dtype).removeprefix("torch."), str(model.device)).network
    if params.student == "blocks":
        student = every_kth(model, params.keep_every)
    elif params.student == "size":
        student = of_size(model, params.hidden_size, params.num_blocks, context.seed)
    else:
        student = model
    context.log(f"{student.network.num_parameters():,} of {model.network.num_parameters():,} parameters")

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = student.network(input_ids=batch).logits[:, :-1]
        wanted = None
        if params.label_weight < 1:
            with torch.inference_mode():
                wanted = teacher(input_ids=batch).logits[:, :-1]
        return distillation_loss(logits, wanted, batch[:, 1:], params.temperature, params.label_weight)

    train(student, rows, loss_of, Schedule(params.steps, params.batch, params.learning_rate), context)
    return student


def distillation_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, label_weight: float
) -> Tensor:
    """Mean loss over all tokens, in nats.

    student, teacher: logits (..., V); labels: token ids (...). `teacher` may be None with label_weight 1.
    """
    loss = student.new_zeros((), dtype=torch.float32)
    if label_weight > 0:
        loss = loss + label_weight * functional.cross_entropy(student.flatten(0, -2).float(), labels.flatten())
    if teacher is not None:
        ours = functional.log_softmax(student.flatten(0, -2).float() / temperature, -1)
        theirs = functional.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
        divergence = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        loss = loss + (1 - label_weight) * temperature**2 * divergence
    return loss
