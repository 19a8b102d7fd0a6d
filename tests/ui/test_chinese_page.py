"""The whole page in Chinese: no English word is left that is not a name."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Iterator
from typing import cast

import plotly.graph_objects as go
import pytest
from pydantic import JsonValue

from engine.errors import UnknownName
from engine.modes import Mode
from engine.scheduler import Scheduler
from tests.ui import fakes
from tests.ui.conftest import ANNA, asked, stored
from tests.ui.fakes import FakeScheduler
from tests.ui.test_audit import BUDGET, linear
from tests.ui.test_sensitivity import LOOK, record
from ui import ballot, comparing, language, page, panes, report, views
from ui.desk import Desk
from ui.edge import line
from ui.journal import Journal
from ui.pages import compress, runs, scaling
from ui.translated import Page

# Names of methods, formats, programs and units, settings as a recipe writes them, and what the field says in English.
NAMES = set(
    "Maquette GPTQ AWQ HQQ RTN FP8 ZeroQuant SmoothQuant SparseGPT Wanda bitsandbytes LLM NF4 FP4 NormalFloat LoRA "
    "MiniLLM GKD GGUF L1 Adam Hessian Logit logits CPU RAM GPU CUDA KV KL JS MiB GiB KiB nat ms µs pi p50 p95 p99 "
    "CSV YAML JSON JSONL Markdown demo cookie recipe yaml W8A8 int8 e4m3 lora js mse llama max min Beta Top "
    "token tokens MAQUETTE HOME HTML zip Hub qwen McNemar GB TFLOP ZeroGPU torch transformers gradio bfloat16 int4pack "
    "cpu UTC".split()
)
RUN = re.compile(r"· [0-9a-z]{6}\b")  # a piece of a run's id
WORD = re.compile(r"[A-Za-zµ][A-Za-zµ0-9]*")
CODE = re.compile(r"<(pre|code)\b.*?</\1>|<div lang=\"en\">.*?</div>|<a [^>]*lang=\"en\".*?</a>|`[^`]*`", re.DOTALL)
SPOKEN = re.compile(r"\b(?:aria-label|title)=\"([^\"]*)\"")  # attributes that are read out or shown
TAG = re.compile(r"<[^>]*>")
SETTING = re.compile(r"[a-z0-9]+(?:[./_][a-z0-9_]+)+")  # quantize/gptq, top_k, model.layers.0


def left(markup: str) -> set[str]:
    """English words that a reader meets in this markup."""
    markup = CODE.sub(" ", str(markup))
    text = html.unescape(" ".join([TAG.sub(" ", markup), *SPOKEN.findall(markup)]))
    return {word for word in WORD.findall(RUN.sub(" ", SETTING.sub(" ", text))) if len(word) > 1} - NAMES


def drawn(figure: go.Figure) -> str:
    """All text of a figure."""

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, each in value.items():
                if key in ("name", "text", "ticktext", "x", "y"):
                    yield from (str(item) for item in (each if isinstance(each, list | tuple) else [each]))
                if isinstance(each, dict | list | tuple):
                    yield from texts(each)
        elif isinstance(value, list | tuple):
            for each in value:
                yield from texts(each)

    return " ".join(texts({"data": figure.to_dict()["data"], "layout": figure.to_dict()["layout"]}))


@pytest.fixture(autouse=True)
def chinese() -> Iterator[None]:
    with language.use("zh-CN"):
        yield


def test_what_gradio_builds_once_is_chinese(desk: Desk) -> None:
    async def make() -> Page:  # Gradio opens an event loop, and leaves it open, where none is running
        return page.lay_out(desk, Journal(desk.store))

    components = asyncio.run(make()).get_config_file()["components"]
    found: dict[str, set[str]] = {}
    for component in components:
        props = component["props"]
        texts = [props.get(key) for key in ("label", "info", "placeholder")]
        texts += [str(name) for name, *_ in props.get("choices") or ()]
        if component["type"] in ("button", "html") and props.get("visible") is not False:
            texts.append(props.get("value"))
        for text in texts:
            if isinstance(text, str) and (words := left(text)):
                found[f"{component['type']}: {text[:60]}"] = words
    assert found == {}
    assert len(components) > 80


def test_a_comparison_and_its_charts_are_chinese(desk: Desk, scheduler: FakeScheduler) -> None:
    a = fakes.finished(scheduler, LOOK.model_copy(update={"measure": ("size", "latency")}), ANNA)
    b = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    shown = comparing.render(desk, ANNA, asked(a.id, b.id), "size.bytes", "perplexity")
    figures = [each for each in shown if isinstance(each, go.Figure)]
    assert len(figures) == 5
    for each in [*map(drawn, figures), *(text for text in shown if isinstance(text, str))]:
        assert left(each) == set()
    assert "缩小 3.2×" in str(shown[0])
    for choice in ("tie", "left"):
        assert left(ballot.cast(desk, ANNA, {"left": a.id, "right": b.id, "prompt": "x"}, choice)) == set()
    value = panes.stored(["A", "B"], [None, None], True, "k").value()
    assert left(str(value["words"]).translate(str.maketrans("", "", "{}"))) <= {"kl", "split", "apart", "probability"}


def test_runs_and_their_pictures_are_chinese(desk: Desk, scheduler: FakeScheduler) -> None:
    works = fakes.running(scheduler, fakes.HALF, ANNA)
    odd: JsonValue = "rounded to nearest instead, its Hessian is not positive definite (order 3)"
    fakes.say(
        scheduler, works, ("linear", linear("model.layers.0.q_proj", note=str(odd))), ("budget", BUDGET),
        ("log", {"text": "calibrating on 64 sequences of 128 tokens"}), ("phase", {"name": "Logit distillation"}),
        start=300,
    )  # fmt: skip
    done = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    other = fakes.finished(scheduler, fakes.WANDA, ANNA, 1.5, 0.3)
    look = fakes.finished(scheduler, LOOK, ANNA, measurements=[record(0.01, 0.1)])
    failed = fakes.running(scheduler, fakes.HALF, ANNA)
    reason = "The disk is full. Delete old runs or choose another folder with MAQUETTE_HOME, then resume."
    fakes.say(scheduler, failed, ("finished", {"status": "failed", "reason": reason}), start=300)
    failed = scheduler.store.run(failed.id)
    journal = Journal(desk.store)
    views_ = [runs.describe(desk, journal, ANNA, run) for run in (works, done, look, failed)]
    views_.append(views.runs_table(desk.runs(ANNA), done.id, "", 1e10))
    views_.append(views.differences([desk.entry(run.id, ANNA) for run in (done, other)]))
    views_.append(views.strip(scheduler.status(), scheduler.history(), works))
    for markup in views_:
        assert left(str(markup)) <= {"sequences"}, str(markup)[:200]
    assert "改为就近舍入，其 Hessian 矩阵不正定（第 3 阶）" in str(views_[0])
    assert "用 64 条、每条 128 个词元的序列校准" in str(views_[0])
    assert "磁盘已满。" in str(views_[3])
    file = report.markdown(desk.entry(done.id, ANNA), desk.entry(other.id, ANNA))
    assert left(re.sub("```.*?```", "", file, flags=re.DOTALL).replace(done.id, "")) == set()
    parts = scaling.draw(desk, ANNA, None, "perplexity")
    assert left(drawn(parts[3])) | left(str(parts[2])) | left(str(parts[4])) == set()


def test_a_bad_draft_is_refused_in_chinese(desk: Desk) -> None:
    draft = compress.as_draft(fakes.GPTQ)
    assert left(str(compress.judge(desk, draft))) == set()
    steps: JsonValue = [{"method": "quantize/gptq", "params": {"bits": 99}}]
    assert "收到的是 99" in compress.judge(desk, {**draft, "steps": steps})
    assert "共享服务器" in compress.judge(desk, {**draft, "calibration": "/etc/passwd"})
    assert left(str(compress.describe(draft))) <= {"quantize", "printf", "python", "run"}
    assert line(UnknownName("run", "x", ())) == "未知的运行“x”。"


def test_an_entry_is_named_anew_for_another_language(scheduler: FakeScheduler) -> None:
    desk = Desk(scheduler.store, cast(Scheduler, scheduler), stored(), Mode.PUBLIC)
    fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    assert desk.entries(ANNA)[0].label.startswith("GPTQ 4 位 · ")
    with language.use("en"):
        assert desk.entries(ANNA)[0].label.startswith("GPTQ 4 bit · ")
