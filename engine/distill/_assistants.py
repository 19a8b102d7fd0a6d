"""Teacher assistants: models of sizes between a teacher and its student, each taught by the one before it.

Mirzadeh et al., 2019, arXiv 1902.03393. Sizes fall in equal ratios. Those of a student of every k-th block have more of
the model's blocks, those of a student of a given size are new networks. Where the student is there already, pruned by
earlier steps or a checkpoint, they are cut from the recipe's original: some of its blocks, evenly spread, and of each
the neurons and heads that matter most by activation, as of the whole its channels (`engine.importance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from engine import anatomy, distributed, importance, models, surgery
from engine.anatomy import AXES, Anatomy, Axis
from engine.distill._settings import StudentParams
from engine.distill._student import of_size, spread
from engine.errors import BadModel, BadParams
from engine.headers import Shape, Tensors, fewer_blocks, inspect
from engine.importance import largest
from engine.methods import Context
from engine.models import LoadedModel, blocks
from engine.sizes import attention_sizes, blocks_of, hidden_size
from engine.surgery import Kept, keep_blocks, narrow
from engine.teachers import dtype_of

Config = Mapping[str, JsonValue]
MULTIPLE = 32  # of widths, where both ends are multiples of it
SAMPLES = 64  # sequences that say what matters: as many as `prune/width` reads where nobody says otherwise


@dataclass(frozen=True)
class Size:
    """Blocks of an assistant, and their width. units: how many stay along each axis where the original loses some."""

    blocks: int
    width: int
    units: Mapping[Axis, int] = field(default_factory=dict)


def sizes(config: Config, original: Config, params: StudentParams, count: int) -> list[Size]:
    """`count` sizes, the largest first; fewer where fewer lie between.

    config, original: config.json of the model as the step finds it, and of the recipe's.

    Raises:
        BadModel: the checkpoint that is the student cannot be read.
    """
    if not count:
        return []
    if params.student == "current":
        return cut_sizes(original, config, count)
    if params.student == "folder":
        return cut_sizes(original, inspect(params.origin(params.folder)).config, count)
    depth, _, head = attention_sizes(config)
    return new_sizes(hidden_size(config), depth, head, params, count)


def new_sizes(width: int, depth: int, head: int, params: StudentParams, count: int) -> list[Size]:
    """Those between a model of `width` with `depth` blocks and `head` numbers of a head and a student made from it."""
    if params.student == "blocks":
        goal = depth // params.keep_every
        return [Size(each, width) for each in dict.fromkeys(between(depth, goal, count)) if goal < each < depth]
    widths = [max(1, round(each / head)) * head for each in between(width, params.hidden_size, count)]
    found = list(zip(between(depth, params.num_blocks, count), widths, strict=True))
    ends = ((depth, width), (params.num_blocks, params.hidden_size))
    return [Size(*each) for each in dict.fromkeys(found) if each not in ends]


def cut_sizes(original: Config, student: Config, count: int) -> list[Size]:
    """Those between the original and a student that is there, by their config.json.

    Along what the student has no less of, or the original cannot lose, they are as the original.
    """
    depth, goal = blocks_of(original), blocks_of(original)
    try:
        surgery.check_blocks(original)
        goal = min(depth, blocks_of(student))
    except BadModel:
        pass
    body, units = _axes(original, student)
    found: list[Size] = []
    for step in range(1, count + 1):
        share = step / (count + 1)
        kept = {axis: _towards(ends, share, 1 if axis == "heads" else MULTIPLE) for axis, ends in units.items()}
        if body is not None and body.coupled and "heads" in kept:
            kept["channels"] = kept["heads"] * body.heads_of_unit * body.head_size
        less = {axis: size for axis, size in kept.items() if body is not None and size < body.size(axis)}
        staying = _towards((depth, goal), share, 1)
        is_student = staying == goal and all(kept[axis] == end for axis, (_, end) in units.items())
        if (staying < depth or less) and not is_student:
            found.append(Size(staying, less.get("channels", hidden_size(original)), less))
    return [size for place, size in enumerate(found) if size not in found[:place]]


def _axes(original: Config, student: Config) -> tuple[Anatomy | None, dict[Axis, tuple[int, int]]]:
    """The original's anatomy, and by axis how many units it and the student have, where the student has fewer."""
    try:
        body, other = surgery.widths(original), anatomy.of_dict(student)
    except (BadModel, BadParams):  # a family whose widths are not known, or linears that are products of two
        return None, {}
    heads = round(other.heads * other.head_size / (body.heads_of_unit * body.head_size))
    theirs: dict[Axis, int] = {"neurons": other.neurons, "heads": max(1, heads), "channels": other.channels}
    found: dict[Axis, tuple[int, int]] = {}
    for axis in AXES:
        follows = axis == "channels" and body.coupled  # those are its heads' numbers
        if axis not in body.fixed and not follows and theirs[axis] < body.size(axis):
            found[axis] = (body.size(axis), theirs[axis])
    return body, found


def _towards(ends: tuple[int, int], share: float, multiple: int) -> int:
    """What lies at a share of the way from one to the other, in equal ratios; of `multiple` where both are."""
    step = math.gcd(*ends, multiple)
    return round(float(ends[0] * (ends[1] / ends[0]) ** share) / step) * step


def between(large: int, small: int, steps: int) -> list[int]:
    """`steps` whole numbers from large to small in equal ratios, without the two ends."""
    return [_towards((large, small), place / (steps + 1), 1) for place in range(1, steps + 1)]


def shaped(
    size: Size, config: dict[str, JsonValue], tensors: Tensors, original: Shape, params: StudentParams
) -> tuple[dict[str, JsonValue], Tensors]:
    """The config.json and the tensors' shapes of an assistant; the first two are those of the model as it is."""
    if params.student == "blocks":
        return fewer_blocks(config, tensors, size.blocks)
    if params.student == "size":
        new = params.model_copy(update={"hidden_size": size.width, "num_blocks": size.blocks})
        return new.reshaped(config, tensors)
    found = fewer_blocks(original.config, original.tensors, size.blocks)
    return surgery.narrowed(*found, size.units) if size.units else found


def make(model: LoadedModel, size: Size, params: StudentParams, length: int, context: Context) -> LoadedModel:
    """An assistant that nobody has taught yet, with all weights in memory.

    length: tokens of the calibration sequences that say what matters.
    """
    made = _made(model, size, params, length, context)
    made.load_all()
    return made


def _made(model: LoadedModel, size: Size, params: StudentParams, length: int, context: Context) -> LoadedModel:
    if params.student == "size":
        return of_size(model, size.width, size.blocks, context.seed)
    if params.student == "blocks":
        return keep_blocks(model, spread(len(blocks(model.network)[1]), size.blocks))
    original = models.stream(model.source, dtype_of(model), context.device)
    staying = spread(len(blocks(original.network)[1]), size.blocks)
    if not size.units:
        return keep_blocks(original, staying)
    with distributed.first_alone():
        matters = importance.measure(original, "activation", SAMPLES, length, context)
    kept = {axis: [largest(row, count) for row in matters.of(axis)] for axis, count in size.units.items()}
    channels = kept.pop("channels", [None])[0]
    each = {axis: [rows[number] for number in staying] for axis, rows in kept.items()}
    return narrow(keep_blocks(original, staying), Kept(each.get("neurons"), each.get("heads"), channels))
