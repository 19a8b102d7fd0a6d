"""What a visitor compares, and on which text: read from the form, from a link, or from whatever is sent.

All three say the same thing in the same words, so all three are judged by the same bounds.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from engine.errors import BadParams
from engine.records import Record
from engine.streams import LONGEST_STOP, MOST_STOPS
from ui.messages import translate
from ui.wording import say

LONGEST = 2000  # characters of a prompt
LONGEST_TEXT = 512  # tokens
LONGEST_STOPS = MOST_STOPS * (LONGEST_STOP + 2)  # characters of all stop texts together
Mode = Literal["same", "free", "blind"]
Key = Annotated[str, Field(min_length=1, max_length=80)]


class Writing(Record):
    """A prompt and how models go on from it. At sampling temperature 0 they take the likeliest token.

    `stop_strings` are texts that end writing, one a line; in them `\\n` stands for a line break.
    """

    prompt: str = Field(default="", max_length=LONGEST)
    mode: Mode = "same"
    chat: bool = False
    system: str = Field(default="", max_length=LONGEST)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1000)
    max_tokens: int = Field(default=48, ge=1, le=LONGEST_TEXT)
    seed: int = Field(default=0, ge=0, lt=2**31)
    stop_strings: str = Field(default="", max_length=LONGEST_STOPS)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end writing."""
        return tuple(line.replace("\\n", "\n") for line in self.stop_strings.splitlines() if line)


class Asked(Record):
    """Two to four entries by their keys, the baseline first, and what they write."""

    compare: tuple[Key, ...] = Field(min_length=2, max_length=4)
    writing: Writing = Writing()


def read_writing(values: Mapping[str, object]) -> Writing:
    """The writing that a form or a link describes.

    Raises:
        BadParams: a value of the wrong kind or out of its bounds; the line names it.
    """
    prompt = values.get("prompt", "")
    if isinstance(prompt, str) and len(prompt) > LONGEST:
        raise BadParams(say("error.long_prompt", count=len(prompt), limit=LONGEST))
    try:
        return Writing.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "link"
        raise BadParams(say("error.writing", name=name, problem=translate(problem["msg"]))) from None


def check_prompt(writing: Writing) -> Writing:
    """The writing, where there is something to go on from.

    Raises:
        BadParams: the prompt is empty.
    """
    if not writing.prompt.strip():
        raise BadParams(say("error.empty_prompt"))
    return writing


def read_keys(keys: Sequence[object]) -> tuple[str, ...]:
    """The keys that are picked, without places left empty.

    Raises:
        BadParams: fewer than two or more than four, or no text.
    """
    found = tuple(key for key in keys if key not in (None, ""))
    if not 2 <= len(found) <= 4 or not all(isinstance(key, str) and len(key) <= 80 for key in found):
        raise BadParams(say("error.how_many"))
    return tuple(str(key) for key in found)


def read_link(query: Mapping[str, str]) -> Asked:
    """What a link reopens; parameters that are not ours are left alone.

    Raises:
        BadParams: it names too few or too many, or a value out of its bounds.
    """
    keys = read_keys([key.strip() for key in query.get("compare", "")[:400].split(",")])
    return Asked(compare=keys, writing=read_writing({k: v for k, v in query.items() if k in Writing.model_fields}))


def write_link(asked: Asked) -> str:
    """The query of a link that `read_link` reads back; what is as usual is left out."""
    said = {"compare": ",".join(asked.compare)}
    for key, field in Writing.model_fields.items():
        value = getattr(asked.writing, key)
        if value != field.default:
            said[key] = str(value).lower() if isinstance(value, bool) else str(value)
    return urllib.parse.urlencode(said, safe=":,")
