"""What the JSON files of a model folder may say: bounded before they are read, and before a network is built of them.

A config.json is written by strangers. A number in it can cost minutes, gigabytes, or a crash in native code, a name
in it an exception from deep inside a library; so each that a network is built from is looked at here first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from engine.errors import BadModel, short
from engine.origin import INDEX, PICKLED, SINGLE, Origin

LARGEST = {"config.json": 8 << 20, "model.safetensors.index.json": 64 << 20, "tokenizer.json": 256 << 20}  # bytes
LIMITS = {  # the largest config numbers that are believed; real models are far below
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 1024),
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "v_head_dim"), 1 << 17),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 1 << 20),
    "vocab_size": 1 << 22,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 4096),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4096),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1 << 26),
}
# These may be null, and some families have them from one another: `head_dim` is the width by the heads.
OPTIONAL = ("head_dim", "v_head_dim", "n_inner", "num_key_value_heads", "num_local_experts", "num_experts",
            "n_routed_experts", "moe_num_experts", "moe_intermediate_size")  # fmt: skip
LOWEST = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 0)
WIDEST_HEAD = 4096
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def read_object(origin: Origin, file: str) -> dict[str, JsonValue]:
    """A JSON object in a file of a model.

    Raises:
        BadModel: too large, no JSON, or no object.
        OSError: it cannot be read.
    """
    name, limit = f"{short(origin.name)}: {file}", LARGEST.get(file, 8 << 20)
    size = origin.sizes.get(file)
    if size is None:
        raise FileNotFoundError(file)
    if size > limit:
        raise BadModel(f"{name} has {size / 2**20:,.0f} MiB; at most {limit >> 20} are read. Download it again.")
    try:
        body = json.loads(origin.read(file, 0, size))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or brackets without end
        raise BadModel(f"{name} is not JSON: it is damaged. Download it again.") from None
    if not isinstance(body, dict):
        raise BadModel(f"{name} is not a JSON object.")
    return body


def weight_names(origin: Origin) -> list[str]:
    """The names of a model's safetensors files.

    Raises:
        BadModel: there are none, or the index names others.
    """
    name, files = short(origin.name), origin.sizes
    if SINGLE in files:
        return [SINGLE]
    if INDEX not in files:
        if any(file.endswith(PICKLED) for file in files):
            raise BadModel(f"{name} has pickled weights only; they can run code. Convert them to safetensors.")
        raise BadModel(f"{name} has no {SINGLE}.")
    try:
        names = set(read_object(origin, INDEX)["weight_map"].values())  # type: ignore[union-attr]
    except (OSError, KeyError, TypeError, AttributeError):
        raise BadModel(f"{name}: {INDEX} is damaged. Download it again.") from None
    if not names:
        raise BadModel(f"{name}: {INDEX} names no file. Download it again.")
    for part in names:
        if not isinstance(part, str) or Path(part).name != part or part not in files:
            raise BadModel(f"{name}: the index names {short(part)!r}, which is not a file of this folder.")
    return sorted(names)


def check_numbers(config: Mapping[str, JsonValue], name: str) -> None:
    """Refuse a config.json from which no network can be built.

    Raises:
        BadModel: one line that names the key.
    """
    for key, limit in LIMITS.items():
        value = config.get(key, 1)
        if value is None and key in OPTIONAL:
            continue
        bound = WIDEST_HEAD if key.endswith("head_dim") else limit
        if not isinstance(value, int) or isinstance(value, bool) or not LOWEST.get(key, 1) <= value <= bound:
            raise BadModel(f"{name}: config.json says {key} = {short(value)}; that cannot be right.")
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head") or 1
    if not config.get("head_dim") and hidden % heads:
        raise BadModel(f"{name}: {heads} attention heads do not divide a hidden size of {hidden}.")
    shared = _number(config, "num_key_value_heads") or 1
    if heads % shared and "num_attention_heads" in config:
        raise BadModel(f"{name}: {shared} heads of keys and values do not divide {heads} attention heads.")
    _check_names(config, name)
    if isinstance(inner := config.get("text_config"), dict):
        check_numbers(inner, name)


def check_tokenizer(origin: Origin) -> None:
    """Refuse a model without a tokenizer, or with one that is damaged or too large to be read.

    Raises:
        BadModel: one line that names the file.
    """
    if not any(name in origin.sizes for name in TOKENIZERS):
        raise BadModel(f"{short(origin.name)} has no tokenizer: copy tokenizer.json from the model it was made of.")
    if origin.sizes.get("tokenizer.json", 0) > LARGEST["tokenizer.json"]:
        read_object(origin, "tokenizer.json")


def _check_names(config: Mapping[str, JsonValue], name: str) -> None:
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or value not in _activations()):
            raise BadModel(f"{name}: config.json says {key} = {short(value)}; no such activation is known here.")
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in _rope_types():
            raise BadModel(f"{name}: config.json says rope_type = {short(kind)}; no such positions are known here.")


def _ropes(config: Mapping[str, JsonValue]) -> list[Mapping[str, JsonValue]]:
    """The settings of rotary positions: one, or one for each type of layer."""
    found: list[Mapping[str, JsonValue]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if isinstance(value, dict):
            inner = [each for each in value.values() if isinstance(each, dict)]
            found += inner or [value]
    return found


def _activations() -> frozenset[str]:
    from transformers.activations import ACT2CLS

    return frozenset(ACT2CLS)


def _rope_types() -> frozenset[str]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return frozenset(ROPE_INIT_FUNCTIONS) | {"default", "su", "mrope"}  # two older names that families translate


def _number(config: Mapping[str, JsonValue], *keys: str) -> int:
    return next((value for key in keys if isinstance(value := config.get(key), int)), 0)
