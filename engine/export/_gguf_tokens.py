"""A tokenizer as a GGUF holds it: tokens with their types, merges or scores, and the rule that splits a text first.

llama.cpp splits text by rules of its own that a file can only name (`tokenizer.ggml.pre`). So a byte-level BPE is
recognised by its own splitting rule, whole, and refused where llama.cpp has none that is the same. BPE with byte
fallback is written as SentencePiece's: there two neighbours merge wherever what they make is a token, the best score
first; scores are the ranks of the merges, and it is refused unless the merges are those that this rule makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf import GGUFWriter, TokenType
from pydantic import JsonValue

from engine.errors import BadModel
from engine.models import load_tokenizer
from engine.vocabulary import BYTES

Body = dict[str, Any]  # of a tokenizer.json
SPACE = "▁"
BEGINS = "llama.cpp puts a space before a text that begins with one, too, which the tokenizer does not."
UNLIKELY = -1e6  # the score of what no merge makes
# The whole rules that llama.cpp names, by the parts of a tokenizer.json, and whether words that are tokens stay whole.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = ("bytes by words",)
RULES: Mapping[tuple[str, ...], Mapping[bool, str]] = MappingProxyType(
    {
        GPT2: {False: "gpt-2"},
        ("single digits", *GPT2): {False: "smollm"},
        ("punctuation", *GPT2, "digits", "split [0-9][0-9][0-9]"): {False: "falcon"},
        ("split " + _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, "bytes"): {True: "llama-bpe", False: "dbrx"},
        ("split " + _CONTRACTIONS + _WORDS + r"\p{N}" + _REST, "bytes"): {False: "qwen2"},
        ("split " + _CASED + "|" + _UPPER + r"|\p{N}" + _SLASHES, "bytes"): {True: "tekken"},
        (
            "split " + _CASED + _CONTRACTIONS + "?|" + _UPPER + _CONTRACTIONS + r"?|\p{N}{1,3}" + _SLASHES, "bytes",
        ): {False: "gpt-4o"},
        ("split  ?[^(\\s|[.,!?…。，、।۔،])]+", "bytes"): {False: "bloom"},
    }
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer; `scores` of SentencePiece's, `merges` of byte-level BPE.

    ids: of special tokens by their name in a GGUF. spaces: whether a space is put before a text.
    """

    kind: str
    rule: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float]
    merges: Sequence[str]
    ids: Mapping[str, int]
    begins: bool
    ends: bool
    spaces: bool | None
    template: str | None
    notes: Sequence[str] = ()

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.spaces is not None:
            writer.add_add_space_prefix(self.spaces)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(folder: Path, label: str, rows: int) -> Vocabulary:
    """The tokenizer of a model folder, for embeddings with so many rows.

    Raises:
        BadModel: it is no BPE of bytes or with byte fallback, or one that llama.cpp would read otherwise.
    """
    tokenizer = load_tokenizer(folder)
    body: Body = json.loads(tokenizer.backend_tokenizer.to_str())
    model = body["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _other(label, f"it is {model['type']}, and only BPE of bytes or with byte fallback can be")
    if model.get("byte_fallback") and not model["vocab"].keys() >= set(BYTES):
        raise _other(label, "it falls back to bytes, and lacks some of them")
    tokens, types = _tokens(body, label, rows, tokenizer.unk_token)
    begin, end = _around(tokenizer)
    ids = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids |= _ends(folder, tokenizer.eos_token_id)
    if begin:
        ids["bos"] = begin[0]
    if len(begin) > 1 or end not in ([], [ids.get("eos")]):
        raise _other(label, "it puts several tokens around a text, where llama.cpp has one before and its end after")
    known = {name: number for name, number in ids.items() if isinstance(number, int) and 0 <= number < len(tokens)}
    if model.get("byte_fallback"):
        kind, rule = "llama", "default"
        scores, merges, spaces = _scores(body, tokens, label), list[str](), _spaces(body, label)
        said = [BEGINS] if spaces and _kind(body.get("pre_tokenizer")) == "Metaspace" else []
    else:
        kind, scores, spaces = "gpt2", [], None
        rule, said = _rule(body, label)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    template = _template(tokenizer)
    return Vocabulary(
        kind, rule, tokens, types, scores, merges, known, bool(begin), bool(end), spaces, template, said
    )  # fmt: skip


def _other(label: str, why: str) -> BadModel:
    return BadModel(f"The tokenizer of {label} cannot be written as GGUF: {why}.")


def _tokens(body: Body, label: str, rows: int, unknown: str | None) -> tuple[list[str], list[TokenType]]:
    """All tokens by id and what they are; ids that no token has are unused ones."""
    model = body["model"]
    named: dict[int, tuple[str, TokenType]] = {}
    fallback = bool(model.get("byte_fallback"))
    for text, number in model["vocab"].items():
        kind = TokenType.BYTE if fallback and text in BYTES else TokenType.NORMAL
        named[number] = (text, TokenType.UNKNOWN if fallback and text in (unknown, model.get("unk_token")) else kind)
    for token in body["added_tokens"]:
        if named.get(token["id"], ("", None))[1] not in (TokenType.UNKNOWN, TokenType.BYTE):
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            named[token["id"]] = (token["content"], kind)
    if named and max(named) >= rows:
        raise _other(label, f"it has the token {max(named)}, and there are embeddings of {rows} alone")
    unused = ((f"[PAD{number}]", TokenType.UNUSED) for number in range(rows))
    found = [named.get(number, other) for number, other in enumerate(unused)]
    texts = [text for text, _ in found]
    if len(set(texts)) != rows or "" in texts:
        raise _other(label, "two of its tokens are written alike, or one is empty")
    return texts, [kind for _, kind in found]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def _ends(folder: Path, own: int | None) -> dict[str, JsonValue]:
    """What ends a text: the tokenizer's own end, and where generation ends with others the first of these as eot."""
    file = folder / "generation_config.json"
    said = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops = [number for number in (said if isinstance(said, list) else [said]) if isinstance(number, int)]
    first = own if own is not None else next(iter(stops), None)
    others = [number for number in stops if number != first]
    return {"eos": first, **({"eot": others[0]} if others else {})}


def _template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _rule(body: Body, label: str) -> tuple[str, list[str]]:
    """llama.cpp's name of the rule by which a byte-level BPE splits a text, and what is to be said of it."""
    notes: list[str] = []
    normalizer = body.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "NFC":
        notes = ["llama.cpp does not compose characters (NFC) before it reads a text, as the tokenizer does."]
    elif normalizer is not None:
        raise _other(label, f"it changes a text first ({_kind(normalizer)}), which llama.cpp does not")
    parts = _steps(body.get("pre_tokenizer"), "pretokenizers")
    rule = tuple(_part(part) for part in parts)
    names = RULES.get(rule)
    if names is None:
        raise _other(label, f"llama.cpp has no rule that splits a text as it does ({', '.join(rule)[:200]})")
    whole = bool(body["model"].get("ignore_merges"))
    if whole not in names:
        raise _other(label, f"llama.cpp has its rule only with ignore_merges = {not whole}")
    return names[whole], notes


def _steps(part: object, key: str) -> list[object]:
    """The parts of a component that is a sequence of them, else itself alone."""
    return list(part[key]) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]


def _kind(part: object) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "none"


def _part(part: object) -> str:
    """One step of a splitting rule in words that compare."""
    if not isinstance(part, dict):
        return "none"
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes by words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits":
        return "single digits" if part.get("individual_digits") else "digits"
    if kind == "Punctuation" and part.get("behavior") == "Contiguous":
        return "punctuation"
    pattern = part.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and "Regex" in pattern:
        isolated = part.get("behavior") == "Isolated" and not part.get("invert")
        removed = part.get("behavior") == "Removed" and part.get("invert")
        if isolated or removed:
            return f"split {pattern['Regex']}"
    return json.dumps(part, ensure_ascii=False)


def _spaces(body: Body, label: str) -> bool | None:
    """Whether a SentencePiece-like BPE puts a space before a text."""
    splitter: Body = body.get("pre_tokenizer") or {}
    steps = [step for step in _steps(body.get("normalizer"), "normalizers") if step is not None]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = {"type": "Prepend", "prepend": SPACE}
    if _kind(splitter) == "Metaspace" and not steps:
        if splitter.get("replacement") == SPACE and not splitter.get("split"):
            return splitter.get("prepend_scheme") in ("first", "always")
    elif steps in ([before, replaced], [replaced]):
        nothing = not splitter or (_kind(splitter) == "Split" and splitter.get("pattern") == {"String": " "})
        if nothing:  # no space is left to split at
            return len(steps) == 2
    raise _other(label, "it treats spaces as SentencePiece does not")


def _scores(body: Body, tokens: Sequence[str], label: str) -> list[float]:
    """A score for each token by which SentencePiece's rule merges as the tokenizer does: the rank of its merges."""
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in body["model"]["merges"]]
    order = [made for made, _ in groupby(left + right for left, right in merges)]
    ranks = {made: rank for rank, made in enumerate(order)}
    known, pairs = body["model"]["vocab"], set(merges)
    beyond = {token["content"] for token in body["added_tokens"]} | set(BYTES)
    whole = all(
        (text[:cut], text[cut:]) in pairs or not (text[:cut] in known and text[cut:] in known)
        for text in known
        if text not in beyond
        for cut in range(1, len(text))
    )
    if len(ranks) != len(order) or not whole or body["model"].get("ignore_merges"):
        raise _other(label, "its merges are not those that SentencePiece makes of its tokens")
    return [-float(ranks[text]) if text in ranks else UNLIKELY for text in tokens]
