"""Text files as documents: what calibrates, and what a student learns from.

A file is read a piece at a time, so that a large one never stands in memory beside its documents, and looked through
once before any work.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import BadText, short

LONGEST_TEXT = 64 << 20  # bytes that are read of a text file
LONGEST_LINE = 1 << 18  # characters of a document: tokenizers take a line whole, and gigabytes for a long one
PIECE = 1 << 20  # bytes that are read at a time
ENOUGH = 1 << 17  # characters, blanks apart, from which on no tokens need to be counted: it has a sequence
NEWLINE, REPLACED = b"\n", "\ufffd"
DAMAGED = 100  # one character in so many may be none in UTF-8; more, and the text is another encoding's


def read_documents(path: Path) -> list[str]:
    """The documents of a text.

    Raises:
        BadText: as `documents`.
    """
    return list(documents(path))


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file (one a line) or a JSONL file (its `text` fields); a very long one is several.

    Raises:
        BadText: not there, not UTF-8 text, empty, or a JSONL line without `text`; with the line. Some documents may
            have been given by then.
    """
    empty = True
    for line in _json_texts(path) if path.suffix == ".jsonl" else _lines(_pieces(path)):
        for start in range(0, len(line), LONGEST_LINE):
            document = line[start : start + LONGEST_LINE]
            if not document.isspace():
                empty = False
                yield document
    if empty:
        raise BadText(f"The text {short(path.name)} is empty.")


def is_long(path: Path) -> bool:
    """Look through all that is read of a text: whether it is long enough for any sequence, without counting tokens.

    Raises:
        BadText: as `documents`.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return _is_long(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(64)  # a form asks with each change
def _is_long(path: Path, *stamp: int) -> bool:
    """As `is_long`, of the file with that stamp."""
    seen = 0
    for document in documents(path):
        if seen < ENOUGH:
            seen += sum(map(len, document.split()))
    return seen >= ENOUGH


def _pieces(path: Path) -> Iterator[str]:
    """What is read of a file, some at a time; a line end follows the last line, unless there is more than is read.

    Raises:
        BadText: it cannot be read, holds a NUL, or more that is not UTF-8 than a damaged character here and there.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    characters = damaged = first = ends = 0
    for raw in _bytes(path):
        if (place := raw.find(b"\0")) >= 0:
            raise BadText(
                f"{short(path.name)} is a binary file (a NUL in line {ends + raw.count(NEWLINE, 0, place) + 1}); "
                "a text or JSONL file in UTF-8 is needed."
            )
        text = decoder.decode(raw, final=not raw)
        if text:
            characters += len(text)
            if more := text.count(REPLACED):
                damaged += more
                first = first or ends + text.count("\n", 0, text.index(REPLACED)) + 1
            yield text
        ends += raw.count(NEWLINE)
        if not raw:
            yield "\n"
    if damaged > characters // DAMAGED:
        raise BadText(f"{short(path.name)} is not UTF-8 text (line {first}). Save it as UTF-8.")


def _bytes(path: Path) -> Iterator[bytes]:
    """The first `LONGEST_TEXT` bytes of a file, some at a time; none at last, unless there are more."""
    left = LONGEST_TEXT
    try:
        with path.open("rb") as file:
            while raw := file.read(min(PIECE, left)):
                left -= len(raw)
                yield raw
            if left or not file.read(1):
                yield b""
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> BadText:
    return BadText(f"The text {short(path.name)} cannot be read: {error.strerror}.")


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text, or whole parts of a very long one."""
    held = ""
    for piece in pieces:
        *ended, held = f"{held}{piece}|".splitlines()  # with more behind it, an end of two characters is seen whole
        held = held[:-1]
        yield from ended
        if whole := len(held) // LONGEST_LINE * LONGEST_LINE:
            yield held[:whole]
            held = held[whole:]
    yield held


def _json_texts(path: Path) -> Iterator[str]:
    """The `text` of each line of a JSONL file; of a last line that is not read whole, none.

    Lines end with line feeds: other ends of lines may stand within a JSON string.
    """
    held: list[str] = []
    number = 0
    for piece in _pieces(path):
        *ended, rest = piece.split("\n")
        for line in ended:
            number += 1
            held.append(line)
            if (whole := "".join(held)).strip():
                yield _json_text(whole, number, path)
            held.clear()
        held.append(rest)


def _json_text(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeEncodeError:
        raise BadText(
            f'{short(path.name)}, line {number}: the "text" holds half of a surrogate pair. Write the character whole.'
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BadText(f'{short(path.name)}, line {number}: a JSON object with a "text" that is a string is needed.')


def too_short(path: Path, tokens: int, length: int) -> BadText:
    """What to say of a text of so many tokens where one sequence needs `length`."""
    return BadText(
        f"The text {short(path.name)} has {tokens} tokens, one sequence needs {length}. "
        "Give a longer text or a smaller sequence_length."
    )
