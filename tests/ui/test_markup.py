"""Nothing that comes from outside becomes markup."""

from __future__ import annotations

import re

import pytest

from engine.records import Recipe, Run, Status, Step
from tests.ui import fakes
from ui import cards, markup, views
from ui.desk import Entry
from ui.journal import Story
from ui.live import Series

EVIL = "<img src=x onerror=alert(1)>\"'&"


def entry(run: Run, worse: float = 0.0) -> Entry:
    return Entry(run.id, EVIL, run, {m.name: m for m in fakes.measured(1 + worse, worse)})


def evil_run(status: Status = Status.FAILED) -> Run:
    recipe = Recipe.model_validate({"model": EVIL, "steps": [Step(method=EVIL, params={EVIL: EVIL})]})
    return Run(id="abcd1234", recipe=recipe, status=status, reason=EVIL, created=1.0, started=1.0, attempt=1)


def harmless(html: str) -> bool:
    return "<img" not in html and not re.search(r'<[^>]*"[^">]*onerror=[^">]*(?<!&)"?>', html.replace("&#34;", ""))


def test_texts_and_attributes_are_escaped() -> None:
    html = markup.tag("p", EVIL, title=EVIL, data_copy=EVIL)
    assert html == f'<p title="{markup.escape(EVIL)}" data-copy="{markup.escape(EVIL)}">{markup.escape(EVIL)}</p>'


@pytest.mark.parametrize("status", list(Status))
def test_a_run_shows_names_reasons_and_logs_as_text(status: Status) -> None:
    run = evil_run(status)
    story = Story(1, phases=[(1.0, EVIL), (2.0, EVIL)])
    story.log.append((1.0, EVIL))
    series = [Series(EVIL, EVIL, ((1.0, 1.0), (3.0, 2.0))), Series("memory.resident", "B", ((1.0, 1.0), (3.0, 2.0)))]
    html = views.run_detail(run, story, series, {"phase": EVIL, "done": 1, "total": 2, "unit": EVIL}, entry(run), None)
    html += views.runs_table([run], run.id, "", 5.0)
    html += cards.comparison([entry(run), entry(run, 0.5)], EVIL)
    html += views.differences([entry(run), entry(run, 0.5)])
    assert EVIL.split()[0] not in html
    assert "&lt;img" in html


def test_prose_shows_what_it_marks_and_runs_nothing() -> None:
    text = f"""
Half of `x` and ``y z``, *not* {EVIL}, 2 * 3 * 4, arXiv
2306.00978.

- `a`: one
  line
- **two** <b>

1.  first

    a = `b` * <c>
"""
    shown = markup.prose(text)
    assert shown == (
        f"<p>Half of <code>x</code> and <code>y z</code>, <em>not</em> {markup.escape(EVIL)}, 2 * 3 * 4, "
        '<a href="https://arxiv.org/abs/2306.00978">arXiv 2306.00978</a>.</p>'
        "<ul><li><code>a</code>: one line</li><li><strong>two</strong> &lt;b&gt;</li></ul>"
        "<ol><li>first</li></ol><pre>    a = <code>b</code> * &lt;c&gt;</pre>"
    )
    assert markup.prose("one\n\n\ntwo", str.upper) == "<p>ONE</p><p>TWO</p>"


def test_a_link_never_runs_a_script() -> None:
    with pytest.raises(AssertionError):
        markup.link("x", "javascript:alert(1)")


def test_a_state_is_more_than_a_colour() -> None:
    for status in Status:
        assert re.sub(r"<[^>]+>", "", markup.badge(status)) == status.value


def test_the_filter_narrows_by_method_and_state() -> None:
    runs = [
        Run(id="aaaa1111", recipe=fakes.GPTQ, status=Status.SUCCEEDED, created=1.0),
        Run(id="bbbb2222", recipe=fakes.WANDA, status=Status.FAILED, created=1.0),
    ]
    assert "aaaa1111" in views.runs_table(runs, "", "gptq", 2.0)
    assert "bbbb2222" not in views.runs_table(runs, "", "gptq", 2.0)
    assert "bbbb2222" in views.runs_table(runs, "", "FAILED", 2.0)
    assert "No run matches" in views.runs_table(runs, "", "zzz", 2.0)


def test_differences_leave_out_what_is_equal() -> None:
    a = Entry("a", "A", Run(id="aaaa1111", recipe=fakes.GPTQ, created=1.0), {m.name: m for m in fakes.measured(3.2)})
    b = Entry("b", "B", Run(id="bbbb1111", recipe=fakes.GPTQ, created=1.0), {m.name: m for m in fakes.measured(3.2, 1)})
    html = views.differences([a, b])
    assert "Perplexity" in html
    assert "Size on disk" not in html
    assert "quantize/gptq" not in html
    assert html.count("best") >= 1
