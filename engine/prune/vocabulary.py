"""Drop the tokens that a given text never uses: embeddings, head and tokenizer together, ids renumbered.

For a model that will only see one language, domain or format: large vocabularies are a third of a small model, and most
of their tokens are never seen. Unlike other pruning it costs nothing on that text: it is split into the very same
tokens, and the logits of those that stay are what they were. Any other text can still be written, but in more and
smaller tokens than the model learned it in, and that it reads badly: on such text bits per byte say what it cost. KL
does not, for the original is given the same small tokens. The log says how the calibration text is split before and
after.

Kept besides: special and added tokens, single bytes, those that the config names, and all parts that merge into kept
ones. For BPE (tokenizer.json) that is byte-level, or has byte fallback, as SentencePiece's has in Llama 2, Mistral and
Gemma: there a character that the text does not use is written in bytes. Other tokenizers are refused. Reducing
vocabularies of pretrained models to a corpus is described by Abdaoui et al., 2020, arXiv 2010.05609. Perplexities are
comparable by bits per byte only.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, JsonValue

from engine import vocabulary
from engine.errors import BadModel
from engine.methods import Context
from engine.methods import Params as Base
from engine.models import LoadedModel
from engine.places import text_file, whole
from engine.text import is_long, read_documents
from engine.vocabulary import closure, keep_tokens

TITLE = "Vocabulary pruning"
CHANGES = ("disk", "memory", "latency")
TOGETHER = 1000  # documents that are split into tokens at a time


class Params(Base):
    """Settings of vocabulary pruning: the text whose tokens stay."""

    text: str = Field(
        "demo", max_length=4096, description="Text whose tokens stay: `demo`, or a text or JSONL file. Give much of it."
    )

    def file(self) -> Path:
        """Where the text is.

        Raises:
            BadText: it is not there.
        """
        return text_file(self.text, "text")

    def rooted(self) -> dict[str, JsonValue]:
        """The text."""
        return {"text": whole(self.text)}

    def unfit_for(self, name: str, later: Base) -> str:
        """Distillation: its teacher is the original."""
        if name.startswith("distill/"):
            return "the original has other tokens than the model then, and can teach it nothing. Put it before."
        return ""

    def calibration_length(self) -> int | None:
        """However short: the log says how it is split."""
        return 1

    def check_sources(self, folder: Path | None) -> None:
        """Refuse a text that is not there or empty, and tokenizers that tokens cannot be dropped from."""
        is_long(self.file())
        if folder is not None:
            vocabulary.read(folder)


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Split the text, keep what it uses and what that needs, and prove it on the text.

    Raises:
        BadModel: the tokenizer splits the text otherwise afterwards.
    """
    documents = read_documents(params.file())
    rows = split(model, documents, context)
    kept = kept_ids(model, {number for row in rows for number in row})
    total = model.network.config.get_text_config().vocab_size
    if len(kept) == total:
        context.log(f"the text uses, or needs, all {total} tokens: nothing is dropped")
        return model
    smaller = keep_tokens(model, kept)
    prove(rows, split(smaller, documents, context), kept)
    context.log(f"{len(kept)} of {total} tokens stay; the text is split as before")
    others = read_documents(context.calibration)[:TOGETHER]
    old, new = (sum(map(len, split(each, others, context))) for each in (model, smaller))
    context.log(f"the calibration text takes {new / old:.2f} times as many tokens as before")
    return smaller


def split(model: LoadedModel, documents: list[str], context: Context) -> list[list[int]]:
    """The token ids of each document."""
    found: list[list[int]] = []
    for start in range(0, len(documents), TOGETHER):
        context.check_cancelled()
        found += model.tokenizer(documents[start : start + TOGETHER], truncation=False, verbose=False).input_ids
        context.progress(min(start + TOGETHER, len(documents)), len(documents), "documents")
    return found


def kept_ids(model: LoadedModel, used: set[int]) -> list[int]:
    """The ids that stay, in order: those that are used, and what they and any text need."""
    body = json.loads(model.tokenizer.backend_tokenizer.to_str())
    vocabulary.check(body, type(model.tokenizer).__name__)
    ids = model.tokenizer.get_vocab()
    tokens = {number: token for token, number in ids.items()}
    named = used | vocabulary.ids_of_configs(model) | set(model.tokenizer.all_special_ids)
    needed = {ids[token] for token in closure(body, (tokens[number] for number in named if number in tokens))}
    size = model.network.config.get_text_config().vocab_size
    if beyond := [number for number in needed if number >= size]:
        raise BadModel(f"The tokenizer has the token {tokens[beyond[0]]!r}, the model has no row for it. Use another.")
    return sorted(needed)


def prove(before: list[list[int]], after: list[list[int]], kept: list[int]) -> None:
    """Compare each document's tokens before and after.

    Raises:
        BadModel: they differ.
    """
    for old, new in zip(before, after, strict=True):
        if old != [kept[number] for number in new]:
            raise BadModel("With fewer tokens the tokenizer splits the text otherwise; its tokens stay as they are.")
