"""What a setting's declaration says of it: its kind and bounds, whether most leave it alone, with what it counts.

The last two are marks in its type, which all who inherit the setting have too:

    top_k: Annotated[int, RARE, With("teacher_logits", "cached")] = Field(50, ge=1, ...)
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Literal

from pydantic.fields import FieldInfo


class With:
    """Marks a setting that counts only where another one is one of these values, its choices or True and False."""

    def __init__(self, setting: str, *values: object) -> None:
        self.setting, self.values = setting, values


class Rare:
    """Marks a setting that most leave as it is: a form shows it when asked."""


RARE = Rare()


def field_kind(info: FieldInfo) -> Literal["bool", "int", "float", "str", "choice"] | None:
    """What a form must show for a field, or None where the type is not supported."""
    annotation = info.annotation
    if typing.get_origin(annotation) is Literal:
        return "choice"
    kinds: dict[object, Literal["bool", "int", "float", "str"]] = {bool: "bool", int: "int", float: "float", str: "str"}
    return kinds.get(annotation)


def bounds(info: FieldInfo) -> tuple[float | None, float | None]:
    """Lowest and highest value of a number field, None where it has no such bound."""
    low = high = None
    for mark in info.metadata:
        low = getattr(mark, "ge", getattr(mark, "gt", low))
        high = getattr(mark, "le", getattr(mark, "lt", high))
    return low, high


def is_rare(info: FieldInfo) -> bool:
    """Whether most leave it as it is."""
    return any(isinstance(mark, Rare) for mark in info.metadata)


def condition(info: FieldInfo) -> With | None:
    """With what it counts; None: always."""
    return next((mark for mark in info.metadata if isinstance(mark, With)), None)


def counts(info: FieldInfo, values: Mapping[str, object]) -> bool:
    """Whether it counts beside these values of all settings."""
    needed = condition(info)
    return needed is None or values.get(needed.setting) in needed.values
