"""A visitor's own prompts, from a text or JSONL file: bounded and judged before any model sees them.

A text file holds one prompt a line. A JSONL file holds one object a line with the prompt under `prompt` or `text`, or a
bare string. Whatever cannot be used is refused in one line that names the place.
"""

from __future__ import annotations

import json

from engine.errors import BadText, short

LARGEST = 200_000  # bytes of a file
MOST = 24  # prompts
LONGEST = 2000  # characters of one prompt


def read(data: bytes, jsonl: bool) -> tuple[str, ...]:
    """The prompts of a file, in its order.

    Raises:
        BadText: it is too large, no text, holds no prompt or too many, or a line of it cannot be used.
    """
    if len(data) > LARGEST:
        raise BadText(f"The prompt file has {len(data):,} bytes; {LARGEST:,} are read. Shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(f"The prompt file is not UTF-8 text (byte {error.start:,}). Save it as UTF-8.") from None
    if "\0" in text:
        raise BadText("The prompt file is a binary file. Give a text file with one prompt a line, or JSONL.")
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(found) == MOST:
            raise BadText(f"The prompt file holds more than {MOST} prompts. Remove some.")
        prompt = _from_json(line, number) if jsonl else line.rstrip("\r")
        if not prompt.strip():
            raise BadText(f"Line {number} holds an empty prompt. Write a few words, or remove the line.")
        if len(prompt) > LONGEST:
            raise BadText(f"The prompt in line {number} has {len(prompt):,} characters; the limit is {LONGEST:,}.")
        found.append(prompt)
    if not found:
        raise BadText("The prompt file is empty. Write one prompt a line.")
    return tuple(found)


def _from_json(line: str, number: int) -> str:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        raise BadText(
            f'Line {number} is not JSON. Write {{"prompt": "..."}} in each line, or name the file .txt.'
        ) from None
    if isinstance(body, dict):
        body = body.get("prompt", body.get("text"))
    if not isinstance(body, str) or "\0" in body:
        raise BadText(f'Line {number} has no "prompt" that is a text: {short(line, 40)}')
    return body
