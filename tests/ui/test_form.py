"""Forms are derived from Params: every method has one, and its defaults are valid."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gradio as gr
import pytest

from engine.errors import BadParams
from engine.fields import condition
from engine.methods import methods
from tests.ui import fakes
from tests.ui.conftest import ANNA, request
from tests.ui.hosts import close_no_loops
from ui import form
from ui.desk import Desk
from ui.messages import translate
from ui.pages import compress

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[gr.Blocks]:
    """Where components are made."""
    close_no_loops(monkeypatch)
    with gr.Blocks() as made:
        yield made


@pytest.mark.parametrize("name", list(methods()))
def test_the_form_of_every_method_holds_its_defaults(name: str) -> None:
    method = methods()[name]
    inputs = form.inputs(method, {})
    assert set(inputs) == set(method.params.model_fields)
    sent = {key: form.read(method, key, component.value) for key, component in inputs.items()}
    assert method.check(sent) == method.params()
    assert all(component.label and component.info for component in inputs.values())


def test_what_a_method_chooses_itself_cannot_be_set() -> None:
    assert not {"bits", "group_size", "granularity"} & set(methods()["quantize/mixed"].params.model_fields)
    assert {"symmetric", "clipping", "damping", "budget"} <= set(methods()["quantize/mixed"].params.model_fields)


def test_patterns_in_descriptions_keep_their_asterisks() -> None:
    for method in methods().values():
        for name, widget in form.inputs(method, {}).items():
            text = str(widget.info).replace("\n", "")  # a break, which the style sheet takes away
            assert text == translate(method.params.model_fields[name].description or "")
            assert not re.search(r"\*.+?\*", str(widget.info))  # what Gradio takes for emphasis, also within code
    assert "`\n*.mlp.\n*`" in str(form.inputs(methods()["quantize/gptq"], {})["targets"].info)
    assert ".info-text br { display: none; }" in (ROOT / "assets" / "maquette.css").read_text()


def test_a_value_that_the_form_cannot_send_is_still_judged() -> None:
    method = methods()["quantize/gptq"]
    with pytest.raises(BadParams, match="bits"):
        method.check({"bits": form.read(method, "bits", 3.5)})
    with pytest.raises(BadParams, match="group_size"):
        method.check({"group_size": form.read(method, "group_size", float("inf"))})


@pytest.mark.parametrize(("name", "value"), [("group_size", 7), ("bits", None), ("damping", 2)])
def test_a_number_out_of_bounds_reaches_the_recipe_and_is_refused_there(desk: Desk, name: str, value: object) -> None:
    sent = form.inputs(methods()["quantize/gptq"], {})[name].preprocess(value)  # Gradio's own refusal is English
    draft = cast(compress.Draft, compress.setting(0, name)(sent, compress.as_draft(fakes.GPTQ)))
    assert compress.as_recipe(draft).steps[0].params[name] == value
    assert name in compress.judge(desk, draft)
    with pytest.raises(BadParams, match=name):
        compress.submit(desk, draft, True, request(ANNA))
    assert desk.runs(ANNA) == []


def test_whole_floats_are_ints_where_ints_are_meant() -> None:
    method = methods()["quantize/gptq"]
    assert form.read(method, "group_size", 128.0) == 128
    assert isinstance(form.read(method, "damping", 1), float)
    assert form.read(method, "symmetric", True) is True


def test_a_recipes_values_are_shown() -> None:
    method = methods()["quantize/gptq"]
    inputs = form.inputs(method, {"bits": 3, "group_size": 32})
    assert (inputs["bits"].value, inputs["group_size"].value) == (3, 32)


def test_what_most_leave_alone_stands_behind_a_line_that_is_open_where_it_was_changed(page: gr.Blocks) -> None:
    method = methods()["quantize/gptq"]
    common, rare = form.names(method)
    assert common == ["bits", "granularity", "group_size", "symmetric", "head", "embeddings"]
    assert rare[-4:] == ["samples", "sequence_length", "targets", "ignore"]
    for params, opened in (({}, False), ({"bits": 3}, False), ({"damping": 0.1}, True)):
        inputs = form.inputs(method, params)
        line = cast(gr.Accordion, inputs["damping"].parent.parent if inputs["damping"].parent else None)
        assert (line.open, line.label) == (opened, f"More settings ({len(rare)})")


def test_a_setting_that_does_not_count_is_hidden_until_it_does() -> None:
    method = methods()["distill/logits"]
    shown = {key for key, component in form.inputs(method, {"student": "size"}).items() if component.visible}
    assert {"hidden_size", "num_blocks", "top_k"} <= shown
    assert not {"keep_every", "folder", "beta"} & shown
    others = form.deciding(method)
    assert others["student"] == ["keep_every", "hidden_size", "num_blocks", "folder"]
    reveal = compress.revealing(method, "student", others["student"])
    seen = [each["visible"] for each in cast(list[dict[str, object]], reveal("folder"))]
    assert seen == [False, False, False, True]
    assert cast(dict[str, object], compress.revealing(method, "divergence", ["beta"])("js"))["visible"] is True


@pytest.mark.parametrize(
    "name", ["prune/magnitude", "prune/wanda", "prune/sparsegpt", "prune/gradual", "prune/l1", "quantize/gptq"]
)
def test_a_pattern_leaves_no_sparsity_to_choose(name: str) -> None:
    method = methods()[name]
    chosen = {"sparsity", "scope"} if name == "prune/magnitude" else {"sparsity"}
    for pattern, seen in (("unstructured", chosen), ("2:4", set[str]()), ("4:8", set[str]())):
        shown = {key for key, component in form.inputs(method, {"pattern": pattern}).items() if component.visible}
        assert shown & chosen == seen
        assert set(method.params.model_fields) - shown <= chosen


def test_what_decides_whether_a_setting_counts_has_the_values_that_are_named() -> None:
    for method in methods().values():
        for name, info in method.params.model_fields.items():
            if (needed := condition(info)) is not None:
                choices = typing.get_args(method.params.model_fields[needed.setting].annotation)
                assert set() < set(needed.values) < set(choices), f"{method.name}: {name}"
