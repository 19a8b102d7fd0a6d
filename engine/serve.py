"""A model kept warm that writes text on demand: one JSON object a line, commands in, replies out.

    {"do": "generate", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop_strings": [...],
     "write": file or null}
    {"do": "score", "prompt", "token_ids": [...], "read": file}
    {"do": "stop"}                               the command at work ends at its next token

The first two may hold "chat": true and "system": then the prompt is what a user says in the model's chat template.

    {"event": "ready", "kernels": [...]}         once, when the model is loaded
    {"event": "token", "id", "text", "probability", "top", "kl"}
    {"event": "done", "ttft", "tpot", "tokens", "stop_string"}   seconds; null after `score`, and where none ended it
    {"event": "error", "text"}                   instead of `done`

`generate` can write its full log-probabilities, float32 (tokens, vocabulary), to a file from which the
`score` of another model reads them to tell the KL divergence of every token. Commands end with stdin.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine import chat, places, runtime
from engine.errors import BadText, InputError, MaquetteError, RunError
from engine.generate import cache_label, generate, stop_string
from engine.measure._text import encode
from engine.measure.outputs import describe, force
from engine.models import LoadedModel
from engine.records import Token

Body = dict[str, JsonValue]
TENSOR = "logprobs"
KEPT = 1 << 28  # bytes of log-probabilities that are kept of a text


@dataclass(frozen=True)
class Command:
    """What to do, and whether it should stop."""

    body: Body
    stop: threading.Event = field(default_factory=threading.Event)


def serve(source: str, device: str, commands: TextIO, replies: TextIO) -> None:
    """Load the model of `source` and answer commands until their stream ends.

    Raises:
        BadModel: the model cannot be loaded.
    """
    inbox: queue.Queue[Command | None] = queue.Queue()
    threading.Thread(target=_listen, args=(commands, inbox), daemon=True).start()
    model = runtime.load(places.resolve(source), device)
    cache = cache_label(model, 1)
    _reply(replies, "ready", {"kernels": [*sorted(set(model.kernels.values())), *([cache] if cache else [])]})
    while (command := inbox.get()) is not None:
        try:
            for event, data in _answer(model, command):
                _reply(replies, event, data)
        except MaquetteError as error:
            _reply(replies, "error", {"text": str(error)})


def _listen(commands: TextIO, inbox: queue.Queue[Command | None]) -> None:
    """Put commands into the inbox; read on while one is at work, so that a stop gets through."""
    latest: Command | None = None
    for line in commands:
        body = json.loads(line)
        if body["do"] != "stop":
            latest = Command(body)
            inbox.put(latest)
        elif latest is not None:
            latest.stop.set()
    if latest is not None:
        latest.stop.set()
    inbox.put(None)


def _answer(model: LoadedModel, command: Command) -> Iterator[tuple[str, Body]]:
    body = command.body
    prompt = _prompt(model, body)
    if not prompt:
        raise BadText("The prompt is empty, and this model has no start token. Write a few words.")
    if body["do"] == "generate":
        yield from _generate(model, prompt, command)
    else:
        ids = [int(str(i)) for i in _list(body["token_ids"])]
        yield from _score(model, prompt, ids, _reference(str(body["read"])))


def _prompt(model: LoadedModel, body: Body) -> list[int]:
    """The token ids of a command's prompt, plain or in the model's chat template.

    Raises:
        BadModel: the template is missing or does not end.
        BadText: the template refuses the messages.
    """
    tokenizer, text = model.tokenizer, str(body["prompt"])
    if not body.get("chat"):
        return encode(tokenizer, text)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if k.endswith("_token") and isinstance(v, str)}
    rendered = chat.render(template, str(body.get("system") or ""), text, special)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids  # it writes its own
    return ids


def _generate(model: LoadedModel, prompt: list[int], command: Command) -> Iterator[tuple[str, Body]]:
    body = command.body
    room = _context(model) - len(prompt)
    if room < 1:
        raise BadText(f"The prompt has {len(prompt)} tokens; this model reads {_context(model) - 1}. Shorten it.")
    length, size = min(int(str(body["max_tokens"])), room), model.network.config.get_text_config().vocab_size
    if body.get("write") and 4 * size * length > KEPT:
        raise InputError(
            f"The same text is compared over all {size:,} tokens that could come next, which is too much for a text of "
            f"{length:,}. Ask for {KEPT // (4 * size):,} at most."
        )
    ids: list[int] = []
    logprobs: list[torch.Tensor] = []
    began = time.perf_counter()
    first = last = began
    stops, ended = [str(each) for each in _list(body.get("stop_strings") or [])], None
    steps = generate(
        model, prompt, max_new_tokens=length,
        temperature=float(str(body["temperature"])), seed=int(str(body["seed"])),
        top_p=float(str(body.get("top_p", 1.0))), top_k=int(str(body.get("top_k", 0))),
    )  # fmt: skip
    for step in steps:
        last = time.perf_counter()
        first = first if ids else last
        ids.append(step.token_id)
        if body.get("write"):
            logprobs.append(step.logprobs.float().cpu())
        yield "token", _token(step.token_id, describe(model.tokenizer, ids, len(ids) - 1, step.logprobs))
        ended = stop_string(model.tokenizer, ids, stops)
        if ended is not None or command.stop.is_set():
            break
    if body.get("write") and not command.stop.is_set():
        with suppress(SafetensorError):  # the reader has gone, and its folder with it: nobody will ask for these
            save_file({TENSOR: torch.stack(logprobs) if ids else torch.empty(0, size)}, str(body["write"]))
    tpot = (last - first) / (len(ids) - 1) if len(ids) > 1 else None
    ttft = first - began if ids else None
    yield "done", {"ttft": ttft, "tpot": tpot, "tokens": len(ids), "stop_string": ended}


def _reference(file: str) -> torch.Tensor:
    """What the first model wrote.

    Raises:
        RunError: it is gone, as it is where the reader left in between, or could not be written.
    """
    try:
        return load_file(file)[TENSOR]
    except (OSError, SafetensorError) as error:
        raise RunError("The first model's predictions are gone. Try again.") from error


def _score(
    model: LoadedModel, prompt: list[int], ids: list[int], reference: torch.Tensor
) -> Iterator[tuple[str, Body]]:
    """`ids` as the model sees them, with the KL to the (len(ids), V) log-probabilities of `reference`."""
    ours, theirs = model.network.config.get_text_config().vocab_size, reference.shape[1]
    if ours != theirs:
        raise InputError(f"The models have {theirs} and {ours} tokens: their predictions cannot be compared.")
    if len(prompt) + len(ids) > _context(model):
        raise BadText(f"The text has {len(prompt) + len(ids)} tokens; this model reads {_context(model)}. Shorten it.")
    for number, token in zip(ids, force(model, prompt, ids, reference), strict=True):
        yield "token", _token(number, token)
    yield "done", {"ttft": None, "tpot": None, "tokens": len(ids), "stop_string": None}


def _context(model: LoadedModel) -> int:
    return int(getattr(model.network.config.get_text_config(), "max_position_embeddings", 1 << 20))


def _token(number: int, token: Token) -> Body:
    return {"id": number, **token.model_dump(mode="json")}


def _list(value: JsonValue) -> list[JsonValue]:
    assert isinstance(value, list)
    return value


def _reply(replies: TextIO, event: str, data: Mapping[str, JsonValue]) -> None:
    replies.write(json.dumps({"event": event, **data}) + "\n")
    replies.flush()
