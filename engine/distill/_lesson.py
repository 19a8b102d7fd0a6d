"""A student, its teacher and the text, put together: the loss of a batch, the held-out KL, the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import hardware
from engine.body import Body, eager
from engine.checkpoint import read_config
from engine.distill._settings import CacheParams, TrainingParams
from engine.losses import Objective, chunk_size, chunked, pieces
from engine.methods import Context
from engine.models import LoadedModel
from engine.rows import MOST_HELD, Rows, packed_rows
from engine.teachers import Answers, Cached, Live, Teacher, cached, load_live
from engine.tokens import check_same_tokenizer
from engine.training import Extras, train

SHORT = 256  # tokens of a sequence up to which plain attention trains faster on a CPU than the fused kernel
KL = Objective()  # how a student is judged, whatever it is taught with


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


def teachers_of(
    text: Text, folders: list[Path], model: LoadedModel, params: CacheParams, context: Context, vocabulary: int
) -> tuple[Teacher | None, Teacher | None]:
    """Who answers for the rows to learn from (nobody, where only labels count), and for those held out (where any are).

    Raises:
        BadModel: a teacher cannot be loaded, or has another tokenizer.
    """
    for folder in folders:
        check_same_tokenizer(model.tokenizer, folder)
    loaded: list[Live] = []
    dtype = str(model.network.dtype).removeprefix("torch.")

    def live() -> Live:
        if not loaded:
            loaded.append(load_live(folders, vocabulary, context, dtype))
        return loaded[0]

    if params.teacher_logits == "live":
        return live() if params.label_weight < 1 else None, live() if len(text.held) else None
    found: list[Cached | None] = [
        cached(folders, rows, params.top_k, vocabulary, context, live) if wanted and len(rows) else None
        for rows, wanted in ((text.rows, params.label_weight < 1), (text.held, True))
    ]
    loaded.clear()
    hardware.give_back_memory()
    return found[0], found[1]


def shared_vocabulary(folders: list[Path], student: int) -> int:
    """Tokens that the student and all teachers have logits for: their sizes may differ by padding."""
    sizes: list[int] = [read_config(folder).get_text_config().vocab_size for folder in folders]
    return min([student, *sizes])


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
        with torch.autocast(ids.device.type, torch.bfloat16):
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
        trainable: list[str] | None = None,
    ) -> None:  # fmt: skip
        """Train the student.

        Raises:
            Diverged: the loss did.
        """
        if self.body.isolation == "none":
            context.log(
                f"{type(self.student.network).__name__} cannot keep packed documents apart: they see each other"
            )
        numbers = torch.arange(len(self.text.rows))[:, None]
        extras = Extras(
            tokens=params.sequence_length, beside=beside or {}, begin=begin, trainable=trainable,
            held_out=self.held_out if self.judge is not None else None,
        )  # fmt: skip
        plain = self.student.device.type == "cpu" and params.sequence_length <= SHORT
        with contextlib.ExitStack() as stack:
            if plain and self.body.isolation == "positions":
                stack.enter_context(eager(self.student.network))
            train(self.student, numbers, loss_of or self.batch_loss, params.schedule, context, extras=extras)


def beneath(context: Context, name: str) -> Context:
    """The context of a phase, with a folder of its own."""
    return replace(context, folder=context.folder / name)
