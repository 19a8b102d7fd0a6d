"""Train a smaller student to predict as the model does: softened logits and true labels.

Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531). With z the teacher's and y the student's
logits, the loss of each token is

    (1 - label_weight) * T² * KL(softmax(z / T) || softmax(y / T)) + label_weight * CE(label, softmax(y))

T² keeps the gradient's size when T changes. `divergence` takes reverse KL (MiniLLM, Gu et al., 2023, arXiv
2306.08543) or the Jensen-Shannon divergence (GKD, Agarwal et al., 2023, arXiv 2306.13649) instead. The student is
every k-th block of the model (DistilBERT's way, the best start), a new network of a given size, a checkpoint with the
same tokenizer, or the model as earlier steps left it, to repair what pruning broke.

The teacher is the original model of the recipe; with more `teachers` it is the mean of their probabilities. It is
asked once: its `top_k` answers and the mass of the rest go to disk, and it is not in memory while the student trains;
runs on the same text find them there. With `live` it stays in memory and all its probabilities count.

Where the student is far smaller, `assistants` (Mirzadeh et al., 2019, arXiv 1902.03393) of sizes in between are
trained first, each by the one before it, and the last one teaches the student. Beside a student that is there already,
pruned by earlier steps or a checkpoint, they are cut from the original: some of its blocks, evenly spread, and the
neurons, heads and channels that matter most by activation. Needs training text.

With several GPUs a process on each takes its share of every batch and holds its shard of the student (FSDP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue

from engine import artifacts, distributed, hardware, headers
from engine.checkpoint import read_config
from engine.distill._assistants import Size, make, shaped, sizes
from engine.distill._settings import CacheParams, StudentParams
from engine.distill._student import choose
from engine.distill._teachers import beneath, teachers_of
from engine.fields import RARE
from engine.lesson import Lesson, TrainingParams, read
from engine.methods import Context
from engine.models import LoadedModel, is_large
from engine.records import EventKind, Recipe
from engine.teachers import shared_vocabulary

TITLE = "Logit distillation"
CHANGES = ("disk", "memory", "latency")


class Params(TrainingParams, CacheParams, StudentParams):
    """Settings of the student, the loss and the training."""

    assistants: Annotated[int, RARE] = Field(
        0,
        ge=0,
        le=4,
        description="Models of sizes in between that are taught first, the last one teaching the student.",
    )

    def trained(
        self, config: dict[str, JsonValue], tensors: headers.Tensors, original: headers.Shape
    ) -> Sequence[tuple[dict[str, JsonValue], headers.Tensors]]:
        """The assistants, then the student."""
        between = sizes(config, original.config, self, self.assistants)
        found = [shaped(size, config, tensors, original, self) for size in between]
        return [*found, self.reshaped(config, tensors)]

    def notes(self, shape: headers.Shape, device: str) -> Sequence[str]:
        """Say where there are fewer sizes than assistants; of what earlier steps leave it is known after them."""
        found = list(super().notes(shape, device))
        if self.student != "current":
            count = len(sizes(shape.config, shape.config, self, self.assistants))
            if count < self.assistants:
                found.append(f"Of {self.assistants} assistants {count} are taught: no more sizes lie between.")
        return found


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train the assistants, where any are wanted, and the student."""
    folders = params.folders(model.source)
    if params.assistants:
        config = model.network.config.get_text_config().to_dict()
        between = sizes(config, read_config(model.source).to_dict(), params, params.assistants)
        if len(between) < params.assistants:
            context.log(f"warning: only {len(between)} sizes lie between the model and the student")
        for number, size in enumerate(between, 1):
            context.log(f"assistant {number} of {len(between)}: {size.blocks} blocks of {size.width}")
            folders = [_assistant(model, size, folders, params, beneath(context, f"assistant-{number}"))]
    return _taught(model, params, folders, context)


def _assistant(model: LoadedModel, size: Size, folders: list[Path], params: Params, context: Context) -> Path:
    """The folder of a trained assistant; a finished one is found again."""
    folder = context.folder / "model"
    if folder.exists():
        context.log("this assistant is finished")
        return folder
    text = replace(context, calibration=params.file())
    assistant = make(model, size, params, params.sequence_length, text)
    hardware.give_back_memory(collect=is_large(assistant.network))  # of what it was cut from
    context.log(f"{assistant.network.num_parameters():,} parameters")
    alone = params.model_copy(update={"learning_rate_factors": ""})  # which are the student's
    _learn(assistant, model, alone, folders, replace(context, emit=partial(_of_assistant, context)))
    if distributed.rank() == 0:
        artifacts.write(assistant, Recipe.model_validate({}), folder)
    distributed.wait()
    return folder


def _of_assistant(context: Context, kind: EventKind, data: dict[str, JsonValue]) -> None:
    """No run goes on at a rate of one assistant's own: its divergence is a failure and nothing more."""
    if kind != "diverged":
        context.emit(kind, data)


def _taught(model: LoadedModel, params: Params, folders: list[Path], context: Context) -> LoadedModel:
    student = choose(model, params, context)
    _learn(student, model, params, folders, context)
    return student


def _learn(student: LoadedModel, model: LoadedModel, params: Params, folders: list[Path], context: Context) -> None:
    text = read(model, params, params.file())
    shared = shared_vocabulary(folders, student.network.config.get_text_config().vocab_size)
    teacher, judge = teachers_of(text, folders, model, params, context, shared)
    Lesson(student, text, params.objective, teacher, judge).teach(params, context)
