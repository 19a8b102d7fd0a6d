"""Text files as documents: what calibrates, and what a student learns from."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import BadText, short

LONGEST_TEXT = 64 << 20  # bytes that are read of a text file
LONGEST_LINE = 1 << 18  # characters of a document: tokenizers take a line whole, and gigabytes for a long one


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one a line) or a JSONL file (its `text` fields); a very long one is several.

    Raises:
        BadText: not there, not UTF-8 text, empty, or a JSONL line without `text`.
    """
    raw = read_bytes(path, LONGEST_TEXT)
    text = raw.decode("utf-8", errors="ignore" if len(raw) == LONGEST_TEXT else "replace")
    if text.count("\ufffd") > len(text) // 100:
        raise BadText(f"{short(path.name)} is not UTF-8 text.")
    if path.suffix == ".jsonl":
        whole = text.split("\n")  # other ends of lines may stand within a JSON string
        if len(raw) == LONGEST_TEXT:
            whole.pop()  # what was read of the last line is no JSON
        lines = [_json_text(line, number, path) for number, line in enumerate(whole, 1) if line.strip()]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadText(f"The text {short(path.name)} is empty.")
    return [line[start : start + LONGEST_LINE] for line in lines for start in range(0, len(line), LONGEST_LINE)]


def read_bytes(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a text file.

    Raises:
        BadText: they cannot be read, or are no text.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit)
    except OSError as error:
        raise BadText(f"The text {short(path.name)} cannot be read: {error.strerror}.") from None
    if b"\0" in raw[:65536]:
        raise BadText(f"{short(path.name)} is a binary file; a text or JSONL file in UTF-8 is needed.")
    return raw


def _json_text(line: str, number: int, path: Path) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadText(f'{short(path.name)}, line {number}: a JSON object with a "text" is needed.') from None


def too_short(path: Path, tokens: int, length: int) -> BadText:
    """What to say of a text of so many tokens where one sequence needs `length`."""
    return BadText(
        f"The text {short(path.name)} has {tokens} tokens, one sequence needs {length}. "
        "Give a longer text or a smaller sequence_length."
    )
