"""How far a model's predictions moved from the baseline's on the same text.

For each token of the held-out documents, with the baseline's distribution p and the model's q over the
vocabulary: KL(p || q) in nats, and whether both hold the same token most likely. Standard errors treat
documents as clusters. Where the model has fewer tokens, both read the text as it writes it, and p is that of its tokens
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from engine.measure._text import Document, batches, log_probabilities
from engine.measure.perplexity import ratio
from engine.models import LoadedModel
from engine.records import Measurement
from engine.vocabulary import shared_tokens

PROTOCOL = "every token of the held-out documents"
OF_SHARED = (
    ", written with the tokens that the model kept; the baseline's probabilities are of those alone, renormalised"
)


def divergence(baseline: Tensor, model: Tensor) -> Tensor:
    """KL(baseline || model) in nats along the last dimension of two tensors of log-probabilities."""
    return (baseline.exp() * (baseline - model)).sum(-1).clamp(min=0)


def known_as(ids: Sequence[int], shared: Tensor | None) -> list[int]:
    """The baseline's ids of a model's tokens, given those that `shared_tokens` found."""
    return list(ids) if shared is None else shared[torch.tensor(ids, dtype=torch.long)].tolist()


def among(logs: Tensor, shared: Tensor | None) -> Tensor:
    """Log-probabilities (..., V) of the shared tokens alone, given that it is one of them."""
    return logs if shared is None else torch.log_softmax(logs[..., shared.to(logs.device)], -1)


def measure(model: LoadedModel, baseline: LoadedModel, documents: Sequence[Document]) -> list[Measurement]:
    """KL to the baseline and top-1 agreement.

    Raises:
        InputError: the two have different vocabularies.
    """
    shared = shared_tokens(model, baseline)
    sums = [0.0] * len(documents)
    agreed = [0.0] * len(documents)
    for batch in batches([document.ids for document in documents]):
        rows = [documents[i].ids for i in batch]
        reference = among(log_probabilities(baseline, [known_as(row, shared) for row in rows]), shared)
        found = log_probabilities(model, rows)
        if shared is not None and found.shape[-1] > len(shared):  # padding that the baseline has not
            found = torch.log_softmax(found[..., : len(shared)], -1)
        kl, same = divergence(reference, found), reference.argmax(-1) == found.argmax(-1)
        for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
            sums[index] = kl[place, : len(row) - 1].sum().item()
            agreed[index] = float(same[place, : len(row) - 1].sum())
    counts = [len(document.ids) - 1 for document in documents]
    value, error = ratio(sums, counts)
    agreement, agreement_error = ratio(agreed, counts)
    details: dict[str, JsonValue] = {"protocol": PROTOCOL + (OF_SHARED if shared is not None else ""),
                                     "tokens": sum(counts)}  # fmt: skip
    if shared is not None:  # where these are fewer, the baseline reads the text worse than it could
        texts = [str(baseline.tokenizer.decode(known_as(document.ids[1:], shared))) for document in documents]
        details["tokens_of_baseline"] = sum(
            map(len, baseline.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
        )
    return [
        Measurement(name="kl", value=value, error=error, unit="nat", higher_is_better=False, details=details),
        Measurement(
            name="top1_agreement", value=agreement, error=agreement_error, unit="1", higher_is_better=True,
            details=details,
        ),
    ]  # fmt: skip
