"""What is measured on: documents, questions and prompts, as token ids; and how a model reads batches of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.fit import LOGIT_TOKENS, share
from engine.kv_cache import PackedCache, RoundedLayer, read_on
from engine.models import LoadedModel
from engine.packing import CacheGrid
from engine.places import DEMO
from engine.sizes import context_length

LONGEST = 512  # tokens of a document that are read


@dataclass(frozen=True)
class Item:
    """A multiple-choice question as token ids: the prompt, the options that may follow, the right one."""

    task: str
    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True)
class Document:
    """A held-out document: its token ids, the first only as context, and the bytes of its text."""

    ids: tuple[int, ...]
    bytes: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids that begin with the tokenizer's start token, or its end token where it has no other."""
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def documents(model: LoadedModel, parameters: int, folder: Path = DEMO) -> list[Document]:
    """The held-out text, one document a line, as much of each as the model has positions for.

    parameters: of the original, however the model holds its own; fewer documents where they are many.
    """
    lines = (folder / "heldout.txt").read_text().splitlines()
    found, longest = [], min(LONGEST, context_length(model.network.config.get_text_config().to_dict()))
    for line in lines[: share(parameters, len(lines))]:
        ids = encode(model.tokenizer, line)
        kept = ids[:longest]
        size = len(line.encode()) if len(kept) == len(ids) else len(str(model.tokenizer.decode(kept[1:])).encode())
        found.append(Document(tuple(kept), size))
    return found


def items(model: LoadedModel, parameters: int, folder: Path = DEMO) -> list[Item]:
    """The questions of every task file; `parameters` as of `documents`."""
    found = []
    for file in sorted((folder / "tasks").glob("*.jsonl")):
        lines = file.read_text().splitlines()
        for line in lines[: share(parameters, len(lines))]:
            body = json.loads(line)
            prompt = encode(model.tokenizer, body["prompt"])
            whole = [encode(model.tokenizer, body["prompt"] + option) for option in body["options"]]
            # A tokenizer may merge the end of the prompt with the option: what differs is what is scored.
            cut = min([len(prompt), *(_common(prompt, row) for row in whole)])
            options = tuple(tuple(row[cut:]) for row in whole)
            found.append(Item(file.stem, tuple(prompt[:cut]), options, body["answer"]))
    return found


def prompts(folder: Path = DEMO) -> list[str]:
    """The fixed prompts, one a line."""
    return [line for line in (folder / "prompts.txt").read_text().splitlines() if line]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of similar length, at most LOGIT_TOKENS padded tokens together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]) > LOGIT_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def log_probabilities(model: LoadedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (rows, length, vocabulary) in float32 of the token after each; padded on the right.

    Where the model holds keys and values in few bits, all of them are rounded, also the newest, which generation keeps
    as they are: a text sees what the end of one much longer than the window would.
    """
    if model.kv_cache is not None:
        return _with_rounded_cache(model, rows, model.kv_cache)
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=model.device)
    logits = model.network(input_ids=ids, use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)


def _with_rounded_cache(model: LoadedModel, rows: Sequence[Sequence[int]], grid: CacheGrid) -> Tensor:
    """`log_probabilities` of rows of equal length at a time: padding would share scales with the text."""
    lengths = [len(row) for row in rows]
    found = torch.zeros(len(rows), max(lengths), model.network.config.get_text_config().vocab_size, device=model.device)
    for length in sorted(set(lengths)):
        places = [place for place, other in enumerate(lengths) if other == length]
        ids = torch.tensor([list(rows[place]) for place in places], device=model.device)
        cache = PackedCache(model.network.config, grid, RoundedLayer)
        logits, _ = read_on(model.network, ids, cache)
        found[places, :length] = torch.log_softmax(logits.float(), -1)
    return found


def about_cache(model: LoadedModel) -> dict[str, JsonValue]:
    """What the details of a measurement say of a cache in few bits; nothing where there is none."""
    grid = model.kv_cache
    return {} if grid is None else {"kv_cache": f"{grid.bits} bit, every key and value rounded, the newest too"}
