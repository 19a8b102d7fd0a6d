"""The teachers of a student: the original model of the recipe, with others beside it, asked now or from their cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine import hardware
from engine.distill._settings import CacheParams, TeacherParams
from engine.lesson import Text
from engine.methods import Context
from engine.models import LoadedModel
from engine.teachers import Cached, Live, Question, Teacher, cached, dtype_of, load_live, shared_vocabulary
from engine.tokens import check_same_tokenizer


def teachers_of(
    text: Text, folders: list[Path], model: LoadedModel, params: CacheParams, context: Context, vocabulary: int
) -> tuple[Teacher | None, Teacher | None]:
    """Who answers for the rows to learn from (nobody, where only labels count), and for those held out (where any are).

    Raises:
        BadModel: a teacher cannot be loaded, or has another tokenizer.
    """
    check_tokenizers(folders, model)
    loaded: list[Live] = []

    def live() -> Live:
        if not loaded:
            loaded.append(load_live(folders, vocabulary, context, dtype_of(model)))
        return loaded[0]

    if params.teacher_logits == "live":
        return live() if params.label_weight < 1 else None, live() if len(text.held) else None
    judging = Question(dtype_of(model), params.top_k, vocabulary)
    teaching = replace(judging, temperature=params.temperature)
    found: list[Cached | None] = [
        cached(folders, rows, question, context, live) if wanted and len(rows) else None
        for rows, question, wanted in ((text.rows, teaching, params.label_weight < 1), (text.held, judging, True))
    ]
    loaded.clear()
    hardware.give_back_memory()
    return found[0], found[1]


def live_of(params: TeacherParams, model: LoadedModel, student: LoadedModel, context: Context) -> Live:
    """The teachers in memory, for a student.

    Raises:
        BadModel: a teacher cannot be loaded, or has another tokenizer.
    """
    folders = params.folders(model.source)
    check_tokenizers(folders, model)
    vocabulary = shared_vocabulary(folders, student.network.config.get_text_config().vocab_size)
    return load_live(folders, vocabulary, context, dtype_of(model))


def check_tokenizers(folders: list[Path], model: LoadedModel) -> None:
    """Refuse teachers whose tokens are not the model's.

    Raises:
        BadModel: the first difference.
    """
    for folder in folders:
        check_same_tokenizer(model.tokenizer, folder)


def beneath(context: Context, name: str) -> Context:
    """The context of a phase, with a folder of its own."""
    return replace(context, folder=context.folder / name)
