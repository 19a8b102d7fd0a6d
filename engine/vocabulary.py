"""A model with fewer tokens: its tokenizer, embeddings, head and the ids in its configs, renumbered together.

For BPE whose 256 bytes write any text, whatever other tokens there are: byte-level (GPT-2, Llama 3, Qwen, ...), where
every character of a token is a byte, and with byte fallback (Llama 2, Mistral, Phi-3, Gemma), where `<0x00>` to
`<0xFF>` stand for the characters that have no token.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.errors import BadModel, InputError, short
from engine.models import LoadedModel, embeddings, head, load_tokenizer
from engine.surgery import assemble

Body = dict[str, Any]
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))  # of byte fallback
REWRITING = ("normalizer", "pre_tokenizer", "decoder")  # parts of a tokenizer.json
STAND_INS = ("prepend", "content", "replacement", "String")  # what they say of characters
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")  # beside *_token_id


def read(folder: Path) -> Body:
    """The tokenizer.json of a model folder.

    Raises:
        BadModel: there is none, or it is no BPE that falls back to bytes.
    """
    try:
        body: Body = json.loads((folder / "tokenizer.json").read_text())
    except (OSError, ValueError):
        raise BadModel(
            f"{short(folder.name)} has no tokenizer.json that can be read; tokens stay as they are."
        ) from None
    check(body, folder.name)
    return body


def check(body: Body, name: str) -> None:
    """Refuse a tokenizer.json that is no byte-level BPE and none with byte fallback.

    Raises:
        BadModel: one line that says what it is.
    """
    model = body["model"]
    kind, kinds = str(model.get("type")), _kinds(body)
    if model.get("byte_fallback"):
        lacking = kind == "BPE" and not ("ByteFallback" in kinds and model["vocab"].keys() >= set(BYTES))
        kind += " with byte fallback that lacks some of the bytes" if lacking else " with byte fallback"
    elif "ByteLevel" in kinds:
        kind = f"byte-level {kind}"
    if kind not in ("byte-level BPE", "BPE with byte fallback"):
        raise BadModel(
            f"The tokenizer of {short(name)} is {kind}; tokens can be dropped from byte-level BPE and from BPE with "
            "byte fallback only."
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise BadModel(f"The tokenizer of {short(name)} marks the parts of words; tokens cannot be dropped from it.")


def _kinds(body: Body) -> set[str]:
    return set(_types(body.get("pre_tokenizer"))) | set(_types(body.get("decoder")))


def _types(part: object) -> Iterable[str]:
    """The types of a component of a tokenizer and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for value in part.values():
            if isinstance(value, list):
                for each in value:
                    yield from _types(each)


def closure(body: Body, used: Iterable[str]) -> set[str]:
    """The tokens that a tokenizer needs to write `used` as before, and any other text at all.

    With every token all pairs that merge into it, and so on down to bytes: then the merges that made it from a text
    are there in the same order, and none that was not there could come before them. Added tokens stay.

    With byte fallback a character whose token is dropped is written in bytes; not the one that stands for a space: the
    decoder makes a space of its token alone, before it reads bytes.
    """
    parts: dict[str, set[str]] = {}
    for left, right in _merges(body):
        parts.setdefault(left + right, set()).update((left, right))
    vocabulary = body["model"]["vocab"]
    needed = {token["content"] for token in body["added_tokens"]}
    if body["model"].get("byte_fallback"):
        own = {str(body["model"].get("unk_token")), *_stand_ins([body.get(part) for part in REWRITING])}
        needed |= (own | set(BYTES)) & vocabulary.keys()
    if "ByteLevel" in _kinds(body) or not body["model"].get("byte_fallback"):
        needed |= {token for token in vocabulary if len(token) == 1}
    waiting = list(needed | set(used))
    found = set(waiting)
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def _stand_ins(part: object) -> set[str]:
    """The characters that a tokenizer's rules put in the place of others, or take back: `▁` for a space."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    found = {each for value in inner for each in _stand_ins(value)}
    texts = [part.get(key) for key in STAND_INS] if isinstance(part, dict) else []
    return found | {each for text in texts if isinstance(text, str) for each in text}


def _merges(body: Body) -> list[tuple[str, str]]:
    """The merges in order; older files have them as one string each."""
    pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in body["model"]["merges"])
    return [(left, right) for left, right in pairs]


def shrink(tokenizer: PreTrainedTokenizerBase, new_ids: dict[int, int]) -> PreTrainedTokenizerBase:
    """The tokenizer with these tokens alone: old id to new.

    Raises:
        BadModel: it does not come back as it was written.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        body = read(folder)
        model = body["model"]
        model["vocab"] = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
        model["merges"] = [list(pair) for pair in _merges(body) if {*pair, "".join(pair)} <= model["vocab"].keys()]
        for token in body["added_tokens"]:
            token["id"] = new_ids[token["id"]]
        _renumber(body.get("post_processor"), new_ids)
        (folder / "tokenizer.json").write_text(json.dumps(body, ensure_ascii=False))
        about = json.loads((folder / "tokenizer_config.json").read_text())
        if "added_tokens_decoder" in about:
            about["added_tokens_decoder"] = {
                str(new_ids[int(number)]): token for number, token in about["added_tokens_decoder"].items()
            }
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        for stale in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / stale).unlink(missing_ok=True)
        smaller = load_tokenizer(folder)
    expected = {token: new_ids[number] for token, number in tokenizer.get_vocab().items() if number in new_ids}
    if smaller.get_vocab() != expected:
        raise BadModel(f"{type(tokenizer).__name__} does not take another vocabulary; its tokens stay as they are.")
    return smaller


def _renumber(part: object, new_ids: dict[int, int]) -> None:
    """Renumber the ids in a post-processor: those of templates, and pairs of a token and its id."""
    if isinstance(part, list):
        for each in part:
            _renumber(each, new_ids)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == "ids":
            part[key] = [new_ids[number] for number in value]
        elif key in ("sep", "cls"):
            part[key] = [value[0], new_ids[value[1]]]
        else:
            _renumber(list(value.values()) if isinstance(value, dict) and key == "special_tokens" else value, new_ids)


def ids_of_configs(model: LoadedModel) -> set[int]:
    """The token ids that the model's configs name."""
    found: set[int] = set()

    def note(value: object) -> object:
        if isinstance(value, list):
            return [note(each) for each in value]
        if isinstance(value, int) and not isinstance(value, bool):
            found.add(value)
        return value

    for config in (model.network.config, model.network.config.get_text_config(), model.network.generation_config):
        _each_id(config, note)
    return {number for number in found if 0 <= number < model.network.config.get_text_config().vocab_size}


def _each_id(config: object, change: Callable[[object], object]) -> None:
    """Change the token ids of a config, where there is one."""
    for key, value in list(vars(config).items()) if config is not None else []:
        if (key.endswith("_token_id") or key in ID_LISTS) and isinstance(value, int | list):
            setattr(config, key, change(value))


def keep_tokens(model: LoadedModel, kept: Sequence[int]) -> LoadedModel:
    """A model that has the tokens with these ids alone, in ascending order.

    Raises:
        BadModel: its tokenizer cannot lose tokens, or other tensors of it belong to tokens.
    """
    text = model.network.config.get_text_config()
    new_ids = {old: new for new, old in enumerate(kept)}
    tokenizer = shrink(model.tokenizer, new_ids)
    of_tokens = {f"{name}.weight" for name in (embeddings(model.network)[0], head(model.network)[0])}
    of_tokens.add(f"{head(model.network)[0]}.bias")
    rows = torch.tensor(kept)

    def fewer(key: str, weight: Tensor) -> Tensor:
        if key in of_tokens:
            return weight.index_select(0, rows.to(weight.device))
        if text.vocab_size in weight.shape and "embed" in key:
            raise BadModel(f"{key} belongs to tokens, too; tokens cannot be dropped from a {text.model_type} model.")
        return weight

    config = copy.deepcopy(model.network.config)
    config.get_text_config().vocab_size = config.vocab_size = len(kept)

    def change(value: object) -> object:
        if isinstance(value, list):
            return [changed for each in value if (changed := change(each)) is not None]
        assert isinstance(value, int)
        return new_ids.get(value) if value >= 0 else value  # None: no token has that id

    generation = copy.deepcopy(model.network.generation_config)
    for each in {id(c): c for c in (config, config.get_text_config(), generation)}.values():
        _each_id(each, change)
    smaller = assemble(model, config, fewer)
    smaller.tokenizer = tokenizer
    smaller.network.generation_config = generation
    return smaller


def shared_tokens(model: LoadedModel, baseline: LoadedModel) -> Tensor | None:
    """For each token of `model` its id in the baseline, where the model has some of the baseline's; None: the same.

    Vocabularies of one tokenizer may differ by padding: then it is the ids that both have.

    Raises:
        InputError: the two have different vocabularies otherwise.
    """
    ours = model.network.config.get_text_config().vocab_size
    theirs = baseline.network.config.get_text_config().vocab_size
    if ours == theirs:
        return None
    mine, known = model.tokenizer.get_vocab(), baseline.tokenizer.get_vocab()
    if mine == known and max(mine.values()) < min(ours, theirs):
        return torch.arange(min(ours, theirs))
    found = [known.get(token, theirs) for token in sorted(mine, key=mine.__getitem__)]
    if sorted(mine.values()) != list(range(ours)) or max(found) >= theirs:
        raise InputError(f"The model has {ours} tokens, the baseline {theirs}: their predictions cannot be compared.")
    return torch.tensor(found)
