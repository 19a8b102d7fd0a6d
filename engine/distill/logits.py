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
trained first, each by the one before it, and the last one teaches the student. Needs training text.

With several GPUs a process on each takes its share of every batch and holds its shard of the student (FSDP).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, JsonValue, model_validator

from engine import artifacts, distributed, headers
from engine.distill._settings import CacheParams, StudentParams
from engine.distill._student import assistants, choose, of_size, spread
from engine.distill._teachers import beneath, teachers_of
from engine.lesson import Lesson, TrainingParams, read
from engine.methods import Context
from engine.models import LoadedModel
from engine.preflight import calibration_file
from engine.records import Recipe
from engine.sizes import attention_sizes, hidden_size
from engine.surgery import keep_blocks
from engine.teachers import shared_vocabulary

TITLE = "Logit distillation"
CHANGES = ("disk", "memory", "latency")
WHOLE = True


class Params(TrainingParams, CacheParams, StudentParams):
    """Settings of the student, the loss and the training."""

    assistants: int = Field(
        0,
        ge=0,
        le=4,
        description="Models of sizes in between that are taught first, the last one teaching the student.",
    )

    def processes(self) -> int:
        """Each needs a row of the batch."""
        return self.batch

    def trained(
        self, config: dict[str, JsonValue], tensors: headers.Tensors
    ) -> Sequence[tuple[dict[str, JsonValue], headers.Tensors]]:
        """The assistants, then the student."""
        found = []
        if self.assistants:
            width, (depth, _, head) = hidden_size(config), attention_sizes(config)
            for wide, deep in assistants(width, depth, head, self, self.assistants):
                if self.student == "blocks":
                    found.append(headers.fewer_blocks(config, tensors, deep))
                else:
                    between = self.model_copy(update={"hidden_size": wide, "num_blocks": deep})
                    found.append(between.reshaped(config, tensors))
        return [*found, self.reshaped(config, tensors)]

    @model_validator(mode="after")
    def _sizes(self) -> Params:
        if self.assistants and self.student not in ("blocks", "size"):
            raise ValueError("assistants need a student of `blocks` or `size`, between which and the model sizes lie")
        return self


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train the assistants, where any are wanted, and the student."""
    folders = params.folders(model.source)
    if params.assistants:
        text = model.network.config.get_text_config()
        width, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sizes = assistants(width, text.num_hidden_layers, head, params, params.assistants)
        if len(sizes) < params.assistants:
            context.log(f"warning: only {len(sizes)} sizes lie between the model and the student")
        for number, (width, depth) in enumerate(sizes, 1):
            context.log(f"assistant {number} of {len(sizes)}: {depth} blocks of {width}")
            phase = beneath(context, f"assistant-{number}")
            folders = [_assistant(model, width, depth, folders, params, phase)]
    return _taught(model, params, folders, context)


def _assistant(
    model: LoadedModel, width: int, depth: int, folders: list[Path], params: Params, context: Context
) -> Path:
    """The folder of a trained assistant; a finished one is found again."""
    folder = context.folder / "model"
    if folder.exists():
        context.log("this assistant is finished")
        return folder
    text = model.network.config.get_text_config()
    if width == text.hidden_size and params.student == "blocks":
        assistant = keep_blocks(model, spread(text.num_hidden_layers, depth))
    else:
        assistant = of_size(model, width, depth, context.seed)
    _learn(assistant, model, params, folders, context)
    if distributed.rank() == 0:
        artifacts.write(assistant, Recipe.model_validate({}), folder)
    distributed.wait()
    return folder


def _taught(model: LoadedModel, params: Params, folders: list[Path], context: Context) -> LoadedModel:
    student = choose(model, params, context)
    _learn(student, model, params, folders, context)
    return student


def _learn(student: LoadedModel, model: LoadedModel, params: Params, folders: list[Path], context: Context) -> None:
    text = read(model, params, calibration_file(params.text))
    shared = shared_vocabulary(folders, student.network.config.get_text_config().vocab_size)
    teacher, judge = teachers_of(text, folders, model, params, context, shared)
    Lesson(student, text, params.objective, teacher, judge).teach(params, context)
