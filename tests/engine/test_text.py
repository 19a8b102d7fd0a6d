"""Texts are looked through before any work, wherever in them something is wrong, and read a piece at a time."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import methods, preflight, text
from engine.errors import BadText
from engine.places import DEMO

LINES = 8000
GOOD = b"The lamp is in the barn.\n" * LINES  # more than what was once looked at, 128 KiB
GOOD_JSON = b'{"text": "The lamp is in the barn."}\n' * LINES
LATE = [
    ("a.txt", GOOD + "Zürich, Köln, Tübingen\n".encode("latin-1") * 2000, "is not UTF-8 text (line 8001). Save it"),
    ("a.txt", GOOD + b"\0" * 500, "is a binary file (a NUL in line 8001); a text"),
    ("a.jsonl", GOOD_JSON + b"\0" * 500, "is a binary file (a NUL in line 8001); a text"),
    ("a.jsonl", GOOD_JSON + b'\n{"text": 7}\n', 'line 8002: a JSON object with a "text" that is a string is needed.'),
    ("a.jsonl", GOOD_JSON + b'{"text": null}', 'line 8001: a JSON object with a "text" that is a string is needed.'),
    ("a.jsonl", GOOD_JSON + b'{"text": ["a"]}\n', "line 8001: a JSON object"),
    ("a.jsonl", GOOD_JSON + b'{"body": "a"}\n', "line 8001: a JSON object"),
    ("a.jsonl", GOOD_JSON + b'{"text": "a', "line 8001: a JSON object"),
    ("a.jsonl", GOOD_JSON + b'{"text": "\\ud83d"}\n', 'line 8001: the "text" holds half of a surrogate pair.'),
    ("a.txt", b"Two words\n" + b" \n" * 100_000, "has 6 tokens, one sequence needs 128"),
    ("a.jsonl", b'{"text": "Two words"}\n' + b'{"text": " "}\n' * 20_000, "has 6 tokens, one sequence needs 128"),
    ("a.txt", b" \n" * 100_000, "is empty"),
    ("a.jsonl", b'{"text": " "}\n' * 20_000, "is empty"),
]


@pytest.mark.parametrize(("name", "content", "words"), LATE)
def test_what_is_wrong_far_behind_is_told_before_work_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadText) as caught:
        preflight.check_text(tmp_path / name, DEMO / "model", 128)
    said = str(caught.value)
    assert words in said
    assert name in said
    assert "\n" not in said


@pytest.mark.parametrize(("name", "content", "words"), LATE[:-4])
def test_what_is_told_before_is_what_would_end_the_reading(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadText) as caught:
        text.read_documents(tmp_path / name)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["distill/logits", "prune/gradual", "prune/vocabulary"])
@pytest.mark.parametrize("folder", [DEMO / "model", None])
def test_texts_that_steps_name_are_looked_through_also_for_a_model_that_is_not_here(
    tmp_path: Path, name: str, folder: Path | None
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(GOOD)
    params = methods.get(name).check({"text": str(file)})
    params.check_sources(folder)
    file.write_bytes(GOOD + b"\0")
    with pytest.raises(BadText, match="NUL in line 8001"):
        params.check_sources(folder)


def test_a_damaged_character_here_and_there_is_borne(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(GOOD + b"Z\xfcrich\n\xe6\x9d\xb1\xe4\xba")
    assert text.is_long(file)
    assert text.read_documents(file)[-2:] == ["Z\ufffdrich", "東\ufffd"]


def test_what_is_not_read_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.txt", GOOD), ("a.jsonl", GOOD_JSON)):
        file = tmp_path / name
        monkeypatch.setattr(text, "LONGEST_TEXT", len(content))
        file.write_bytes(content)
        assert len(text.read_documents(file)) == LINES
        file.write_bytes(content + b"\0nonsense\xff")
        assert text.is_long(file)
        assert len(text.read_documents(file)) == LINES
    monkeypatch.setattr(text, "LONGEST_TEXT", len(GOOD_JSON) - 3)
    assert len(text.read_documents(file)) == LINES - 1  # of the last line it is not known what it says


def test_a_text_is_looked_through_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    read = text.documents

    def counted(path: Path) -> Iterator[str]:
        looks.append(path)
        return read(path)

    monkeypatch.setattr(text, "documents", counted)
    file = tmp_path / "a.txt"
    file.write_bytes(GOOD)
    assert [text.is_long(file) for _ in range(3)] == [True] * 3
    assert looks == [file]
    file.write_bytes(GOOD[:-1] + b"\0")  # as long
    os.utime(file, (1, 1))
    with pytest.raises(BadText, match="NUL"):
        text.is_long(file)
    file.write_bytes(b"Two words")
    assert not text.is_long(file)
    file.unlink()
    with pytest.raises(BadText, match="cannot be read: No such file"):
        text.is_long(file)


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("longest", [5, 1 << 18])
def test_pieces_of_any_size_give_the_lines_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, longest: int
) -> None:
    monkeypatch.setattr(text, "PIECE", piece)
    monkeypatch.setattr(text, "LONGEST_LINE", longest)
    content = "\ufeffone\r\ntwo\rthree\n\r\n  \nfour\u2028five\x85Zürich 東京 🗜️ is far\n\nthe end"
    file = tmp_path / "a.txt"
    file.write_text(content, encoding="utf-8", newline="")
    lines = [line for line in content.removeprefix("\ufeff").splitlines() if line.strip()]
    parts = [line[start : start + longest] for line in lines for start in range(0, len(line), longest)]
    assert text.read_documents(file) == parts
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "one\u2028two Zürich 東京"}\r\n\n{"text": "3\\n4"}', encoding="utf-8", newline="")
    lines = ["one\u2028two Zürich 東京", "3\n4"]
    parts = [line[start : start + longest] for line in lines for start in range(0, len(line), longest)]
    assert text.read_documents(file) == parts


@pytest.mark.parametrize("unit", [b"The goat of Ada likes the bread. ", b"The goat of Ada likes the bread of Ben.\r"])
def test_a_large_text_is_looked_through_without_being_held(
    tmp_path: Path, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE", 1 << 14)
    monkeypatch.setattr(text, "LONGEST_LINE", 1 << 14)
    file = tmp_path / "a.txt"
    file.write_bytes(unit * ((2 << 20) // len(unit)))  # no line feed in 2 MiB
    tracemalloc.start()
    try:
        assert text.is_long(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
