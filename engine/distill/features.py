"""Teach a student what the teacher computes inside: hidden states and attention maps, beside its predictions.

TinyBERT (Jiao et al., 2019, arXiv 1909.10351). Each student block stands for a block of the teacher, evenly spread,
the last for the last. The loss of a batch is

    prediction + hidden_weight * mean of |h_student W - h_teacher|² / |h_teacher|² + attention_weight * mean of KL

over the sequences and the blocks (and the embeddings, for hidden states). The loss on predictions is that of
`distill/logits`, with more `teachers` from the mean of their probabilities; hidden states and maps are the original's
alone. W is a linear map that is learned beside the student and thrown away afterwards; where the widths agree there is
none. Hidden states of a sequence count relative to the teacher's size, so that a weight means the same in every family.
Attention maps are compared as probabilities, KL(teacher || student), averaged over the heads where their numbers
differ; TinyBERT compared the logits before the softmax, which `transformers` does not give. Maps need the plain (eager)
attention, slower and of memory T² a head: only while training, and only with an attention_weight above 0.

Good for students that start at random, and early in a training. All teachers are in memory all the while. Needs
training text.

With several GPUs a process on each takes its share of every batch and holds its shard of the student (FSDP).
"""

from __future__ import annotations

import contextlib

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from engine.body import Body, eager
from engine.distill._settings import ObjectiveParams, StudentParams
from engine.distill._student import choose, spread
from engine.distill._teachers import live_of
from engine.errors import BadModel
from engine.lesson import Lesson, TrainingParams, read, token_loss
from engine.methods import Context
from engine.models import LoadedModel
from engine.wide import mixed_precision

TITLE = "Feature distillation"
CHANGES = ("disk", "memory", "latency")


class Params(TrainingParams, ObjectiveParams, StudentParams):
    """Settings of the student, the losses and the training. Features are the original model's."""

    hidden_weight: float = Field(
        1.0, ge=0.0, le=1000.0, description="Weight of the hidden states; 0: they do not count."
    )
    attention_weight: float = Field(
        0.0, ge=0.0, le=1000.0, description="Weight of the attention maps; 0: not asked for, and fast attention."
    )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train the student beside its teacher."""
    text = read(model, params, params.file())
    student = choose(model, params, context)
    live = live_of(params, model, student, context)
    judge = live if len(text.held) else None
    lesson = Lesson(student, text, params.objective, live, judge)
    teacher = live.bodies[0]
    torch.manual_seed(context.seed)
    maps = projection(student.network, teacher.network).to(student.device)
    attend = params.attention_weight > 0

    def loss_of(numbers: Tensor) -> Tensor:
        ids, positions = text.rows.of(numbers[:, 0], student.device)
        with mixed_precision(student.network):
            ours = features(lesson.body, ids, positions, attend)
            with torch.no_grad():
                theirs = features(teacher, ids, positions, attend)
            hidden = ours.last[:, :-1].flatten(0, 1)
            answers = live.of(ids, positions, first=theirs.last) if params.label_weight < 1 else None
            loss = token_loss(lesson.body, hidden, ids[:, 1:].flatten(), answers, params.objective)
            if params.hidden_weight:
                loss = loss + params.hidden_weight * hidden_loss(ours.hidden, theirs.hidden, maps)
            if attend:
                loss = loss + params.attention_weight * attention_loss(ours.attentions, theirs.attentions)
        return loss

    with contextlib.ExitStack() as stack:
        if attend:
            stack.enter_context(eager(student.network))
            stack.enter_context(eager(teacher.network))
        lesson.teach(params, context, loss_of, {f"projection.{k}": v for k, v in maps.named_parameters()})
    return student


class Features:
    """What a network computed: `last`, which the head reads; hidden states before the first and after each block."""

    def __init__(self, last: Tensor, hidden: tuple[Tensor, ...], attentions: tuple[Tensor, ...]) -> None:
        self.last, self.hidden, self.attentions = last, hidden, attentions


def features(body: Body, ids: Tensor, positions: Tensor, attend: bool) -> Features:
    """Hidden states (B, T, H) each and attention maps (B, heads, T, T) each.

    Raises:
        BadModel: the family's head is not known apart from its body.
    """
    if body.scale is None:
        raise BadModel(f"{type(body.network).__name__} cannot be taken apart for its features. Use distill/logits.")
    found = body.network.base_model(
        input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=attend, **body.arguments(positions)
    )
    return Features(found[0], found.hidden_states, tuple(found.attentions) if attend else ())


def projection(student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module:
    """From the student's width to the teacher's: nothing where they agree."""
    ours, theirs = (each.config.get_text_config().hidden_size for each in (student, teacher))
    return nn.Identity() if ours == theirs else nn.Linear(ours, theirs, bias=False)


def hidden_loss(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], maps: nn.Module) -> Tensor:
    """The mean relative squared distance of the hidden states (B, T, H) of sequences, those of the embeddings first."""
    chosen = [0, *(place + 1 for place in spread(len(theirs) - 1, len(ours) - 1))]
    parts = []
    for mine, place in zip(ours, chosen, strict=True):
        wanted = theirs[place].float()
        parts.append(((maps(mine).float() - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))).mean())
    return torch.stack(parts).mean()


def attention_loss(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """The mean KL from the teacher's attention of each token and head to the student's, in nats."""
    parts = []
    for mine, place in zip(ours, spread(len(theirs), len(ours)), strict=True):
        wanted, got = theirs[place].float(), mine.float()
        if wanted.shape[1] != got.shape[1]:
            wanted, got = wanted.mean(1, keepdim=True), got.mean(1, keepdim=True)
        tokens = wanted.shape[0] * wanted.shape[1] * wanted.shape[2]
        logp = got.clamp_min(1e-12).log()
        parts.append(functional.kl_div(logp, wanted, reduction="sum") / tokens)
    return torch.stack(parts).mean()
