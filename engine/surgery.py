"""A network of another shape, made from the weights of a model: what structured pruning and students are built with.

The result is a plain model of its architecture: its config says its shape, any `transformers` user can load it. Of a
streamed model it is a streamed one: a part is cut from the model's own each time that it is opened.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine import anatomy, low_rank
from engine.anatomy import NEURONS, OFFSET_NORMS, Anatomy, Axis
from engine.checkpoint import attention, part_names, part_of, shell
from engine.errors import BadModel, BadParams
from engine.experts import separate
from engine.headers import OF_EACH_BLOCK, Tensors
from engine.models import LoadedModel, Parts, blocks, embeddings, head, open_when_reached, put_tensor
from engine.wide import widen

Renamed = Callable[[Mapping[str, int]], Mapping[str, int]]
Change = Callable[[str, Tensor], Tensor]  # of a model's tensor, by its name: the one to take, on meta where that is
BY_NUMBER = {  # what blocks compute depends on their number, by these keys of a config, unless they have the value
    "scale_attn_by_inverse_layer_idx": False, "attention_types": None, "num_kv_shared_layers": 0,
    "first_k_dense_replace": 0, "decoder_sparse_step": 1, "attn_layer_period": 1, "expert_layer_period": 1,
    "attn_layer_indices": None,
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What stays of a model's widths: indices in order; None where all stay.

    neurons, heads: of each block, as many in each; heads by attention unit (`engine.anatomy`). channels: of the model.
    """

    neurons: Sequence[Sequence[int]] | None = None
    heads: Sequence[Sequence[int]] | None = None
    channels: Sequence[int] | None = None

    def of(self, axis: Axis, block: int | None) -> Sequence[int] | None:
        """The kept units along an axis, in a block where the axis is one of blocks."""
        if axis == "channels":
            return self.channels
        kept = self.neurons if axis == "neurons" else self.heads
        return None if kept is None or block is None else kept[block]


def _same(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Cut:
    """A part that is made of one of another model."""

    model: LoadedModel
    part: str
    change: Change

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of the new part, which has that name; on the meta device where the model's part is closed."""
        network, own = self.model.network, f"{self.part}."
        parts = part_names(network, blocks(network)[0])
        weights = network.get_submodule(self.part).state_dict(prefix=own)
        return {
            f"{part}.{key.removeprefix(own)}": self.change(key, weight)
            for key, weight in weights.items()
            if part_of(key, parts) == self.part
        }

    def fill(self, model: LoadedModel, part: str) -> None:
        """Give the part its weights, but for those that are another part's."""
        if all(name in model.tied for name in self.tensors(part)):
            return
        with self.model.opened(self.part):
            for name, tensor in self.tensors(part).items():
                if name not in model.tied:
                    put_tensor(model.network, name, tensor)

    def prefetch(self, part: str) -> None:
        """Begin to read the model's part."""
        self.model.prefetch(self.part)


def check_blocks(config: Mapping[str, JsonValue]) -> None:
    """Refuse to take blocks from a model with this config.json that would compute otherwise in another place.

    Raises:
        BadModel: one line that says by which key.
    """
    for key, harmless in BY_NUMBER.items():
        if config.get(key, harmless) not in (harmless, None):
            raise BadModel(f"config.json says {key}: what a block computes depends on its number, so none can go.")


def keep_blocks(model: LoadedModel, kept: Sequence[int]) -> LoadedModel:
    """A model that has the blocks with these numbers alone, in this order; all else is the model's.

    What is in memory is shared with the model, not copied.

    Raises:
        BadModel: a block has other parts than the one in whose place it would come.
    """
    prefix, modules = blocks(model.network)
    config = copy.deepcopy(model.network.config)
    text = config.get_text_config()
    for key in OF_EACH_BLOCK:
        value = getattr(text, key, None)
        name = text.attribute_map.get(key, key)
        follows = isinstance(getattr(type(text), name, None), property)  # from other keys
        if not follows and isinstance(value, list | tuple) and len(value) == len(modules):
            setattr(text, key, [value[number] for number in kept])
    if getattr(text, "mlp_only_layers", None):  # of mixtures: numbers of blocks
        text.mlp_only_layers = [new for new, number in enumerate(kept) if number in text.mlp_only_layers]
    text.num_hidden_layers = len(kept)
    numbered = {f"{prefix}.{number}": f"{prefix}.{new}" for new, number in enumerate(kept)}
    others = [part for part in part_names(model.network, prefix) if not part.startswith(f"{prefix}.")]
    try:
        return assemble(
            model,
            config,
            parts={part: part for part in others} | numbered,
            renamed=functools.partial(_renumbered, prefix, kept),
        )
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # memory, for one
            raise
        raise BadModel(
            f"The blocks of a {text.model_type} model have different parts, and its config cannot say which of them "
            "are left: none can go."
        ) from error


def narrow(model: LoadedModel, kept: Kept) -> LoadedModel:
    """A model with these neurons, heads and channels alone.

    Without neurons or heads it computes what the model does with their outputs at zero. A norm over fewer channels
    divides by their mean, not by that of all: its weight makes up for it, so that an RMS norm computes what it did with
    the missing channels at zero (up to its epsilon), and a layer norm does where the kept channels have the mean 0 and
    its bias is zero in the missing ones.

    Raises:
        BadModel: the widths of this family are not known.
        BadParams: this model cannot lose what is missing.
    """
    assert not low_rank.ranks(model.network), "`widths` refuses them"
    config = copy.deepcopy(model.network.config)
    body = anatomy.of(config)
    check(body, kept)
    prefix, _ = blocks(model.network)

    def change(key: str, weight: Tensor) -> Tensor:
        number = int(key.removeprefix(f"{prefix}.").split(".")[0]) if key.startswith(f"{prefix}.") else None
        for dim, entry in enumerate(anatomy.units(body, key, tuple(weight.shape))):
            if entry is not None and (staying := kept.of(entry[0], number)) is not None:
                weight = weight.index_select(dim, places(entry[1], staying).to(weight.device))
        if kept.channels is None:
            return weight
        return _corrected(model.network, body, key, weight, math.sqrt(body.channels / len(kept.channels)))

    _say(config.get_text_config(), body, kept)
    return assemble(model, config, change)


def widths(config: Mapping[str, JsonValue]) -> Anatomy:
    """The widths of a model with this config.json, where they can be made narrower.

    Raises:
        BadModel: they are not known.
        BadParams: linears of it are products of two.
    """
    if config.get(low_rank.RANKS_KEY):
        raise BadParams(
            "linears that are products of two cannot be made narrower. Start from the model that prune/low_rank was "
            "applied to, and put it after prune/width."
        )
    return anatomy.of_dict(config)


def narrowed(
    config: Mapping[str, JsonValue], tensors: Tensors, sizes: Mapping[Axis, int]
) -> tuple[dict[str, JsonValue], Tensors]:
    """The config.json and the tensors' shapes of a model that keeps so many units along these axes."""
    body = widths(config)
    each = {axis: [range(size)] * body.blocks for axis, size in sizes.items()}
    made = anatomy.read(config)
    channels = range(sizes["channels"]) if "channels" in sizes else None
    _say(made.get_text_config(), body, Kept(each.get("neurons"), each.get("heads"), channels))
    changed: dict[str, JsonValue] = made.to_dict()
    found: Tensors = {}
    alike: dict[tuple[object, ...], tuple[int, ...]] = {}  # of tensors that differ in their block's number alone
    for name, shape in tensors.items():
        key = (shape, *(word for word in name.split(".") if not word.isdigit()))
        if key not in alike:
            entries = anatomy.units(body, name, shape) if name.endswith(".weight") and len(shape) <= 2 else []
            alike[key] = tuple(
                size if entry is None or entry[0] not in sizes else len(places(entry[1], range(sizes[entry[0]])))
                for size, entry in itertools.zip_longest(shape, entries)
            )
        found[name] = alike[key]
    return changed, found


def places(units: Tensor, kept: Sequence[int]) -> Tensor:
    """The places of a dimension that stay, in order: those of kept units, and those that all units share."""
    return torch.where(torch.isin(units, torch.tensor([-1, *kept])))[0]


def check(body: Anatomy, kept: Kept) -> None:
    """Refuse what a model of this anatomy cannot lose, and what would leave nothing.

    Raises:
        BadParams: one line that says why.
    """
    channels_alone = None if kept.channels is None else [kept.channels]
    widths: dict[Axis, Sequence[Sequence[int]] | None]
    widths = {"neurons": kept.neurons, "heads": kept.heads, "channels": channels_alone}
    for axis, each in widths.items():
        if each is None:
            continue
        if axis in body.fixed:
            raise BadParams(f"{axis} cannot be removed: {body.fixed[axis]}.")
        sizes = {len(one) for one in each}
        assert len(sizes) == 1, f"{axis} must be as many in each block"
        if sizes == {0}:
            raise BadParams(f"all {axis} would be removed. Keep some.")
    heads = body.heads if kept.heads is None else len(kept.heads[0]) * body.heads_of_unit
    channels = body.channels if kept.channels is None else len(kept.channels)
    if body.coupled and heads * body.head_size != channels:
        raise BadParams(
            f"a {body.family} model has as many channels as its heads have numbers: {heads} heads of {body.head_size} "
            f"and {channels} channels do not fit. Remove the same share of both."
        )


def _corrected(network: PreTrainedModel, body: Anatomy, key: str, weight: Tensor, factor: float) -> Tensor:
    """The weight with which norms over fewer channels give what they gave, and Gemma's embeddings keep their size.

    Gemma multiplies embeddings by the root of the hidden size; where they are the head, too, the final norm makes up
    for what they get here.
    """
    offset = 1.0 if body.family in OFFSET_NORMS else 0.0
    tied = network.config.get_text_config().tie_word_embeddings
    final = not key.startswith(f"{blocks(network)[0]}.")
    if anatomy.is_norm(key, tuple(weight.shape)) and not (final and offset and tied):
        return ((weight.float() + offset) * factor - offset).to(weight.dtype)
    embedded = f"{embeddings(network)[0]}.weight"
    if offset and (key == embedded or (tied and key == f"{head(network)[0]}.weight")):
        return (weight.float() * factor).to(weight.dtype)
    return weight


def _say(config: PretrainedConfig, body: Anatomy, kept: Kept) -> None:
    """Write the new widths into the config, those too that followed from others before."""
    if kept.neurons is not None or kept.channels is not None:
        neurons = body.neurons if kept.neurons is None else len(kept.neurons[0])
        setattr(config, NEURONS.get(body.family, "intermediate_size"), neurons)
    if not body.coupled:
        config.head_dim = body.head_size
    if kept.heads is not None:
        heads = len(kept.heads[0]) * body.heads_of_unit
        groups = len(kept.heads[0]) if body.groups > 1 else 1
        config.num_attention_heads = heads
        for key in ("num_key_value_heads", "num_kv_heads"):
            if getattr(config, key, None) is not None:
                setattr(config, key, groups)
    if kept.channels is not None:
        config.hidden_size = len(kept.channels)
        if body.family == "opt":
            config.word_embed_proj_dim = len(kept.channels)


def assemble(
    model: LoadedModel, config: PretrainedConfig, change: Change = _same, *, parts: Mapping[str, str] | None = None,
    renamed: Renamed = dict,
) -> LoadedModel:  # fmt: skip
    """A model of that config made of the parts of `model`, each tensor as `change` makes it, and all else of `model`.

    parts: the names that the parts which stay have then, by those that they have; None: all stay as they are.
    renamed: the same for what is known of modules.
    """
    parts = parts or {part: part for part in part_names(model.network, blocks(model.network)[0])}
    vars(config).pop(low_rank.RANKS_KEY, None)  # as the source's file has it, by the names of before
    network = shell(config, model.network.dtype, model.device)
    low_rank.factor(network, renamed(low_rank.ranks(model.network)))
    where = {new: Cut(model, part, change) for part, new in parts.items()}
    weights: dict[str, Tensor] = {}
    for part, cut in where.items():
        weights |= cut.tensors(part)
    network.load_state_dict(weights, assign=True)
    network.requires_grad_(False)
    network.generation_config = copy.deepcopy(model.network.generation_config)
    pruned, sparse = (set(renamed(dict.fromkeys(names, 0))) for names in (model.pruned, model.sparse))
    made = LoadedModel(
        network, model.tokenizer, Path(model.source), pruned=pruned, sparse=sparse, kv_cache=model.kv_cache
    )
    if model.parts is None:
        network.tie_weights()
    else:
        made.parts = Parts(model.parts.device, dict(where), dict(model.parts.tied))
        open_when_reached(made)
    return made


def sized(config: PretrainedConfig, hidden_size: int, num_blocks: int) -> PretrainedConfig:
    """A config of the same family with another width and depth; heads stay as large, feed-forwards in proportion.

    Raises:
        BadParams: the hidden size cannot be split into the family's attention heads.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    old, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or old // heads
    if hidden_size % head or hidden_size // head < 1:
        raise BadParams(f"hidden_size {hidden_size} is not a multiple of the head size {head} of this model.")
    text.hidden_size, text.num_hidden_layers = hidden_size, num_blocks
    text.num_attention_heads = hidden_size // head
    for shared in ("num_key_value_heads", "num_kv_heads"):  # the second is Falcon's
        if (groups := getattr(text, shared, None)) is not None:
            fitting = max(1, groups * text.num_attention_heads // heads)
            while text.num_attention_heads % fitting:
                fitting -= 1
            setattr(text, shared, fitting)
    neurons = NEURONS.get(text.model_type, "intermediate_size")
    if getattr(text, neurons, None):
        setattr(text, neurons, max(32, round(getattr(text, neurons) * hidden_size / old / 32) * 32))
    if hasattr(text, "word_embed_proj_dim"):  # OPT's, which projects where embeddings are of another width
        text.word_embed_proj_dim = hidden_size
    for each_block in OF_EACH_BLOCK:
        if isinstance(found := getattr(text, each_block, None), list):
            setattr(text, each_block, (found * num_blocks)[:num_blocks])
    return config


def anew(config: Mapping[str, JsonValue], hidden_size: int, num_blocks: int) -> tuple[dict[str, JsonValue], Tensors]:
    """The config.json and the tensors' shapes of a `sized` network of a family.

    Raises:
        BadParams: the hidden size cannot be split into the family's attention heads.
    """
    body, shapes = _anew(json.dumps(config), hidden_size, num_blocks)
    return dict(body), dict(shapes)


@functools.lru_cache(maxsize=8)
def _anew(config: str, hidden_size: int, num_blocks: int) -> tuple[dict[str, JsonValue], Tensors]:
    made = sized(anatomy.read(json.loads(config)), hidden_size, num_blocks)
    with torch.device("meta"):
        network = fresh(made, torch.bfloat16, torch.device("meta"))
    tied = network.all_tied_weights_keys or {}
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items() if name not in tied}
    return made.to_dict(), shapes


def fresh(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """An untrained network of a config."""
    network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, attn_implementation=attention(config), trust_remote_code=False
    )
    assert isinstance(network, PreTrainedModel)
    separate(network)
    widen(network)
    network.to(device)  # type: ignore[arg-type]  # the stub takes the method for an unbound one
    network.eval()  # type: ignore[no-untyped-call]
    return network


def _renumbered(prefix: str, kept: Sequence[int], values: Mapping[str, int]) -> dict[str, int]:
    """The values of modules in the blocks that are kept, by the names that these have then."""
    return {
        f"{prefix}.{i}.{name.removeprefix(f'{prefix}.{k}.')}": value
        for i, k in enumerate(kept)
        for name, value in values.items()
        if name.startswith(f"{prefix}.{k}.")
    }
