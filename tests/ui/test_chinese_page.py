"""The whole page in Chinese: no English word is left that is not a name."""

from __future__ import annotations

import asyncio
import html
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import plotly.graph_objects as go
import pytest
from pydantic import JsonValue
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine import export, hardware, ways
from engine.assumptions import Assumptions
from engine.errors import UnknownName
from engine.fit import PARTS, Estimate, Need
from engine.methods import methods as engine_methods
from engine.modes import Limits, Mode
from engine.pace import TIMES
from engine.records import Recipe
from engine.repos import Found
from engine.scheduler import Scheduler
from engine.users import UserFile
from tests.ui import fakes
from tests.ui.conftest import ANNA, asked, stored
from tests.ui.fakes import FakeScheduler
from tests.ui.test_audit import BUDGET, linear
from tests.ui.test_sensitivity import LOOK, record
from ui import (
    ballot,
    comparing,
    dossier,
    hosting,
    language,
    links,
    meter,
    page,
    panes,
    report,
    sets,
    views,
    wording,
)  # fmt: skip
from ui.desk import Desk
from ui.edge import line
from ui.flips import Flips
from ui.journal import Journal
from ui.login import Door
from ui.pages import advice, compress, exports, methods, models, push, runs, scaling
from ui.pages.sets import go_through
from ui.translated import Page
from ui.visitors import Members

# Names of methods, formats, programs and units, settings as a recipe writes them, and what the field says in English.
NAMES = set(
    "Maquette GPTQ AWQ HQQ RTN FP8 ZeroQuant SmoothQuant SparseGPT Wanda bitsandbytes LLM NF4 FP4 NormalFloat LoRA "
    "MiniLLM GKD GGUF L1 Adam Hessian Logit logits CPU RAM GPU CUDA KV KL JS MiB GiB KiB nat ms µs pi p50 p95 p99 "
    "CSV YAML JSON JSONL Markdown demo cookie recipe yaml W8A8 int8 e4m3 lora js mse llama max min Beta Top "
    "token tokens MAQUETTE HOME HTML zip Hub qwen McNemar GB TFLOP ZeroGPU torch transformers gradio bfloat16 int4pack "
    "cpu UTC vLLM SGLang GPTQModel v2 Ollama LM Studio".split()
)
# Names in what methods say of themselves: models, architectures, tools, and letters of formulas.
NAMES |= set(
    "arXiv KIVI HAWQ V3 SVD TinyBERT DistilBERT ShortGPT SLEB Minitron LLaMA Llama Mistral Gemma SentencePiece BPE "
    "NVIDIA FSDP Jensen Shannon Cholesky Tibshirani lasso L2 softmax eager float32 config XW XQ WX dL dw sqrt "
    "tr Shortened Pruner QAT".split()
)
FORMULA = set("sign shrink round mean block W0 label CE sparsity penalty".split())
CITED = re.compile(r"[A-Z]\w+(?: 和 [A-Z]\w+)?(?: 等)?，\d{4}(?:，“[^”]*”)?|“[^”]*”，[A-Z]\w+ 等")  # who, when, what
RUN = re.compile(r"· [0-9a-z]{6}\b")  # a piece of a run's id
WORD = re.compile(r"[A-Za-zµ][A-Za-zµ0-9]*")
CODE = re.compile(r"<(pre|code)\b.*?</\1>|<a [^>]*lang=\"en\".*?</a>|`[^`]*`", re.DOTALL)
SPOKEN = re.compile(r"\b(?:aria-label|title)=\"([^\"]*)\"")  # attributes that are read out or shown
TAG = re.compile(r"<[^>]*>")
SETTING = re.compile(r"[a-z0-9]+(?:[./_][a-z0-9_]+)+")  # quantize/gptq, top_k, model.layers.0


def left(markup: str) -> set[str]:
    """English words that a reader meets in this markup."""
    markup = CITED.sub(" ", CODE.sub(" ", str(markup)))
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
    machine = desk.stored.machine if desk.stored else ""  # a name, in whatever words
    for component in components:
        props = component["props"]
        texts = [props.get(key) for key in ("label", "info", "placeholder")]
        texts += [str(name) for name, *_ in props.get("choices") or ()]
        if component["type"] in ("button", "html") and props.get("visible") is not False:
            texts.append(props.get("value"))
        for text in texts:
            if isinstance(text, str) and (words := left(text.replace(machine, ""))):
                found[f"{component['type']}: {text[:60]}"] = words
    assert found == {}
    assert len(components) > 80


def test_what_methods_say_of_themselves_is_chinese() -> None:
    shown = str(methods.catalogue(engine_methods()))
    assert left(shown) == set()
    formulas = re.findall("<pre>(.*?)</pre>", shown, re.DOTALL)
    assert [words for each in formulas if (words := left(each) - FORMULA)] == []
    assert len(formulas) > 5
    assert "`" not in shown


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
        ("kept", {"modules": {"16": ["lm_head"]}}),
        ("log", {"text": "calibrating on 64 sequences of 128 tokens"}), ("phase", {"name": "Logit distillation"}),
        start=300,
    )  # fmt: skip
    done = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    other = fakes.finished(scheduler, fakes.WANDA, ANNA, 1.5, 0.3)
    look = fakes.finished(scheduler, LOOK, ANNA, measurements=[record(0.01, 0.1)])
    failed = fakes.running(scheduler, fakes.HALF, ANNA)
    reason = "The disk is full. Delete old runs or choose another folder with MAQUETTE_HOME, then try again."
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


def test_a_report_a_set_and_the_words_that_differ_are_chinese(
    desk: Desk, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "machine", lambda: "2 GiB")  # a processor's name has no Chinese
    a = fakes.finished(scheduler, LOOK.model_copy(update={"measure": ("size", "latency")}), ANNA)
    b = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    free = asked(a.id, b.id, "1 + 1 =", "free", chat=True)
    with language.use("en"):
        list(comparing.stream(desk, ANNA, free))
        assert "500 tokens/s" in dossier.html(desk, ANNA, free)
    file = dossier.html(desk, ANNA, free)
    assert '<html lang="zh-CN">' in file
    assert "500 词元/秒" in file
    written = re.sub('<p class="text">.*?</p>|<style>.*?</style>', "", file, flags=re.DOTALL)  # what the models wrote
    assert left(written.replace(a.id, "").replace(b.id, "").replace("aaaa0000", "")) == set()
    *_, (done, _, _) = go_through(desk, ANNA, free, ("1 =",), threading.Event())
    assert left(str(sets.table(["A", "B"], done, 2)).partition("<a ")[0]) == set()
    assert left(str(links.bar(free))) == set()
    assert "没有显示出准确率差异" in wording.flipped(Flips(3, 2, 100))
    assert "很少如此" in wording.flipped(Flips(30, 2, 100))


def test_advice_and_the_meter_are_chinese(desk: Desk, scheduler: FakeScheduler) -> None:
    fakes.finished(scheduler, Recipe(), ANNA)
    fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.0, 0.5)
    for goal, number in (("latency", 0.7), ("memory", 0.001), ("cost", None)):
        found = advice.advise(desk, Recipe(), goal, number, (*Assumptions().model_dump().values(),), ANNA)
        shown = [advice.summary(found), *(advice.card(each, found) for each in found.advices)]
        assert left(" ".join(map(str, shown))) == set()
    needs = [Need("compress", dict.fromkeys(PARTS, 1 << 30), "GPTQ"), Need("verify", {"weights": 1 << 30})]
    needs += [Need(kind, {"runtime": 1 << 20}) for kind in ("probe", "save", "measure")]
    for name in (None, *ways.PHRASES):
        for fits in (False, True):
            way = None if name is None else ways.Way(name, Recipe(), 1 << 20, fits)
            estimate = Estimate(tuple(needs), needs[1], 1 << 28, dict.fromkeys(TIMES, 60.0), ())
            assert left(meter.fit_meter(estimate, way)) == set()


def test_models_of_the_hub_and_who_may_do_what_are_chinese(desk: Desk, scheduler: FakeScheduler) -> None:
    *_, (state, _) = models.search(desk, "qwen", "")
    assert left(str(state)) <= {"HF", "HUB", "OFFLINE"}
    assert left(models.label(Found("org/tiny", 1234, 5 << 20, True))) == set()
    run = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.0, 0.1)
    limits = Limits(parameters=2_000_000_000, seconds=600, disk=1 << 30, keep=86_400.0)
    assert left(hosting.limits_line(Mode.PUBLIC, limits)) == set()
    gone = run.model_copy(update={"shared": True, "expired": 1.0, "finished": 1.0})
    for each in (run, gone):
        for mine in (True, False):
            assert left(hosting.run_note(each, limits, mine, 1e6)) == set()
    assert left(hosting.who("member:anna")) == {"anna"}
    for kind in ("creating", "uploading"):
        assert left(push._line(kind, {"seconds": 3.0, "bytes": 1 << 20, "files": 4})) == set()
    lines = [*map(str, exports.go(desk, ANNA, run.id, "dense", threading.Event()))]
    assert left(" ".join((*lines, *(wording.say(f"format.{name}.for") for name in export.formats())))) == set()
    assert left(runs.describe(desk, Journal(desk.store), ANNA, run)) == set()


def test_the_login_page_is_in_the_visitors_language(tmp_path: Path) -> None:
    client = TestClient(Starlette(routes=Door(Members(UserFile(tmp_path))).routes()))
    for answer in (client.get("/login"), client.post("/login", content="name=anna&password=wrong")):
        assert '<html lang="zh-CN">' in answer.text
        assert left(re.sub("<style>.*?</style>", "", answer.text, flags=re.DOTALL)) == set()


def test_an_entry_is_named_anew_for_another_language(scheduler: FakeScheduler) -> None:
    desk = Desk(scheduler.store, cast(Scheduler, scheduler), stored(), Mode.PUBLIC)
    fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    assert desk.entries(ANNA)[0].label.startswith("GPTQ 4 位 · ")
    with language.use("en"):
        assert desk.entries(ANNA)[0].label.startswith("GPTQ 4 bit · ")
