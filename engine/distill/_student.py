"""The student of a distillation: blocks of the model, a new network of a given size, a checkpoint, or the model."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.distill._settings import StudentParams
from engine.errors import BadParams
from engine.methods import Context
from engine.models import LoadedModel, Original, blocks, load
from engine.places import locate
from engine.sources import named
from engine.surgery import fresh, keep_blocks, sized
from engine.tokens import check_same_tokenizer


def choose(model: LoadedModel, params: StudentParams, context: Context) -> LoadedModel:
    """The student that the settings name, with all weights in memory; says where it is the teacher, or larger.

    Raises:
        BadParams: it cannot be cut from the model.
        BadModel: the checkpoint cannot be used.
    """
    places = [] if model.parts is None else list(model.parts.where.values())
    untouched = bool(places) and all(isinstance(each, Original) and each.folder == model.source for each in places)
    before = model.parameters
    if params.student == "folder":
        folder = locate(named(params.folder))
        check_same_tokenizer(model.tokenizer, folder)
        student = load(folder, str(model.network.dtype).removeprefix("torch."), str(model.device))
        student.source, untouched = model.source, folder == model.source
    elif params.student == "size":
        student, untouched = of_size(model, params.hidden_size, params.num_blocks, context.seed), False
    else:
        student = model if params.student == "current" else every_kth(model, params.keep_every)
        student.load_all()
        untouched = untouched and (params.student == "current" or params.keep_every == 1)
    count = student.parameters
    context.log(f"{count:,} of {before:,} parameters")
    if untouched and not params.others():
        context.log("warning: the student is the teacher itself; there is nothing to learn from it but the labels")
    elif count > before:
        context.log("warning: the student is larger than the model")
    return student


def every_kth(model: LoadedModel, keep_every: int) -> LoadedModel:
    """A copy with every `keep_every`-th block, the last always among them, as DistilBERT keeps them.

    Sanh et al., 2019, arXiv 1910.01108: the student starts from the teacher's own blocks.

    Raises:
        BadParams: the model has fewer blocks than `keep_every`.
    """
    count = len(blocks(model.network)[1])
    kept = list(range(keep_every - 1 + count % keep_every, count, keep_every))
    if not kept:
        raise BadParams(f"keep_every {keep_every} leaves no block of {count}. Use {count} or less.")
    return keep_blocks(model, kept)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` blocks, evenly, the last among them: also which teacher block a student block stands for."""
    return [-(-(place + 1) * count // wanted) - 1 for place in range(wanted)]


def of_size(model: LoadedModel, hidden_size: int, num_blocks: int, seed: int) -> LoadedModel:
    """A new network of the same family, initialised at random.

    Raises:
        BadParams: the hidden size cannot be split into the family's attention heads.
    """
    config = sized(model.network.config, hidden_size, num_blocks)
    torch.manual_seed(seed)
    return LoadedModel(fresh(config, model.network.dtype, model.device), model.tokenizer, Path(model.source))
