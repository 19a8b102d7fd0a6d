"""Let the teacher write continuations once, and train the student on them as if they were the text.

Sequence-level distillation (Kim & Rush, 2016, arXiv 1606.07947). The beginning of a document in each of the text's rows
(of the row, where none begins in it) is a prompt; the teacher goes on from it, greedily or sampled, with more
`teachers` by the mean of their probabilities, and the student learns its tokens as labels, and the prompts' too unless
`learn_prompts` is off. What the teacher wrote has fewer surprises than what people wrote, and a small student can learn
more of it. The sequences go to disk with the fingerprint of the teacher and of the prompts: a killed run goes on with
them, later runs find them, and the teacher is not in memory while the student trains.

Only what the teacher chose counts, not how sure it was: follow or combine with logit distillation where that matters.

With several GPUs a process on each takes its share of every batch and holds its shard of the student (FSDP).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from engine import distributed, hardware
from engine.distill._settings import StudentParams, TeacherParams, WritingParams
from engine.distill._student import choose
from engine.distill._teachers import check_tokenizers
from engine.fields import RARE
from engine.files import fetch, give, publish
from engine.kv_cache import read_on
from engine.lesson import Lesson, Text, TrainingParams, judge_of, read, token_loss
from engine.losses import Objective, pieces
from engine.methods import Context
from engine.models import LoadedModel
from engine.rows import Rows
from engine.teachers import Live, Question, dtype_of, fingerprint, load_live, shared_vocabulary
from engine.wide import mixed_precision

TITLE = "Sequence distillation"
CHANGES = ("disk", "memory", "latency")
TOGETHER = 32  # sequences that are written at a time, and in one file
SHARE = 0.1  # of the free disk that sequences may take
LABELS = Objective(label_weight=1.0)


class Params(TrainingParams, WritingParams, TeacherParams, StudentParams):
    """Settings of the student, the writing and the training."""

    sequences: int = Field(512, ge=2, le=1_000_000, description="Sequences that the teacher writes, at most one a row.")
    sampling_temperature: float = Field(
        0.0, ge=0.0, le=5.0, description="Of the teacher's writing; 0: always the likeliest token (greedy)."
    )
    learn_prompts: Annotated[bool, RARE] = Field(True, description="Learn the prompts' own tokens too.")


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Let the teacher write, where it has not yet, and train the student on it."""
    folders = params.folders(model.source)
    check_tokenizers(folders, model)
    given = read(model, params, params.file())
    judge = judge_of(model, given, context)
    count = min(params.sequences, len(given.rows))
    prompts = given.rows.prompts(torch.arange(count), params.prompt_tokens)
    size = model.network.config.get_text_config().vocab_size
    ids = written(folders, prompts, model, params, context, shared_vocabulary(folders, size))
    student = choose(model, params, context)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)  # a sequence is one document, whatever was in its prompt
    text = Text(Rows(ids, positions.int()), given.held)
    lesson = Lesson(student, text, LABELS, None, judge)
    end = model.tokenizer.eos_token_id
    first = 0 if params.learn_prompts else params.prompt_tokens - 1

    def wanted(batch: Tensor) -> Tensor:
        labels = batch[:, 1:]
        wanted = torch.zeros_like(labels, dtype=torch.bool)
        wanted[:, first:] = True
        if end is not None:
            own = (labels == end).long()
            own[:, : params.prompt_tokens - 1] = 0
            wanted &= own.cumsum(1) - own == 0  # nothing after the teacher's first end
        return wanted

    def weigh(numbers: Tensor) -> float:
        return float(wanted(ids[numbers[:, 0].cpu()]).sum())

    def loss_of(numbers: Tensor) -> Tensor:
        batch, places = text.rows.of(numbers[:, 0], student.device)
        chosen = wanted(batch).flatten().nonzero().squeeze(1)
        with mixed_precision(student.network):
            hidden = lesson.body.hidden(batch, places)[:, :-1].flatten(0, 1)[chosen]
            return token_loss(lesson.body, hidden, batch[:, 1:].flatten()[chosen], None, LABELS)

    lesson.teach(params, context, loss_of, weigh=weigh)
    return student


def written(
    folders: list[Path], prompts: Tensor, model: LoadedModel, params: Params, context: Context, vocabulary: int
) -> Tensor:
    """Token ids (sequences, length), int32: from disk where they are, else as the teacher writes them now."""
    whose = fingerprint(folders, Question(dtype_of(model), 0, vocabulary))
    how = f"{params.sequence_length} {params.sampling_temperature} {context.seed}"
    room, own = context.cache / "sequences", context.folder / "sequences"
    live: Live | None = None
    parts = pieces(len(prompts), TOGETHER)
    files: list[tuple[Path, dict[str, str]]] = []
    for done, piece in enumerate(parts):
        context.check_cancelled()
        asked = hashlib.sha256(how.encode() + prompts[piece].numpy().tobytes()).hexdigest()
        about = {"teacher": whose, "asked": asked}
        path = own / whose[:32] / f"{asked[:32]}.safetensors"
        files.append((path, about))
        shared = room / whose[:32] / path.name
        mine = done % distributed.count() == distributed.rank()  # the other processes write the others meanwhile
        if mine and _read(path, about) is None and not (fetch(path, shared) and _read(path, about) is not None):
            if live is None:
                live = load_live(folders, vocabulary, context, dtype_of(model))
            dice = torch.Generator().manual_seed(int(asked[:12], 16) + context.seed)
            ids = continuations(live, prompts[piece], params.sequence_length, params.sampling_temperature, dice)
            temporary = path.with_suffix(".tmp")
            save_file({"ids": ids}, temporary, metadata={"maquette": json.dumps(about)})
            publish(temporary, path)
            give(path, shared, room, SHARE)
        context.progress(done + 1, len(parts), "files of sequences")
    context.log(
        f"the teacher's {len(prompts)} sequences: {'written now' if live is not None else 'reused, it is not loaded'}"
    )
    live = None
    hardware.give_back_memory()
    distributed.wait()
    found = [_read(path, about) for path, about in files]
    assert all(ids is not None for ids in found), "each was read or written above"
    return torch.cat([ids for ids in found if ids is not None])


def _read(path: Path, about: dict[str, str]) -> Tensor | None:
    """The sequences of a file, None where it is not there, or is another teacher's: then it is written anew."""
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("maquette", "{}")) != about:
                return None
            ids: Tensor = file.get_tensor("ids")
            return ids
    except (OSError, SafetensorError, ValueError):
        return None


@torch.no_grad()
def continuations(live: Live, prompts: Tensor, length: int, temperature: float, dice: torch.Generator) -> Tensor:
    """Token ids (B, length), int32: the prompts (B, T) and what the teachers, averaged, write after them."""
    ids = prompts.to(live.device)
    given = ids
    caches: list[Cache | None] = [None] * len(live.bodies)
    while ids.shape[1] < length:
        odds = torch.zeros(len(ids), live.vocabulary, device=ids.device)
        for place, body in enumerate(live.bodies):
            logits, caches[place] = read_on(body.network, given, caches[place], last=True)
            odds += logits[:, -1, : live.vocabulary].float().softmax(-1) / len(live.bodies)
        if temperature:
            given = torch.multinomial((odds.log() / temperature).softmax(-1).cpu(), 1, generator=dice).to(ids.device)
        else:
            given = odds.argmax(-1, keepdim=True)
        ids = torch.cat([ids, given], 1)
    return ids.int().cpu()
