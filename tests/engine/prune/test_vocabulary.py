"""Vocabulary: the round trip of a text and of others, ids everywhere, logits of what stays, and who is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from engine import artifacts, vocabulary
from engine.errors import BadModel, BadText, InputError
from engine.measure import divergence, outputs
from engine.measure._text import Document, encode, log_probabilities
from engine.methods import Context
from engine.models import LoadedModel
from engine.places import DEMO
from engine.prune import vocabulary as method
from engine.records import Recipe
from tests.conftest import Recorder, in_memory, tiny_config
from tests.sentencepiece import Kind, sentencepiece

TEXT = ["The lamp is in the barn.", "Ada has 12 keys; who has them? Ada.", "Привет, мир! naïve 12 + 7 = 19"]
UNSEEN = ["Zürich — 東京 🗜️\tquartz\n\n", "the barns and the lamps", "\x00\x7f ", "", "  both ends  ", "\n<0x41> x"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "few.txt"
    file.write_text("\n".join(TEXT))
    return file


def with_tokenizer(*, ignore_merges: bool = False, pairs: bool = False) -> LoadedModel:
    """A model with added tokens after the vocabulary, rows for none, an end token that is not the first, and a head.

    pairs: every split of a token into two others is a merge, as in vocabularies that were converted from tiktoken's.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((DEMO / "text.txt").read_text().splitlines()[:400] + TEXT, trainer)
    if pairs:
        body = json.loads(tokenizer.to_str())
        ids = body["model"]["vocab"]
        splits = [
            [token[:cut], token[cut:]]
            for token in sorted(ids, key=ids.__getitem__)
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        body["model"]["merges"] = splits
        tokenizer = Tokenizer.from_str(json.dumps(body))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken("<pad>")])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    ids = {"bos_token_id": start, "eos_token_id": start + 1, "pad_token_id": start + 2}
    model = in_memory(tiny_config(vocab_size=640, tie_word_embeddings=False, **ids), torch.float32)
    model.tokenizer = fast
    model.network.generation_config = GenerationConfig(
        **(ids | {"eos_token_id": [start + 1, start]}), max_new_tokens=start, suppress_tokens=[start + 2]
    )
    return model


def with_bytes(name: str) -> LoadedModel:
    """A model with SentencePiece's BPE with byte fallback: as Llama 2's file has it, or as a class makes it."""
    kind: Kind = "Gemma" if name == "Gemma's" else "Llama" if name == "Llama's" else "a file"
    fast = sentencepiece(kind, (DEMO / "text.txt").read_text().splitlines()[:400] + TEXT, 360)
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    model = in_memory(tiny_config(vocab_size=640, tie_word_embeddings=False, **ids), torch.float32)
    model.tokenizer = fast
    return model


def made(name: str) -> LoadedModel:
    if name in ("byte fallback", "Llama's", "Gemma's"):
        return with_bytes(name)
    if name == "demo":
        return in_memory(tiny_config(), torch.float32)
    return with_tokenizer(ignore_merges=name == "ignoring merges", pairs=name == "all pairs")


def strings(model: LoadedModel, text: str) -> list[str]:
    found: list[str] = model.tokenizer.convert_ids_to_tokens(model.tokenizer(text).input_ids)
    return found


@torch.inference_mode()
def logits(model: LoadedModel, ids: list[int]) -> Tensor:
    found: Tensor = model.network(torch.tensor([ids]), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize(
    "name", ["demo", "added tokens", "ignoring merges", "all pairs", "byte fallback", "Llama's", "Gemma's"]
)
def test_the_text_is_split_as_before_and_any_other_can_be_written(
    name: str, text: Path, context: Context, recorder: Recorder, tmp_path: Path
) -> None:
    model = made(name)
    smaller = method.apply(model, method.Params(text=str(text)), context)
    assert any("times as many tokens as before" in line for line in recorder.logs())
    size = smaller.network.config.vocab_size
    assert 256 < size < model.network.config.vocab_size
    artifacts.write(smaller, Recipe(), tmp_path / "artifact")
    stranger = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    assert sorted(stranger.get_vocab().values()) == list(range(size))
    for line in TEXT:
        assert strings(smaller, line) == strings(model, line)
        ids = stranger(line).input_ids
        assert ids == smaller.tokenizer(line).input_ids
        assert stranger.decode(ids, skip_special_tokens=True) == line
    for line in UNSEEN:
        ids = smaller.tokenizer(line).input_ids
        written = smaller.tokenizer.decode(ids, skip_special_tokens=True)
        assert written == model.tokenizer.decode(model.tokenizer(line).input_ids, skip_special_tokens=True)
        assert written.strip(" ") == line.strip(" ")  # Llama's class leaves out one of two spaces at the beginning
        assert max(ids, default=0) < size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    ids = smaller.tokenizer(TEXT[1]).input_ids
    old = model.tokenizer(TEXT[1]).input_ids
    theirs = model.tokenizer.get_vocab()
    kept = [theirs[token] for token in smaller.tokenizer.convert_ids_to_tokens(list(range(size)))]
    assert [kept[number] for number in ids] == old
    expected = logits(model, old)[:, kept]
    torch.testing.assert_close(logits(smaller, ids), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(torch.tensor([ids])).logits[0], expected, rtol=1e-5, atol=1e-6)


def test_ids_in_configs_follow_their_tokens(text: Path, context: Context) -> None:
    model = with_tokenizer()
    smaller = method.apply(model, method.Params(text=str(text)), context)
    tokenizer, config, generation = smaller.tokenizer, smaller.network.config, smaller.network.generation_config
    assert generation is not None
    start, end, pad = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"])
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (start, end, pad)
    assert (generation.bos_token_id, generation.eos_token_id, generation.suppress_tokens) == (
        start,
        [end, start],
        [pad],
    )
    assert generation.max_new_tokens == model.network.config.bos_token_id  # a number of tokens, no id
    assert tokenizer("a").input_ids[0] == start
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (start, end, pad)
    before = model.network.generation_config
    assert before is not None
    assert before.bos_token_id == model.network.config.bos_token_id  # the original is as it was


def test_closure_reaches_down_to_bytes_through_every_pair() -> None:
    merges = [["a", "b"], ["ab", "c"], ["b", "c"], "a bc", ["x", "y"]]
    body = {
        "model": {"vocab": dict.fromkeys(["a", "b", "c", "x", "y", "ab", "bc", "abc", "xy"], 0), "merges": merges},
        "added_tokens": [{"content": "<s>"}],
    }
    assert vocabulary.closure(body, ["abc"]) == {"a", "b", "c", "x", "y", "ab", "bc", "abc", "<s>"}


def test_closure_of_byte_fallback_keeps_bytes_and_the_sign_of_a_space_and_no_other_character() -> None:
    body = {
        "model": {
            "byte_fallback": True, "unk_token": "<unk>", "merges": [["a", "b"], ["▁", "ab"], ["c", "d"]],
            "vocab": dict.fromkeys(["<unk>", *vocabulary.BYTES, "▁", "a", "b", "c", "d", "ab", "▁ab", "cd"], 0),
        },
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "added_tokens": [],
    }  # fmt: skip
    assert vocabulary.closure(body, ["ab"]) == {"<unk>", *vocabulary.BYTES, "▁", "a", "b", "ab"}


def test_a_second_time_there_is_nothing_to_drop(text: Path, context: Context, recorder: Recorder) -> None:
    once = method.apply(in_memory(tiny_config()), method.Params(text=str(text)), context)
    assert method.apply(once, method.Params(text=str(text)), context) is once
    assert any("nothing is dropped" in line for line in recorder.logs())


def test_divergence_is_over_the_tokens_that_both_have(text: Path, context: Context) -> None:
    baseline = in_memory(tiny_config(), torch.float32)
    other = in_memory(tiny_config(), torch.float32, seed=1)
    smaller = method.apply(other, method.Params(text=str(text)), context)
    documents = [Document(tuple(encode(smaller.tokenizer, line)), len(line)) for line in [*TEXT, UNSEEN[1]]]
    kl, agreement = divergence.measure(smaller, baseline, documents)
    kept = vocabulary.shared_tokens(smaller, baseline)
    assert kept is not None
    total = same = tokens = 0.0
    for document in documents:
        q = log_probabilities(smaller, [document.ids])[0]
        full = log_probabilities(baseline, [[int(kept[number]) for number in document.ids]])[0]
        for place in range(len(document.ids) - 1):
            p = full[place].exp()[kept].double()
            p = p / p.sum()
            total += float((p * (p.log() - q[place].double())).sum())
            same += float(p.argmax() == q[place].argmax())
            tokens += 1
    assert kl.value == pytest.approx(total / tokens, rel=1e-3)
    assert agreement.value == pytest.approx(same / tokens)
    assert "renormalised" in str(kl.details["protocol"])
    whole = sum(len(encode(baseline.tokenizer, line)) - 1 for line in [*TEXT, UNSEEN[1]])
    assert kl.details["tokens_of_baseline"] == whole < tokens  # the unseen line takes more
    itself = method.apply(in_memory(tiny_config(), torch.float32), method.Params(text=str(text)), context)
    assert divergence.measure(itself, baseline, documents)[0].value < 1e-6
    (found,) = outputs.measure(itself, baseline, ["The lamp"])
    assert found.forced
    assert max(token.kl or 0.0 for token in found.forced) < 1e-5


def test_other_vocabularies_are_still_refused(text: Path, context: Context) -> None:
    model = with_tokenizer()
    with pytest.raises(InputError, match="640 tokens, the baseline 1280"):
        vocabulary.shared_tokens(model, in_memory(tiny_config()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda body: body["model"].update(type="Unigram"),
            "is byte-level Unigram; tokens can be dropped from byte-level",
        ),
        (
            lambda body: body["model"].update(type="Unigram", byte_fallback=True),
            "is Unigram with byte fallback; tokens",
        ),
        (lambda body: body["model"].update(type="WordPiece"), "is byte-level WordPiece; tokens"),
        (lambda body: body["model"].update(byte_fallback=True), "lacks some of the bytes"),
        (lambda body: body["model"].update(end_of_word_suffix="</w>"), "marks the parts of words"),
    ],
)
def test_other_tokenizers_are_refused_before_work(
    change: Callable[[dict], None], words: str, tiny_folder: Callable[..., Path]
) -> None:
    folder = tiny_folder()
    body = json.loads((folder / "tokenizer.json").read_text())
    change(body)
    (folder / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(BadModel, match=words):
        method.Params().check_sources(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadModel, match=r"no tokenizer\.json"):
        method.Params().check_sources(folder)


def test_a_text_that_is_missing_or_empty_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(BadText, match="There is no text"):
        method.Params(text=str(tmp_path / "none.txt")).check_sources(DEMO / "model")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BadText, match="is empty"):
        method.Params(text=str(tmp_path / "empty.txt")).check_sources(DEMO / "model")


def test_vocabularies_that_differ_by_padding_are_compared_over_what_both_have() -> None:
    padded, plain = in_memory(tiny_config(vocab_size=1344)), in_memory(tiny_config())
    for model, baseline in ((padded, plain), (plain, padded)):
        kept = vocabulary.shared_tokens(model, baseline)
        assert kept is not None
        assert kept.tolist() == list(range(1280))
        document = Document(tuple(range(20, 60)), 10)
        kl, *_ = divergence.measure(model, baseline, [document])
        assert kl.value > 0
