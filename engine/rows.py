"""Packed rows of token ids, with each token's place in its document.

Rows have no padding: documents follow one another, and one that does not fit goes on in the next row. Positions start
at 0 with each document and each row; attention that heeds them does not cross from one document into another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.text import read_documents, too_short

TOGETHER = 512  # documents that are tokenized at a time, and characters, so that no more is read than is wanted
TOGETHER_LONG = 1 << 18
HELD_EACH, MOST_HELD = 20, 32  # one row in so many is held out, so many at most


@dataclass(frozen=True)
class Rows:
    """Token ids (rows, length) and positions (rows, length), int32."""

    ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and positions (B, length) of some rows, as a network wants them."""
        numbers = numbers.cpu()
        return self.ids[numbers].long().to(device), self.positions[numbers].long().to(device)

    def prompts(self, numbers: Tensor, count: int) -> Tensor:
        """The first `count` tokens (B, count) of a document in each of some rows; of the row, where none is so long.

        A row mostly begins within a document, so one that begins later is taken first.
        """
        ids, positions = self.of(numbers, torch.device("cpu"))
        parts = positions.unfold(1, count, 1)  # (B, places, count)
        begins = (parts[..., 0] == 0) & (parts[..., -1] == count - 1)
        places = torch.arange(parts.shape[1])
        preferred = torch.where(begins & (places > 0), 2 * len(places), 0) - places  # the first of the best
        start = preferred.argmax(1, keepdim=True)
        return ids.gather(1, start + torch.arange(count))

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 of some rows, in hexadecimal."""
        found = hashlib.sha256(str(tuple(self.ids[start:stop].shape)).encode())
        for part in (self.ids, self.positions):
            found.update(part[start:stop].contiguous().numpy().tobytes())
        return found.hexdigest()

    def split(self) -> tuple[Rows, Rows]:
        """The rows to train on, and those held out: one in `HELD_EACH`, the same however many rows follow.

        Of few rows the last is held out, of a single one none.
        """
        numbers = torch.arange(len(self))
        held = numbers % HELD_EACH == HELD_EACH // 2
        held &= held.cumsum(0) <= MOST_HELD
        if not held.any() and len(self) > 1:
            held[-1] = True
        return Rows(self.ids[~held], self.positions[~held]), Rows(self.ids[held], self.positions[held])


def packed_rows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int, count: int | None = None) -> Rows:
    """Rows of a text's documents, in order; `count` rows at most.

    Raises:
        BadText: the text is empty, or shorter than one row.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in tokenized(tokenizer, path):
        ids += document
        positions += range(len(document))
        if count is not None and len(ids) >= count * length:
            break
    rows = len(ids) // length
    if rows == 0:
        raise too_short(path, len(ids), length)
    packed = torch.tensor([ids[: rows * length], positions[: rows * length]], dtype=torch.int32)
    shaped = packed.view(2, rows, length)[:, :count]
    return Rows(shaped[0], shaped[1] - first_of_row(shaped[1]))


def first_of_row(positions: Tensor) -> Tensor:
    """What to subtract (rows, length) so that the document that a row begins with starts at 0."""
    begun = (torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)  # documents begun in the row
    return torch.where(begun == 0, positions[:, :1], 0).to(positions.dtype)


def tokenized(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[list[int]]:
    """The token ids of each document, with one that ends it where the tokenizer knows one and puts none before it."""
    end = tokenizer.eos_token_id
    for group in _groups(read_documents(path)):
        for row in tokenizer(group, truncation=False, verbose=False).input_ids:
            yield [*row, end] if end is not None and (not row or row[0] != end) else row


def _groups(documents: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if len(group) == TOGETHER or size >= TOGETHER_LONG:
            yield group
            group, size = [], 0
    if group:
        yield group
