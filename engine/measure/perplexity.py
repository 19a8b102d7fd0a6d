"""Perplexity and bits per byte on held-out text.

Each document stands alone, with a start token and no context from another. With n tokens and a summed
negative log-likelihood of L nats: perplexity = exp(L / n), bits per byte = L / (bytes * ln 2). Standard
errors treat documents as clusters (ratio estimator, delta method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import JsonValue

from engine.measure._text import Document, batches, log_probabilities
from engine.models import LoadedModel
from engine.records import Measurement


def measure(model: LoadedModel, documents: Sequence[Document]) -> list[Measurement]:
    """Perplexity and bits per byte of the documents."""
    losses = [0.0] * len(documents)
    for batch in batches([document.ids for document in documents]):
        rows = [documents[i].ids for i in batch]
        logs = log_probabilities(model, rows)
        for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
            picked = logs[place, : len(row) - 1].gather(1, torch.tensor(row[1:], device=logs.device)[:, None])
            losses[index] = -picked.sum().item()
    return from_losses(losses, documents)


def from_losses(losses: Sequence[float], documents: Sequence[Document]) -> list[Measurement]:
    """The two measurements from each document's summed negative log-likelihood in nats."""
    tokens = [len(document.ids) - 1 for document in documents]
    sizes = [document.bytes for document in documents]
    mean, error = ratio(losses, tokens)
    bits, bits_error = ratio([loss / math.log(2) for loss in losses], sizes)
    details: dict[str, JsonValue] = {
        "protocol": "each held-out document alone, start token prepended",
        "documents": len(documents),
        "tokens": sum(tokens),
        "bytes": sum(sizes),
    }
    perplexity = math.exp(min(mean, 700.0))
    return [
        Measurement(
            name="perplexity", value=perplexity, error=perplexity * error, unit="1", higher_is_better=False,
            details=details,
        ),
        Measurement(
            name="bits_per_byte", value=bits, error=bits_error, unit="bit/B", higher_is_better=False,
            details=details,
        ),
    ]  # fmt: skip


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """sum(sums) / sum(counts) and its standard error over clusters."""
    n, total = len(sums), sum(counts)
    value = sum(sums) / total
    if n < 2:
        return value, 0.0
    residuals = sum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return value, math.sqrt(residuals * n / (n - 1)) / total
