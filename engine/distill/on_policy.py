"""Let the student write, and teach it on what it wrote: what it meets in use is what it learns from.

Generalised knowledge distillation (GKD, Agarwal et al., 2023, arXiv 2306.13649). In a share of the batches the student
goes on from the beginning of a document in each of the text's rows (of the row, where none begins in it) with tokens
that it samples; the teacher, with more `teachers` the mean of their probabilities, says what it would have expected
there, and the divergence counts on the tokens that were written, up to the first end of text. The other batches are the
text, as in logit distillation. Nothing is learned through the sampling itself.

Reverse KL and Jensen-Shannon make a small student keep to what it can do well. Good for a student that writes already
(healed or pruned, not one at random); slow, since sequences are written token by token. What is sampled after a row
follows from the seed, the step and the row alone, so a resumed run writes it again, and each of several processes
writes after its own rows. All teachers are in memory all the while. Needs training text.

With several GPUs a process on each takes its share of every batch and holds its shard of the student (FSDP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import Cache

from engine.distill._settings import ObjectiveParams, StudentParams, WritingParams
from engine.distill._student import choose
from engine.distill._teachers import live_of
from engine.fields import RARE
from engine.kv_cache import read_on
from engine.lesson import Lesson, TrainingParams, read, token_loss
from engine.losses import Divergence, Objective
from engine.methods import Context
from engine.models import LoadedModel
from engine.teachers import Live
from engine.wide import mixed_precision

TITLE = "On-policy distillation"
CHANGES = ("disk", "memory", "latency")


class Params(TrainingParams, WritingParams, ObjectiveParams, StudentParams):
    """Settings of the student, the loss, the training and the writing."""

    divergence: Divergence = Field(
        "js", description="KL to the teacher (forward), from it (reverse, MiniLLM), or between both (js, as in GKD)."
    )
    label_weight: float = Field(
        0.0, ge=0.0, le=1.0, description="Weight of the true labels beside the teacher, on batches of the text."
    )
    student_share: float = Field(0.5, ge=0.0, le=1.0, description="Share of the batches that the student writes.")
    sampling_temperature: Annotated[float, RARE] = Field(1.0, ge=0.05, le=5.0, description="Of the student's writing.")


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train the student on the text and on its own writing."""
    text = read(model, params, params.file())
    student = choose(model, params, context)
    live = live_of(params, model, student, context)
    lesson = Lesson(student, text, params.objective, live, live if len(text.held) else None)
    writing = Writing(lesson, live, params, context.seed)
    lesson.teach(params, context, writing.loss, begin=writing.begin, weigh=writing.weigh)
    return student


class Writing:
    """A lesson some of whose batches the student writes; what it wrote is kept from `weigh` to `loss`."""

    def __init__(self, lesson: Lesson, live: Live, params: Params, seed: int) -> None:
        self._lesson, self._live, self._params, self._seed = lesson, live, params, seed
        self._own, self._written = 0, dict[tuple[int, ...], Tensor]()

    def begin(self, step: int) -> None:
        """A new step, which has a seed of its own."""
        self._own = self._seed * 1_000_003 + step

    def weigh(self, numbers: Tensor) -> float:
        """How many tokens of a part of a batch (B, 1) count; where they are to be written, they are now."""
        rows, params = self._lesson.text.rows, self._params
        dice = torch.Generator().manual_seed(self._own)
        if float(torch.rand((), generator=dice)) >= params.student_share:
            return float(rows.ids[numbers[:, 0].cpu(), 1:].numel())
        places = numbers[:, 0].tolist()
        prompts = rows.prompts(numbers[:, 0], params.prompt_tokens).to(self._lesson.student.device)
        each = [torch.Generator().manual_seed((self._own * 1_000_003 + place) % (1 << 63)) for place in places]
        ids = write(self._lesson.student, prompts, params.sequence_length, params.sampling_temperature, each)
        self._written[tuple(places)] = ids
        return float(counted(self._lesson, ids, params.prompt_tokens).sum())

    def loss(self, numbers: Tensor) -> Tensor:
        """The mean loss of the tokens of a part that has been weighed."""
        ids = self._written.pop(tuple(numbers[:, 0].tolist()), None)
        if ids is None:
            return self._lesson.batch_loss(numbers)
        return own_loss(self._lesson, self._live, ids, self._params.prompt_tokens, self._params.objective)


@torch.no_grad()
def write(
    student: LoadedModel, prompts: Tensor, length: int, temperature: float, dice: Sequence[torch.Generator]
) -> Tensor:  # fmt: skip
    """Token ids (B, length): the prompts (B, T) and what the student samples after them, each with dice of its own."""
    network = student.network
    training = network.training
    network.eval()  # type: ignore[no-untyped-call]
    ids, given = prompts, prompts
    cache: Cache | None = None
    with mixed_precision(network):
        while ids.shape[1] < length:
            logits, cache = read_on(network, given, cache, last=True)
            odds = (logits[:, -1].float() / temperature).softmax(-1).cpu()
            drawn = [torch.multinomial(row, 1, generator=each) for row, each in zip(odds, dice, strict=True)]
            given = torch.stack(drawn).to(ids.device)
            ids = torch.cat([ids, given], 1)
    network.train(training)
    return ids


def counted(lesson: Lesson, ids: Tensor, prompt: int) -> Tensor:
    """Which of the tokens (B, T) but the first count, (B, T - 1): the written ones up to the first end of text."""
    end = lesson.student.tokenizer.eos_token_id
    wanted = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
    wanted[:, prompt - 1 :] = True
    if end is not None:
        ended = (ids[:, prompt:] == end).cumsum(1) - (ids[:, prompt:] == end).long()  # ends before this token
        wanted[:, prompt - 1 :] = ended == 0
    return wanted


def own_loss(lesson: Lesson, live: Live, ids: Tensor, prompt: int, objective: Objective) -> Tensor:
    """The mean divergence on written tokens (B, T) up to the first end of text, which counts too."""
    chosen = counted(lesson, ids, prompt).flatten().nonzero().squeeze(1)
    with mixed_precision(lesson.student.network):
        hidden = lesson.body.hidden(ids)[:, :-1].flatten(0, 1)[chosen]
        answers = live.of(ids, None, chosen)
        return token_loss(lesson.body, hidden, ids[:, 1:].flatten()[chosen], answers, only_teacher(objective))


def only_teacher(objective: Objective) -> Objective:
    """The objective without true labels: what a student wrote is no truth."""
    return Objective(objective.divergence, objective.temperature, 0.0, objective.beta)
