"""What cannot work is refused in one line, by the form and by whatever is sent, and nothing is queued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gradio as gr
import pytest
from markupsafe import escape

from engine.errors import InputError
from engine.recipes import load_recipe
from engine.scheduler import Scheduler
from ui import edge
from ui.desk import Desk
from ui.pages import compress

DEMO = Path(__file__).parents[2] / "assets" / "demo" / "model"
ANNA = "anna-0123456789abcdef"
SETTINGS = [
    ({"quantize/gptq": {"bits": 0}}, "quantize/gptq: bits: Input should be 2, 3, 4, 5, 6, 7 or 8, got 0"),
    ({"quantize/gptq": {"bits": 3.5}}, "Input should be 2, 3, 4, 5, 6, 7 or 8, got 3.5"),
    ({"quantize/gptq": {"bits": "4"}}, "Input should be 2, 3, 4, 5, 6, 7 or 8, got '4'"),
    ({"quantize/gptq": {"group_size": 0}}, "greater than or equal to 8, got 0"),
    ({"quantize/rtn": {"group_size": 64.5}}, "group_size: Input should be a valid integer"),
    ({"quantize/mixed": {"budget": -1}}, "budget: Input should be greater than 0"),
    ({"quantize/bitsandbytes": {"scheme": "nf5"}}, "scheme: Input should be 'nf4', 'fp4' or 'int8', got 'nf5'"),
    ({"quantize/hqq": {"targets": "re:("}}, "is no regular expression"),
    ({"prune/wanda": {"sparsity": float("nan")}}, "sparsity: Input should be"),
    ({"distill/logits": {"temperature": float("inf")}}, "temperature: Input should be"),
]
SHAPES = [
    ({"quantize/gptq": {"group_size": 48}}, "group_size 48 does not divide the 256 inputs of model.layers.0."),
    (
        {"quantize/awq": {"group_size": 256}},
        "256 does not divide the 384 inputs of model.layers.0.mlp.down_proj. Sizes",
    ),
    ({"quantize/hqq": {"targets": "*.nothing"}}, "no linear is left by targets '*.nothing'"),
    ({"quantize/mixed": {"budget": 2}}, "budget of 2 bits a weight is below the smallest that is possible, 2.125."),
    ({"quantize/mixed": {"budget": 0.5, "unit": "mib"}}, "is below the smallest that is possible, 1."),
]
TEXTS = [
    (b"", "is empty"),
    (b"Two words", "text.txt has 6 tokens, one sequence needs 128. Give a longer text or a smaller sequence_length."),
    (b"\x7fELF\0\1" * 99, "is a binary file"),
]


class Asked:
    """What handlers read of a gr.Request."""

    cookies = {edge.COOKIE: ANNA}  # noqa: RUF012
    session_hash = "s"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk with a real scheduler that was not started: it judges, and runs nothing."""
    scheduler = Scheduler(tmp_path / "home")
    yield Desk(scheduler.store, scheduler, None)
    scheduler.store.close()


def refused(desk: Desk, **recipe: object) -> str:
    """The one line with which form and submission refuse; they must agree and nothing may be queued."""
    draft = cast(compress.Draft, compress.as_draft(compress.as_recipe({})) | json.loads(json.dumps(recipe)))
    with pytest.raises(InputError) as caught:
        compress.submit(desk, draft, False, cast(gr.Request, Asked()))
    said = str(caught.value)
    assert "\n" not in said
    assert desk.runs(ANNA) == []
    form = compress.judge(desk, draft)
    assert "mq-notice bad" in form
    assert str(escape(said)) in form
    return said


def step(body: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    ((method, params),) = body.items()
    return [{"method": method, "params": params}]


@pytest.mark.parametrize(("body", "words"), SETTINGS)
def test_a_setting_out_of_its_bounds(desk: Desk, body: dict[str, dict[str, object]], words: str) -> None:
    assert words in refused(desk, steps=step(body))
    with pytest.raises(InputError) as pasted:  # and where it is pasted, or comes in a link
        load_recipe(json.dumps({"steps": [body]}))
    assert words in str(pasted.value)


@pytest.mark.parametrize(("body", "words"), SHAPES)
def test_a_setting_that_does_not_suit_the_model(desk: Desk, body: dict[str, dict[str, object]], words: str) -> None:
    assert words in refused(desk, steps=step(body))


@pytest.mark.parametrize(("content", "words"), TEXTS)
def test_a_text_that_cannot_calibrate(desk: Desk, tmp_path: Path, content: bytes, words: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert words in refused(desk, steps=step({"quantize/gptq": {}}), calibration=str(text))


def test_a_model_that_is_quantized_already(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    said = refused(desk, model={"source": str(folder)}, steps=step({"quantize/gptq": {}}))
    assert said.endswith("is already quantized. Start from the original model.")
