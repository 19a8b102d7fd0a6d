"""GGUF: the tokenizer that a file has splits a text as the model's does, or the export is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
)  # fmt: skip

from engine import artifacts
from engine.errors import BadModel
from engine.export import notes
from engine.export._gguf_tokens import BEGINS, RULES, vocabulary
from engine.models import load, load_tokenizer
from engine.places import DEMO
from engine.records import Recipe
from tests.engine.export.gguf_files import SPLITS, TEXTS, fields, made, one_line, refusal, splitting, with_bytes


def by_rule(file: Path) -> Tokenizer:
    """The tokenizer of a file, split as llama.cpp's source has the rule `smollm`: first digits, then words."""
    said = fields(file)
    vocab = {text: number for number, text in enumerate(said["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE(vocab, merges))
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (r"\p{N}", words)]
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.add_special_tokens(
        [text for text, kind in zip(vocab, said["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    )
    return found


def test_the_demos_tokens_come_back(tmp_path: Path) -> None:
    model = load(DEMO / "model")
    file = made(model, tmp_path)
    said = fields(file)
    assert file.name == "demo-BF16.gguf"
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert [said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [0, 0, 0]
    assert "tokenizer.ggml.unknown_token_id" not in said
    sizes = ("block_count", "context_length", "attention.head_count_kv", "vocab_size")
    assert [said[name] for name in sizes] == [4, 512, 2, 1280]
    assert (said["general.file_type"], said["general.quantization_version"]) == (32, 2)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    own = by_rule(file)
    for text in TEXTS:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert own.encode(text).ids == expected
        words = re.sub(r"\d+", "", text)  # `transformers` does not know the rule for digits
        expected = model.tokenizer(words, add_special_tokens=False).input_ids
        assert theirs(words, add_special_tokens=False).input_ids == expected


def merged(file: Path, text: str, spaces: bool) -> list[int]:
    """The ids of a text by SentencePiece's rule: the best neighbours merge, the first of equals, to the end."""
    said = fields(file)
    tokens = {each: number for number, each in enumerate(said["tokenizer.ggml.tokens"])}
    scores = said["tokenizer.ggml.scores"]
    parts = list(("▁" if spaces else "") + text.replace(" ", "▁"))
    while True:
        both = enumerate(itertools.pairwise(parts))
        pairs = [(scores[tokens[a + b]], -place) for place, (a, b) in both if a + b in tokens]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytewise = [[f"<0x{byte:02X}>" for byte in part.encode()] if part not in tokens else [part] for part in parts]
    return [tokens[each] for part in bytewise for each in part]


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi-3"])
def test_sentencepieces_tokens_come_back(name: str, tmp_path: Path) -> None:
    model = with_bytes(name)
    file = made(model, tmp_path)
    said = fields(file)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.add_space_prefix"]) == ("llama", name != "Gemma")
    assert (notes(file.parent) == [BEGINS]) == (name == "Llama")
    assert said["tokenizer.ggml.bos_token_id"] == model.tokenizer.bos_token_id
    assert said["tokenizer.ggml.eos_token_id"] == model.tokenizer.eos_token_id
    assert said["tokenizer.chat_template"] == model.tokenizer.chat_template
    kinds = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<0x41>"], kinds["[PAD639]"]) == (2, 6, 5)
    assert kinds["<bos>" if name == "Gemma" else "<s>"] == 3
    for text in [*(line for line in TEXTS[0].splitlines() if line), "Ünï 🚀 x  y"]:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert merged(file, text, name != "Gemma") == expected


Spoil = Callable[[dict[str, Any]], object]
BPE: dict[str, tuple[Spoil, str]] = {
    "its rule": (lambda body: body["pre_tokenizer"]["pretokenizers"].pop(0), ""),
    "another rule": (
        lambda body: body.update(pre_tokenizer={"type": "Whitespace"}), "no rule that splits a text as it does",
    ),
    "a prefix": (
        lambda body: body["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "no rule that splits",
    ),
    "a normalizer": (lambda body: body.update(normalizer={"type": "Lowercase"}), "it changes a text first (Lowercase)"),
    "whole words": (lambda body: body["model"].update(ignore_merges=True), "only with ignore_merges = False"),
    "another kind": (
        lambda body: body.update(model={"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}),
        "it is WordLevel",
    ),
    "too many": (
        lambda body: body["added_tokens"].append({**body["added_tokens"][0], "id": 1280, "content": "<more>"}),
        "it has the token 1280, and there are embeddings of 1280 alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BPE)
def test_tokenizers_that_llama_cpp_would_read_otherwise(case: str, tmp_path: Path) -> None:
    spoil, why = BPE[case]
    body = json.loads(load_tokenizer(DEMO / "model").backend_tokenizer.to_str())
    spoil(body)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(body))).save_pretrained(tmp_path)
    if not why:  # without the rule for digits it is GPT-2's
        assert vocabulary(tmp_path, "x", 1280).rule == "gpt-2"
        return
    with pytest.raises(BadModel) as caught:
        vocabulary(tmp_path, "x", 1280)
    assert why in one_line(caught.value)


@pytest.mark.parametrize("name", ["dbrx", "qwen2"])
def test_others_split_by_the_rule_that_is_named(name: str, tmp_path: Path) -> None:
    model = splitting(name)
    file = made(model, tmp_path)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected


def test_merges_that_sentencepiece_would_not_make(tmp_path: Path) -> None:
    artifacts.write(with_bytes("Llama", forgotten=5), Recipe(), tmp_path / "artifact")
    assert "its merges are not those that SentencePiece makes" in refusal(tmp_path / "artifact")


def test_every_rule_has_its_name(tmp_path: Path) -> None:
    assert {name for names in RULES.values() for name in names.values()} == set(SPLITS)
    for name in SPLITS:
        splitting(name).tokenizer.save_pretrained(tmp_path / name)
        assert vocabulary(tmp_path / name, "x", 1280).rule == name
