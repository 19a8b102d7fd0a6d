"""Tokenizers with SentencePiece's BPE and byte fallback, learnt from some lines: as of Llama 2, Gemma and Phi-3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from engine.vocabulary import BYTES

Kind = Literal["Llama", "Gemma", "a file"]  # by its class, or as a file has it


def sentencepiece(kind: Kind, lines: Iterable[str], size: int, *, forgotten: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of about `size` tokens, with all merges that its tokens make, but for the last so many."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] if kind == "Gemma" else ["<unk>", "<s>", "</s>"]
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocab = {token: number for number, token in enumerate([*special, *BYTES, *learnt])}
    merges = generate_merges(vocab, {token: -float(vocab[token]) for token in learnt})
    merges = merges[: len(merges) - forgotten]
    if kind == "Gemma":
        return GemmaTokenizer(vocab=vocab, merges=merges)
    if kind == "Llama":
        return LlamaTokenizer(vocab=vocab, merges=merges)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
