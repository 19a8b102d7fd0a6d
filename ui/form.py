"""A Params class <-> Gradio inputs: the form of a method is derived, never written.

The type, bound and description of a field decide its widget; the value that comes back is checked by the
method itself, so that the form, the command line and a link cannot disagree.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

import gradio as gr
from pydantic import JsonValue
from pydantic.fields import FieldInfo

from engine.fields import bounds, condition, counts, field_kind, is_rare
from engine.methods import Calibrated, Method, Selection
from ui import wording
from ui.messages import translate
from ui.wording import say

Input = gr.Radio | gr.Dropdown | gr.Checkbox | gr.Textbox | gr.Number
RADIO_LIMIT = 7  # up to so many choices a screen reader prefers radio buttons to a list


def inputs(method: Method, params: Mapping[str, JsonValue]) -> dict[str, Input]:
    """An input for each setting of `method`, made in the Gradio context that is open.

    What most leave alone stands behind a line, which is open where some of it was changed; what does not count beside
    the other values is hidden.
    """
    usual, fields = defaults(method), method.params.model_fields
    values = {**usual, **params}
    common, rare = names(method)

    def made(shown: Sequence[str]) -> dict[str, Input]:
        return {name: widget(name, fields[name], values[name], counts(fields[name], values)) for name in shown}

    found = made(common)
    if rare:
        changed = any(values[name] != usual[name] for name in rare)
        with gr.Accordion(say("step.more", count=len(rare)), open=changed):
            found |= made(rare)
    return found


def names(method: Method) -> tuple[list[str], list[str]]:
    """The settings that a form shows at once, and those that most leave as they are.

    What all methods of a kind have in common comes last: the calibration, then which linears.
    """
    fields = method.params.model_fields
    shared = [*Calibrated.model_fields, *Selection.model_fields]
    ordered = sorted(fields, key=lambda name: shared.index(name) if name in shared else -1)
    return [name for name in ordered if not is_rare(fields[name])], [name for name in ordered if is_rare(fields[name])]


def deciding(method: Method) -> dict[str, list[str]]:
    """By setting, the others that count with some of its values alone."""
    found: dict[str, list[str]] = {}
    for name, info in method.params.model_fields.items():
        if (needed := condition(info)) is not None:
            found.setdefault(needed.setting, []).append(name)
    return found


def widget(name: str, info: FieldInfo, value: JsonValue, visible: bool) -> Input:
    """The input for one field: radio or list for a choice, a box for a number or a text."""
    label, about = wording.field(name), _plain(translate(info.description or ""))
    kind = field_kind(info)
    if kind == "choice":
        choices = [(wording.choice(choice), choice) for choice in typing.get_args(info.annotation)]
        known = next((choice for _, choice in choices if choice == value), info.default)
        if len(choices) <= RADIO_LIMIT:
            return gr.Radio(choices, value=known, label=label, info=about, interactive=True, visible=visible)
        return gr.Dropdown(choices, value=known, label=label, info=about, interactive=True, visible=visible)
    if kind == "bool":
        return gr.Checkbox(value is True, label=label, info=about, interactive=True, visible=visible)
    if kind == "str":
        return gr.Textbox(str(value), label=label, info=about, interactive=True, visible=visible, max_lines=1)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else info.default
    low, high = bounds(info)
    share = kind == "float" and low is not None and high is not None and high - low <= 1
    return gr.Number(  # without bounds: Gradio would refuse a value in English before the draft has it
        number, precision=0 if kind == "int" else None, step=0.05 if share else 1,
        label=label, info=about, interactive=True, visible=visible,
    )  # fmt: skip


def _plain(text: str | None) -> str | None:
    """A description whose asterisks are seen: Gradio makes two on one line emphasis, even in code, and escapes nothing.

    So a line begins before each; the style sheet takes the break away.
    """
    return " ".join((text or "").splitlines()).replace("*", "\n*") or None


def read(method: Method, name: str, value: object) -> JsonValue:
    """What a widget of field `name` sent, as JSON; a whole float becomes an int where the field is one.

    The value is not judged here: `Method.check` does that.
    """
    kind = field_kind(method.params.model_fields[name])
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def defaults(method: Method) -> dict[str, JsonValue]:
    """Every setting at its default, as JSON."""
    found: dict[str, JsonValue] = method.params().model_dump(mode="json")
    return found
