"""Chat templates: rendered as `transformers` does, and ended where they do not end by themselves."""

from __future__ import annotations

import pytest

from engine import chat
from engine.errors import BadModel, BadText

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_writes_what_the_model_reads() -> None:
    said = chat.render(CHATML, "Be brief. {{ 7 * 7 }}", "Hi {% raise %}", {"bos_token": "<s>"})
    assert said == "<s><|system|>Be brief. {{ 7 * 7 }}\n<|user|>Hi {% raise %}\n<|assistant|>"


def test_a_template_may_refuse() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(BadText, match="refuses this: System role not supported"):
        chat.render(refusing, "Be brief.", "Hi", {})


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end|too much"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ 'a' * 10 ** 6 }}", "more than the 60,000"),
    ],
)
def test_a_hostile_template_ends(hostile: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "for" in hostile:  # the others end by themselves, on a busy machine not within two seconds
        monkeypatch.setattr(chat, "SECONDS", 2.0)
    with pytest.raises((BadModel, BadText), match=words):
        chat.render(hostile, "", "Hi", {})


def test_no_template_or_one_beyond_reason_is_one_line() -> None:
    for template in (None, "", "x" * 200_001):
        with pytest.raises(BadModel, match=r"[Cc]hoose plain text|Use plain text"):
            chat.render(template, "", "Hi", {})
