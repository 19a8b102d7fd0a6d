"""How far a model's predictions moved from the baseline's on the same text.

For each token of the held-out documents, with the baseline's distribution p and the model's q over the
vocabulary: KL(p || q) in nats, and whether both hold the same token most likely. Standard errors treat
documents as clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue
from torch import Tensor

from engine.errors import InputError
from engine.measure._text import Document, batches, log_probabilities
from engine.measure.perplexity import ratio
from engine.models import LoadedModel
from engine.records import Measurement


def divergence(baseline: Tensor, model: Tensor) -> Tensor:
    """KL(baseline || model) in nats along the last dimension of two tensors of log-probabilities."""
    return (baseline.exp() * (baseline - model)).sum(-1).clamp(min=0)


def measure(model: LoadedModel, baseline: LoadedModel, documents: Sequence[Document]) -> list[Measurement]:
    """KL to the baseline and top-1 agreement.

    Raises:
        InputError: the two have different vocabularies.
    """
    ours, theirs = model.network.config.vocab_size, baseline.network.config.vocab_size
    if ours != theirs:
        raise InputError(f"The model has {ours} tokens, the baseline {theirs}: their predictions cannot be compared.")
    sums = [0.0] * len(documents)
    agreed = [0.0] * len(documents)
    for batch in batches([document.ids for document in documents]):
        rows = [documents[i].ids for i in batch]
        reference, found = log_probabilities(baseline, rows), log_probabilities(model, rows)
        kl, same = divergence(reference, found), reference.argmax(-1) == found.argmax(-1)
        for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
            sums[index] = kl[place, : len(row) - 1].sum().item()
            agreed[index] = float(same[place, : len(row) - 1].sum())
    counts = [len(document.ids) - 1 for document in documents]
    value, error = ratio(sums, counts)
    agreement, agreement_error = ratio(agreed, counts)
    details: dict[str, JsonValue] = {"protocol": "every token of the held-out documents", "tokens": sum(counts)}
    return [
        Measurement(name="kl", value=value, error=error, unit="nat", higher_is_better=False, details=details),
        Measurement(
            name="top1_agreement", value=agreement, error=agreement_error, unit="1", higher_is_better=True,
            details=details,
        ),
    ]  # fmt: skip
