"""Own prompt files: what is read, and the one line for what is not."""

from __future__ import annotations

import json

import pytest

from engine.errors import BadText
from engine.promptsets import read


def test_text_and_jsonl() -> None:
    assert read("\ufeffOnce upon\r\n\n  2 + 3 =\n名字".encode(), jsonl=False) == ("Once upon", "  2 + 3 =", "名字")
    lines = '{"prompt": "Once\\nupon", "id": 3}\n"a string"\n\n{"text": "=SUM(A1)"}\n'
    assert read(lines.encode(), jsonl=True) == ("Once\nupon", "a string", "=SUM(A1)")


@pytest.mark.parametrize(
    ("data", "jsonl", "words"),
    [
        (b"", False, "is empty"),
        (b" \n\n", True, "is empty"),
        (b"\xff\xfe\x00", False, "not UTF-8"),
        (b"\x7fELF\0", False, "binary"),
        (b"x" * 200_001, False, "200,001 bytes"),
        (b"word\n" * 25, False, "more than 24"),
        (b"ok\n" + b"x" * 2001, False, "line 2 has 2,001 characters"),
        (b"{not json}", True, "Line 1 is not JSON"),
        (b"[" * 100_000, True, "Line 1 is not JSON"),
        (b'"ok"\n{"question": "?"}', True, 'Line 2 has no "prompt"'),
        (b'{"prompt": 3}', True, "has no"),
        (b'{"prompt": " "}', True, "Line 1 holds an empty prompt"),
        (json.dumps({"prompt": "a\0b"}).encode(), True, "has no"),
    ],
)
def test_what_cannot_be_used_is_one_line(data: bytes, jsonl: bool, words: str) -> None:
    with pytest.raises(BadText) as caught:
        read(data, jsonl)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
