"""A model, what it learns from and who teaches it, put together: the loss of a batch, the held-out KL, the training.

Methods of distillation are lessons of a student; pruning that trains is one without a teacher.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

from engine import rescue
from engine.body import Body
from engine.closed_forms import closed_forms, short_attention
from engine.errors import BadModel
from engine.fields import RARE
from engine.losses import Objective, chunk_size, chunked, pieces
from engine.methods import Context, Params
from engine.models import LoadedModel
from engine.places import text_file, whole
from engine.preflight import check_text
from engine.rows import MOST_HELD, Rows, packed_rows
from engine.teachers import Answers, Question, Teacher, cached, dtype_of, load_live, shared_vocabulary
from engine.tokens import check_same_tokenizer
from engine.training import Extras, Prune, Schedule, train
from engine.wide import mixed_precision

HIGHEST = 1e-3  # learning rate where none is named
JUDGED = 50  # of the original's most probable tokens, where nobody else asks it
KL = Objective()  # how a student is judged, whatever it is taught with


class TextParams(Params):
    """The text that is learned from."""

    sequence_length: Annotated[int, RARE] = Field(128, ge=8, le=8192, description="Tokens of each sequence.")
    text: str = Field("demo", description="Training text: `demo`, or a text or JSONL file.")

    def file(self) -> Path:
        """Where the text is.

        Raises:
            BadText: it is not there.
        """
        return text_file(self.text, "training text")

    def rooted(self) -> dict[str, JsonValue]:
        """The text."""
        return {**super().rooted(), "text": whole(self.text)}

    def check_sources(self, folder: Path | None) -> None:
        """Refuse a text that cannot be read, or is shorter than one sequence."""
        super().check_sources(folder)
        check_text(self.file(), folder, self.sequence_length)


class TrainingParams(TextParams):
    """How long and how fast a student learns, and from what."""

    steps: int = Field(300, ge=1, le=1_000_000, description="Optimizer steps.")
    batch: int = Field(16, ge=1, le=1024, description="Sequences in each step.")
    learning_rate: float = Field(
        0.0, ge=0.0, le=1e10, description="Highest learning rate; 0: by the size of the model, 0.001 at most."
    )
    micro_batch: Annotated[int, RARE] = Field(
        0, ge=0, le=1024, description="Sequences of a step that are computed together; 0: all. Fewer take less memory."
    )
    gradient_checkpointing: Annotated[bool, RARE] = Field(
        False, description="Compute each block again in the backward pass: a third more time, far less memory."
    )
    learning_rate_factors: Annotated[str, RARE] = Field(
        "", max_length=1000,
        description="Lower rates later: `0.1 after 100` is a tenth after 100 steps; `0 after 150` ends the training.",
    )  # fmt: skip

    @field_validator("learning_rate_factors")
    @classmethod
    def _read(cls, value: str) -> str:
        rescue.read(value)
        return value

    @model_validator(mode="after")
    def _reached(self) -> TrainingParams:
        for after, _ in rescue.read(self.learning_rate_factors):
            if after >= self.steps:
                raise ValueError(f"no step comes after step {after}: steps is {self.steps}")
        return self

    def whole(self) -> bool:
        return True

    def schedule(self, parameters: int) -> Schedule:
        """As the training loop wants it, for a model of so many parameters."""
        rate = self.learning_rate or self.usual_rate(parameters)
        return Schedule(
            self.steps, self.batch, rate, micro_batch=self.micro_batch, recompute=self.gradient_checkpointing,
            factors=rescue.read(self.learning_rate_factors),
        )  # fmt: skip

    def usual_rate(self, parameters: int) -> float:
        """The highest learning rate where none is named: as models of that size are usually trained on.

        It falls with the square root of the size: 1e-3 up to 10 M parameters, 1e-4 at 1 B, 3.5e-5 at 8 B.
        """
        return HIGHEST * min(1.0, math.sqrt(1e7 / parameters))


@dataclass(frozen=True)
class Text:
    """The rows to learn from, and those that are only looked at."""

    rows: Rows
    held: Rows


def read(model: LoadedModel, params: TrainingParams, path: Path) -> Text:
    """The text's rows, as many as the training can read.

    Raises:
        BadText: the text is empty or shorter than one row.
    """
    count = params.steps * params.batch + MOST_HELD
    return Text(*packed_rows(model.tokenizer, path, params.sequence_length, count).split())


def judge_of(model: LoadedModel, text: Text, context: Context) -> Teacher | None:
    """Who says how far what learns without a teacher has gone from the original: that, on the rows held out.

    Nobody where no rows are, or where the model's tokens have become others.
    """
    try:
        check_same_tokenizer(model.tokenizer, model.source)
    except BadModel:
        return None
    if not len(text.held):
        return None
    folders, dtype = [model.source], dtype_of(model)
    shared = shared_vocabulary(folders, model.network.config.get_text_config().vocab_size)
    question = Question(dtype, JUDGED, shared)
    return cached(folders, text.held, question, context, lambda: load_live(folders, shared, context, dtype))


def token_loss(body: Body, hidden: Tensor, labels: Tensor, answers: Answers | None, objective: Objective) -> Tensor:
    """The mean loss of tokens whose hidden states are (n, H), labels (n,)."""

    def loss_of(part: Tensor, piece: slice) -> Tensor:
        return objective(body.logits(part), labels[piece], None if answers is None else answers(piece))

    size = chunk_size(body.vocabulary, hidden.device)
    return chunked(hidden, loss_of, body.parameters, size) / len(hidden)


@dataclass
class Lesson:
    """What a student learns from rows: `batch_loss` for numbers of rows (B, 1), `held_out` for those never learned."""

    student: LoadedModel
    text: Text
    objective: Objective
    teacher: Teacher | None
    judge: Teacher | None

    def __post_init__(self) -> None:
        self.body = Body.of(self.student.network)

    def batch_loss(self, numbers: Tensor) -> Tensor:
        """The mean loss of the tokens of some rows."""
        numbers = numbers[:, 0]
        answers = None if self.teacher is None else self.teacher.answers(self.text.rows, numbers)
        return self.loss(*self.text.rows.of(numbers, self.student.device), answers, self.objective)

    def loss(self, ids: Tensor, positions: Tensor, answers: Answers | None, objective: Objective) -> Tensor:
        """The mean loss of the tokens of a batch (B, T)."""
        with mixed_precision(self.student.network):
            hidden = self.body.hidden(ids, positions)[:, :-1].flatten(0, 1)
            return token_loss(self.body, hidden, ids[:, 1:].flatten(), answers, objective)

    def held_out(self) -> float:
        """Mean KL to the teacher on the rows that are never learned."""
        assert self.judge is not None
        total = 0.0
        for piece in pieces(len(self.text.held), 8):
            numbers = torch.arange(piece.start, piece.stop)
            answers = self.judge.answers(self.text.held, numbers)
            batch = self.text.held.of(numbers, self.student.device)
            total += self.loss(*batch, answers, KL).item() * len(numbers)
        return total / len(self.text.held)

    def teach(
        self, params: TrainingParams, context: Context, loss_of: Callable[[Tensor], Tensor] | None = None,
        beside: Mapping[str, nn.Parameter] | None = None, begin: Callable[[int], None] | None = None,
        trainable: list[str] | None = None, prune: Prune | None = None, weigh: Callable[[Tensor], float] | None = None,
    ) -> None:  # fmt: skip
        """Train the student; the arguments are those of `engine.training`.

        Raises:
            Diverged: the loss did.
        """
        if self.body.isolation == "none":
            context.log(
                f"{type(self.student.network).__name__} cannot keep packed documents apart: they see each other"
            )
        numbers = torch.arange(len(self.text.rows))[:, None]
        extras = Extras(
            tokens=params.sequence_length, beside=beside or {}, begin=begin, trainable=trainable, weigh=weigh,
            held_out=self.held_out if self.judge is not None else None, closer=self.objective.closer,
        )  # fmt: skip
        schedule = params.schedule(self.student.network.num_parameters())
        if not params.learning_rate:
            context.log(f"the highest learning rate is {schedule.rate:.2g}, by the size of the model")
        with contextlib.ExitStack() as stack:
            stack.enter_context(closed_forms(self.student))
            if self.student.device.type == "cpu" and self.body.isolation == "positions":
                stack.enter_context(short_attention(self.body, params.sequence_length))
            train(self.student, numbers, loss_of or self.batch_loss, schedule, context, prune, extras)
