"""What a model writes after fixed prompts, token by token, and how it sees the baseline's own text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.generate import generate, score
from engine.measure._text import encode
from engine.measure.divergence import among, divergence, known_as
from engine.models import LoadedModel
from engine.records import Output, Token
from engine.vocabulary import shared_tokens

TOP = 5
LENGTH = 40  # tokens


def measure(model: LoadedModel, baseline: LoadedModel | None, prompts: Sequence[str]) -> Iterator[Output]:
    """The greedy continuation of each prompt; with a baseline, also its text as this model sees it."""
    for prompt in prompts:
        ids = encode(model.tokenizer, prompt)
        written = [(step.token_id, step.logprobs) for step in generate(model, ids, max_new_tokens=LENGTH)]
        tokens = describe_all(model.tokenizer, [i for i, _ in written], [logs for _, logs in written])
        forced: list[Token] = []
        if baseline is not None:
            forced = _forced(model, baseline, prompt)
        yield Output(prompt=prompt, tokens=tuple(tokens), forced=tuple(forced))


def _forced(model: LoadedModel, baseline: LoadedModel, prompt: str) -> list[Token]:
    """What the baseline writes after a prompt as the model sees it; with the model's tokens, where it has fewer."""
    start = encode(baseline.tokenizer, prompt)
    text = [step.token_id for step in generate(baseline, start, max_new_tokens=LENGTH)]
    shared = shared_tokens(model, baseline)
    if shared is not None:
        start = encode(model.tokenizer, prompt)
        written = str(baseline.tokenizer.decode(text))
        text = model.tokenizer(written, add_special_tokens=False, verbose=False).input_ids
    whole = known_as(start + text, shared)
    reference = among(score(baseline, whole, len(start)), shared)
    return force(model, start, text, reference)


def force(model: LoadedModel, prompt: list[int], text: list[int], reference: Tensor) -> list[Token]:
    """`text` after `prompt` as the model sees it, with the KL to `reference` (len(text), V) log-probabilities."""
    if not text:
        return []
    ours = score(model, prompt + text, len(prompt))
    known = ours[:, : reference.shape[-1]]  # without padding that the baseline has not
    known = known if known.shape == ours.shape else known.log_softmax(-1)
    shifts = divergence(reference.to(ours.device), known).tolist()
    tokens = describe_all(model.tokenizer, text, list(ours))
    return [token.model_copy(update={"kl": kl}) for token, kl in zip(tokens, shifts, strict=True)]


def describe_all(tokenizer: PreTrainedTokenizerBase, ids: list[int], logs: Sequence[Tensor]) -> list[Token]:
    """A Token for each id, given the log-probabilities (V,) that it was drawn from."""
    return [describe(tokenizer, ids, place, logs[place]) for place in range(len(ids))]


def describe(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int, logs: Tensor) -> Token:
    """The token at `place` of `ids`, with the five likeliest in its place.

    Its text is what it adds to the text before it, so that characters of several tokens come out whole.
    """
    before = str(tokenizer.decode(ids[max(0, place - 4) : place]))
    text = str(tokenizer.decode(ids[max(0, place - 4) : place + 1]))[len(before) :]
    values, indices = torch.topk(logs, min(TOP, logs.shape[-1]))
    top = tuple((str(tokenizer.decode([i])), p) for i, p in zip(indices.tolist(), values.exp().tolist(), strict=True))
    return Token(text=text, probability=min(1.0, float(logs[ids[place]].exp())), top=top)
