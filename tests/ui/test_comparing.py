"""Two to four models: what is picked, how it is written, prompt sets, words that differ, votes, flips and noise."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path

import gradio as gr
import pytest

from engine.errors import BadModel, BadParams, InputError, UnknownName
from engine.places import DEMO
from engine.records import Measurement
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, asked
from tests.ui.fakes import FakeScheduler
from ui import ballot, cards, charts, comparing, contrast, flips, sets, still, wording
from ui.asked import Asked, Writing, read_link, read_writing, write_link
from ui.desk import FIRST, Desk, read_stored
from ui.pages import compare
from ui.pages.sets import go_through


@pytest.fixture
def four(desk: Desk, scheduler: FakeScheduler) -> Asked:
    """The stored original, and three runs of Anna's."""
    made = [fakes.finished(scheduler, recipe, ANNA, 3.0, 0.1).id for recipe in (FIRST, fakes.HALF, fakes.WANDA)]
    return asked("stored:0", made[0], "Mara", "same", *made[1:])


def test_four_models_have_panes_cards_charts_and_verdicts(desk: Desk, four: Asked) -> None:
    summary, _, _, *figures, tables, _links = comparing.render(desk, ANNA, four, "size.bytes", "perplexity")
    assert str(summary).count("smaller, ") == 3
    assert str(summary).count("<dt>D</dt>") == 5
    assert len(figures) == 5
    assert all(figures)
    for title in ("A · original", "B · GPTQ 4 bit", "C · Distilled 1/2 blocks", "D · Wanda 2:4"):
        assert title in str(summary)
        assert title in str(tables)
    last = [step.panes for step in comparing.stream(desk, ANNA, four) if step.panes][-1]
    panes = last["panes"]
    assert [pane["title"][0] for pane in panes] == ["A", "B", "C", "D"]
    assert [pane["tokens"][5][3] for pane in panes] == [None, 0.9, 0.9, 0.9]


def test_where_it_was_measured_counts_the_models(desk: Desk, four: Asked) -> None:
    entries = [desk.entry(key, ANNA) for key in four.compare]
    for picked, words in (
        (entries[1:3], "Both were measured on this machine."), (entries[1:], "All were measured on this machine."),
        (entries[:2], "One side is stored"), (entries, "Some are stored"),
    ):  # fmt: skip
        assert words in str(cards.origin(picked, ""))


def test_each_text_is_marked_where_it_leaves_the_first(desk: Desk, four: Asked, scheduler: FakeScheduler) -> None:
    free = four.model_copy(update={"writing": read_writing({"prompt": "Mara", "mode": "free"})})
    *_, last, done = comparing.stream(desk, ANNA, free)
    assert done.panes == last.panes  # of two updates in one frame the browser keeps the last
    assert [pane["split"] for pane in last.panes["panes"]] == [2, 5, 9, 2]
    assert done.done is not None
    view = str(comparing.differing(done.done))
    assert view.count("<mark") >= 3
    assert "[only here:]" in view
    assert comparing.texts(desk, ANNA, free, []).splits() == [2, 5, 9, 2]  # kept for the report
    assert desk.shelf.find(BEN, free) is None
    assert desk.shelf.find(ANNA, four) is None


def test_how_it_is_written_reaches_the_engine(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id
    how = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 99, "seed": 7, "chat": True, "system": "Rhyme."}
    stops = "\\n\r\n\n End"
    list(comparing.stream(desk, ANNA, asked("stored:0", small, "Mara", "free", **how, stop_strings=stops)))
    assert scheduler.writing == [{**how, "stop_strings": ("\n", " End")}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "nan"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"mode": "<script>"}, "mode"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x" * 2001}, "2001 characters"),
        ({"system": "x" * 2001}, "system"),
        ({"stop_strings": "x" * 1000}, "stop_strings"),
    ],
)
def test_settings_out_of_bounds_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(BadParams) as caught:
        read_writing(values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_says_everything_and_nothing_else_gets_through() -> None:
    how = {"temperature": 0.5, "chat": True, "system": "a&b=c", "seed": 3, "stop_strings": "\\n\nEnd"}
    whole = asked("stored:0", "0a1b2c3d", "2 + 3 = ?&\n名", "free", "ffff0000", **how)
    import urllib.parse

    query = dict(urllib.parse.parse_qsl(write_link(whole), keep_blank_values=True))
    assert read_link(query) == whole
    assert read_link({**query, "__theme": "dark"}) == whole
    assert write_link(asked("a", "b")) == "compare=a,b"
    for bad in ("", "a", "a,b,c,d,e", "a,," + "x" * 90, "x" * 5000):
        with pytest.raises(BadParams):
            read_link({"compare": bad})
    with pytest.raises(BadParams, match="max_tokens"):
        read_link({"compare": "a,b", "max_tokens": "many"})


def test_a_link_to_anothers_run_is_refused(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id
    with pytest.raises(UnknownName):
        comparing.render(desk, BEN, asked("stored:0", small), "size.bytes", "perplexity")
    with pytest.raises(UnknownName):
        list(comparing.stream(desk, BEN, asked("stored:0", small, "Mara")))


def test_what_ships_writes_before_a_visitor_has_run_anything(desk: Desk, scheduler: FakeScheduler) -> None:
    desk = dataclasses.replace(desk, stored=read_stored(DEMO / "comparison.json"))
    first, second, third = (desk.entry(f"stored:{number}", ANNA) for number in range(3))
    assert desk.source(first, ANNA) == "demo"
    assert Path(desk.source(second, ANNA)).is_dir()
    with pytest.raises(BadModel, match="as numbers only"):
        desk.source(third, ANNA)
    own = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    assert desk.source(second, ANNA) == own.id


def test_the_form_and_a_link_say_the_same(desk: Desk, four: Asked) -> None:
    values = [getattr(each, "get", lambda _key, each=each: each)("value") if isinstance(each, dict) else each
              for each in compare.fill(desk, ANNA, four)]  # fmt: skip
    assert compare.collect(values[: compare.FIELDS]) == four
    assert values[compare.FIELDS] == 4
    assert compare.collect([None] * compare.FIELDS) is None
    with pytest.raises(BadParams, match="two to four"):
        compare.collect(["stored:0", None, None, None, *values[4 : compare.FIELDS]])


def test_a_fixed_text_counts_only_beside_its_original(desk: Desk, scheduler: FakeScheduler) -> None:
    base, small = desk.entry("stored:0", ANNA), desk.entry("stored:1", ANNA)
    usual = asked("stored:0", "stored:1").writing
    forced = comparing.fixed([base, small], usual)[1]
    assert forced is not None
    assert forced.forced
    beside = comparing.fixed([small, small], usual)[1]
    assert beside is not None
    assert beside.forced == ()  # its KL is to the original, and the original is not here
    other = usual.model_copy(update={"prompt": "Never asked"})
    assert comparing.fixed([base, small], other) == [None, None]
    assert comparing.fixed([base, small], usual.model_copy(update={"temperature": 1.0})) == [None, None]


def test_a_set_runs_prompt_by_prompt_and_tells_of_each(desk: Desk, four: Asked, scheduler: FakeScheduler) -> None:
    prompts = ("Mara", '=HYPERLINK("x")')
    *_, (done, value, left) = go_through(desk, ANNA, four, prompts, threading.Event())
    assert (value, left) == (done[-1].value, 0)  # the last update holds the last texts
    assert [found.prompt for found in done] == list(prompts)
    assert [mark.tokens for mark in done[0].marks] == [len(fakes.WORDS)] * 4
    assert done[0].marks[0].speed == pytest.approx(500)
    assert done[0].marks[1].kl == pytest.approx(sum(t.kl or 0 for t in fakes.tokens(kl=True)) / len(fakes.WORDS))
    titles = ["A", "B", "C", "D"]
    shown = str(sets.table(titles, done))
    assert "Mean over the prompts" in shown
    assert 'data-run="1"' in shown
    assert "\"'=HYPERLINK" in sets.as_csv(titles, done)
    assert {asked_for[1] for asked_for in scheduler.asked} == set(prompts)
    assert json.dumps(done[0].value)


def test_a_set_can_be_stopped_and_is_never_blind(desk: Desk, four: Asked) -> None:
    stop = threading.Event()
    stop.set()
    assert [*go_through(desk, ANNA, four, ("Mara", "Ben"), stop)][-1][0] == []
    blind = four.model_copy(update={"writing": read_writing({"mode": "blind"})})
    for wrong, words in ((blind, "not run blind"), (four, "Choose the bundled")):
        with pytest.raises(BadParams, match=words):
            next(go_through(desk, ANNA, wrong, ("Mara",) if wrong is blind else (), threading.Event()))
    assert len(sets.bundled()) == 4
    with pytest.raises(BadParams):
        sets.read("/etc/passwd", "x.txt")


def test_words_that_differ_are_marked_and_the_rest_is_whole() -> None:
    a, b = "Mara has a cat. <b>", "Mara has two cats. <b>"
    left, right = contrast.words(a, b)
    assert "".join(text for _, text in left) == a
    assert "".join(text for _, text in right) == b
    assert [text.strip() for differs, text in left if differs] == ["a cat."]
    assert [text.strip() for differs, text in right if differs] == ["two cats."]
    view = str(contrast.view(["A", "B", "C"], [a, b, a]))
    assert "A and C wrote the same words" in view
    assert "<b>" not in view
    assert contrast.view(["A", "B"], ["", "x"]) == ""


def test_a_score_is_honest_about_few_votes(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id
    a, b = desk.entry("stored:0", ANNA), desk.entry(small, ANNA)

    def vote(winner: str, times: int) -> str:
        for number in range(times):  # in either order: the score is of the pair
            pair = ("stored:0", small) if number % 2 else (small, "stored:0")
            scheduler.store.add_vote(ANNA, *pair, "Mara", winner)
        return ballot.score(desk, ANNA, a, b)

    assert "only ties (1)" in vote("tie", 1)
    assert "100 %, 95 % interval 43.9 % to 100 %: no preference" in vote(small, 3)
    assert "of 9 votes" in vote("stored:0", 6).lower()
    assert "original 46, GPTQ 4 bit 3, ties 1" in vote("stored:0", 40)
    assert "more than chance" in ballot.score(desk, ANNA, a, b)
    scheduler.store.add_vote(BEN, "stored:0", small, "Mara", small)
    assert "original 46" in ballot.score(desk, ANNA, a, b)
    for wrong in (None, {"left": "stored:0"}, {"left": 3, "right": [], "prompt": ""}, "x"):
        with pytest.raises(InputError):
            ballot.cast(desk, ANNA, wrong, "left")  # type: ignore[arg-type]


def answered(right: str, **changes: object) -> dict[str, Measurement]:
    m = Measurement(
        name="accuracy.sums", value=0.5, error=0.1, unit="1", higher_is_better=True, details={"right": right}
    )
    return {m.name: m}


def test_flips_pair_the_questions_of_any_two_runs() -> None:
    found = flips.between(answered("1101011111"), answered("0000011111"))
    assert found == flips.Flips(lost=3, won=0, total=10)
    assert "no difference in accuracy is shown" in wording.flipped(found)
    many = flips.between(answered("1" * 40 + "0" * 10), answered("0" * 30 + "1" * 20))
    assert many == flips.Flips(30, 10, 50)
    assert "rarely splits them like that (McNemar p = 0.0022)" in wording.flipped(many)
    assert wording.flipped(flips.Flips(0, 0, 9)) == "None of 9 answers flipped."
    assert flips.between(answered("11"), answered("111")) is None


def test_a_difference_inside_the_noise_is_called_that_everywhere(desk: Desk, scheduler: FakeScheduler) -> None:
    close = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.01).id
    entries = [desk.entry("stored:0", ANNA), desk.entry(close, ANNA)]
    said = wording.verdict(entries[0].measured, entries[1].measured)
    assert "perplexity +0.2 % (inside the noise)" in said
    assert "points (inside the noise)" in said
    assert "smaller (inside" not in said
    shown = str(cards.comparison(entries, "x"))
    assert shown.count("+0.2 % (inside the noise)") == 3  # verdict, card, table
    assert "noise: up to 0.170" in shown
    figure = charts.pareto([("original", entries[0].measured), ("small", entries[1].measured)]).figure
    assert figure is not None
    (band,) = figure.layout.shapes
    low, high = figure.layout.yaxis.range
    assert low < band.y0 < 4.2 < 4.21 < band.y1 < high  # around the band: else it looks like the chart's ground


def test_a_front_that_nobody_has_measured_says_so(desk: Desk, scheduler: FakeScheduler) -> None:
    sizes = [fakes.finished(scheduler, recipe, ANNA, measurements=fakes.measured()[:1]).id for recipe in (FIRST, FIRST)]
    *_, front, accuracy, latency, memory, batches, _, _ = comparing.render(
        desk, ANNA, asked(*sizes), "size.bytes", "kl"
    )
    assert front.layout.annotations[0].text == "No run has measured both."  # type: ignore[attr-defined]
    assert (accuracy, latency, batches) == (None, None, None)
    assert memory is not None


def test_throughput_is_drawn_by_batch_size() -> None:
    def rate(size: int) -> Measurement:
        details = {"tpot": 0.002, "tpot_error": 1e-4, "kernels": "int4pack x 8"}
        return Measurement(name=f"throughput.b{size}", value=400.0 * size, error=9.0, unit="1/s",
                           higher_is_better=True, details=details)  # fmt: skip

    chart = charts.batches([("small", {f"throughput.b{size}": rate(size) for size in (16, 1, 8, 4)})])
    assert [row[1] for row in chart.rows] == ["1", "4", "8", "16"]
    assert chart.rows[3][2:] == ("6400 tokens/s ± 17.6 tokens/s", "2.00 ms ± 196 µs", "int4pack x 8")
    assert list(chart.figure.data[0].error_y.array) == [1.96 * 9.0] * 4  # type: ignore[union-attr]


def test_no_whisker_reaches_below_zero() -> None:
    def rate(size: int, value: float, error: float) -> Measurement:
        return Measurement(name=f"throughput.b{size}", value=value, error=error, unit="1/s", higher_is_better=True)

    found = {m.name: m for m in (rate(1, 500.0, 10.0), rate(8, 33.3, 664.0))}
    figure = charts.batches([("busy", found)]).figure
    assert figure is not None
    assert list(figure.data[0].error_y.arrayminus) == pytest.approx([19.6, 33.3])
    drawn = re.findall(r'y2="([\d.]+)"', str(still.draw(figure, "speed")))
    assert max(map(float, drawn)) <= still.HEIGHT - still.BOTTOM


def test_an_opening_page_leaves_settings_alone_that_it_has_already(desk: Desk, scheduler: FakeScheduler) -> None:
    fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    wanted = compare.usual(desk, ANNA)
    assert wanted is not None
    other = wanted.writing.model_copy(update={"prompt": "Once"})
    written = compare.fill(desk, ANNA, wanted, other)[compare.PICKERS : compare.FIELDS]
    assert written == [wanted.writing.prompt, *[gr.skip()] * (len(Writing.model_fields) - 1)]
    assert gr.skip() not in compare.fill(desk, ANNA, wanted)[compare.PICKERS : compare.FIELDS]
