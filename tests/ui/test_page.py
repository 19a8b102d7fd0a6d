"""The handlers behind the page: who may do what, what is refused, and that no handler waits or computes."""

from __future__ import annotations

import asyncio
import html
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import gradio as gr
import pytest

import app
from engine import cli
from engine.errors import InputError, MaquetteError, StoreBusy, TooBig, UnknownName
from engine.modes import Mode
from engine.presets import PRESETS
from engine.recipes import load_recipe
from engine.records import Recipe, Run, Step
from engine.runners.inline import InlineRunner
from engine.scheduler import Scheduler
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, asked, request
from tests.ui.fakes import FakeScheduler
from ui import ballot, comparing, dossier, edge, language, links, page, report, server
from ui.desk import BASELINE, FIRST, Desk
from ui.journal import Journal
from ui.pages import compare, compress, runs
from ui.translated import Page

ROOT = Path(__file__).parents[2]


def test_building_the_page_does_no_tensor_work_and_never_initialises_cuda(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from engine.scheduler import Scheduler\n"
        "from ui.page import build\n"
        "s = Scheduler(pathlib.Path(sys.argv[1]))\n"
        "build(s.store, s)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'engine.pipeline' not in sys.modules and 'engine.generate' not in sys.modules\n"
        "print('built')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "home")], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "built", done.stderr


def test_an_argument_is_refused_and_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, code, words in (("--port", 2, "unrecognized arguments: --port"), ("--help", 0, "HOST, PORT")):
        monkeypatch.setattr(sys, "argv", ["app.py", given])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == code
        assert words in "".join(capsys.readouterr())


def test_a_visitor_sees_only_own_runs(desk: Desk, scheduler: FakeScheduler) -> None:
    mine, other, command_line = (fakes.finished(scheduler, fakes.GPTQ, owner, 3.2, 0.1) for owner in (ANNA, BEN, ""))
    assert [run.id for run in desk.runs(ANNA)] == [mine.id]
    for foreign in (other.id, command_line.id, "nothere1", "../../etc", "", "x" * 500):
        with pytest.raises(UnknownName) as error:
            desk.run(foreign, ANNA)
        assert other.id not in str(error.value).replace(repr(other.id), "")
    local = Desk(scheduler.store, cast(Scheduler, scheduler), None)
    assert {run.id for run in local.runs(ANNA)} == {mine.id, command_line.id}


def test_buttons_act_on_the_run_that_is_shown(desk: Desk, scheduler: FakeScheduler) -> None:
    first = scheduler.submit(fakes.GPTQ, ANNA)
    journal = Journal(scheduler.store)
    _, _, now, *_ = runs.refresh(desk, journal, ANNA, "", "", ("", "", ""))
    scheduler.submit(fakes.GPTQ, ANNA)  # newer than what stands there
    assert runs.shown("", cast(runs.Shown, now)) == first.id
    assert runs.shown("0a1b2c3d", cast(runs.Shown, now)) == "0a1b2c3d"
    assert runs.shown("", ("", "", "")) == ""


def test_the_command_line_that_is_shown_runs_beside_the_page(
    scheduler: FakeScheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("MAQUETTE_HOME", str(scheduler.store.home))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *a: None)

    def work(recipe: Recipe, folder: Path, *rest: object) -> None:
        (folder / "artifact").mkdir()

    command = html.unescape(re.sub("<[^>]*>", "\n", str(compress.describe(compress.as_draft(FIRST)))))
    asked = shlex.split(next(each for each in re.findall(r"(?s)printf.*?maquette-runs", command)))
    Path("recipe.yaml").write_text(asked[2])
    words = asked[asked.index("engine") + 1 :]
    assert cli.main(words, lambda home: Scheduler(home, runner=InlineRunner(work))) == 0
    assert load_recipe(asked[2]) == FIRST
    with pytest.raises(StoreBusy):
        Scheduler(scheduler.store.home)


def test_the_command_lines_owner_cannot_be_claimed() -> None:
    assert edge.visitor(request(ANNA)) == ANNA
    assert edge.visitor(request("", "abc")) == "session-abc"
    for cookie in ("short", "a b" * 10, "x" * 100, "../../../../etc/passwd"):
        assert edge.visitor(request(cookie, "abc")) == "session-abc"
    with pytest.raises(MaquetteError):
        edge.visitor(request("", ""))


def test_folders_and_files_of_a_shared_server_are_refused(desk: Desk) -> None:
    for body in (
        {"model": "/etc"},
        {"calibration": "/etc/passwd"},
        {"steps": [{"distill/logits": {"text": "/etc/passwd"}}]},
    ):
        with pytest.raises(InputError, match="shared server"):
            desk.check_sources(Recipe.model_validate(body))
    desk.check_sources(Recipe(steps=fakes.HALF.steps))
    desk.check_sources(Recipe.model_validate({"steps": [{"quantize/gptq": {"targets": "*.mlp.*"}}]}))


def test_an_error_is_one_line_and_a_surprise_has_a_number() -> None:
    assert edge.line(InputError("Bits must be 2.")) == "Bits must be 2."
    text = edge.line(ZeroDivisionError("secret path /root/x"))
    assert "secret" not in text
    assert "log" in text


def test_start_queues_the_original_first_and_only_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = compress.as_draft(fakes.GPTQ)
    compress.submit(desk, draft, True, request(ANNA))
    assert [run.recipe.steps for run in desk.runs(ANNA)] == [fakes.GPTQ.steps, ()]
    compress.submit(desk, draft, True, request(ANNA))
    assert len(desk.runs(ANNA)) == 3
    with pytest.raises(InputError):
        compress.submit(desk, draft, True, request(ANNA))
    assert desk.runs(BEN) == []


def test_a_draft_from_the_api_is_judged_like_any_other(desk: Desk) -> None:
    for draft in ({"steps": "x"}, {"model": {"source": ""}}, {"steps": [{"method": "quantize/none"}]}, {"zzz": 1}):
        assert "mq-notice bad" in compress.judge(desk, cast(compress.Draft, draft))
    bad = compress.as_draft(Recipe.model_validate({"steps": [{"quantize/gptq": {"bits": 9}}]}))
    assert "bits" in compress.judge(desk, bad)


def test_cards_change_the_recipe_they_show() -> None:
    draft = compress.as_draft(fakes.GPTQ)
    changed = cast(compress.Draft, compress.setting(0, "bits")(3, draft))
    assert compress.as_recipe(changed).steps[0].params == {"bits": 3, "group_size": 64}
    two = {**draft, "steps": [s.model_dump() for s in (*fakes.WANDA.steps, *fakes.GPTQ.steps)]}
    moved, generation = cast(tuple[compress.Draft, int], compress.moving(0, "down")(cast(compress.Draft, two), 4))
    assert [s.method for s in compress.as_recipe(moved).steps] == ["quantize/gptq", "prune/wanda"]
    assert generation == 5
    removed, _ = cast(tuple[compress.Draft, int], compress.moving(1, "remove")(moved, 5))
    assert [s.method for s in compress.as_recipe(removed).steps] == ["quantize/gptq"]


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_recipe_that_its_link_brings_back(name: str, desk: Desk) -> None:
    recipe = Recipe(steps=PRESETS[name])
    from engine.recipes import dump_recipe

    assert compress.recipe_from_link(desk, dump_recipe(recipe)) == recipe


def test_a_first_visit_starts_the_comparison_once_and_only_when_idle(desk: Desk, scheduler: FakeScheduler) -> None:
    assert comparing.start_first(desk, request("", "no-cookie")) == []
    first = comparing.start_first(desk, request(ANNA))
    assert [run.recipe.steps for run in first] == [(), FIRST.steps]
    assert comparing.start_first(desk, request(ANNA)) == []
    assert comparing.start_first(desk, request(BEN)) == []
    assert "0 of 2" in comparing.banner_for(comparing.first_runs(desk, ANNA))


def test_where_the_first_comparison_does_not_fit_the_stored_one_is_shown(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*asked: object, **more: object) -> object:
        raise TooBig("It needs 9 GiB, and 1 GiB is free.")

    monkeypatch.setattr(desk.scheduler, "submit", full)
    assert comparing.start_first(desk, request(ANNA)) == []


def test_without_runs_the_stored_comparison_is_shown_and_marked(desk: Desk) -> None:
    a, b = comparing.default_pair(desk, ANNA)
    assert (a, b) == ("stored:0", "stored:1")
    summary, output, _differing, *figures, tables, links = comparing.render(
        desk, ANNA, asked("stored:0", "stored:1"), "size.bytes", "perplexity"
    )
    assert "stored" in str(summary)
    assert "3.2× smaller" in str(summary)
    assert json.dumps(output)
    assert all(figures)
    assert "<table>" in str(tables)
    assert "compare=stored:0,stored:1" in str(links)


def test_the_page_itself_holds_what_one_without_runs_would_be_shown(desk: Desk, scheduler: FakeScheduler) -> None:
    first, view = comparing.first_view(desk)
    assert first is not None
    assert first.compare == ("stored:0", "stored:1")
    shown = comparing.render(desk, ANNA, first, comparing.COSTS[0], comparing.QUALITIES[0])
    assert [str(each) for each in (view[0], *view[2:])] == [str(each) for each in (shown[0], *shown[2:])]
    assert comparing.offered(desk, ANNA) == ""
    fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    assert comparing.offered(desk, ANNA) != comparing.offered(desk, BEN) == ""
    bare = Desk(scheduler.store, cast(Scheduler, scheduler), None)
    assert comparing.first_view(bare)[0] is None


def test_what_waits_is_counted_by_owner(desk: Desk, scheduler: FakeScheduler) -> None:
    for owner in (ANNA, ANNA, BEN):
        scheduler.submit(fakes.GPTQ, owner)
    assert [desk.store.waiting(each) for each in (ANNA, BEN, "x", None)] == [2, 1, 0, 3]


def test_live_results_replace_the_stored_ones(desk: Desk, scheduler: FakeScheduler) -> None:
    base = fakes.finished(scheduler, BASELINE, ANNA)
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    assert comparing.default_pair(desk, ANNA) == (base.id, small.id)
    summary = comparing.render(desk, ANNA, asked(base.id, small.id), "size.bytes", "perplexity")[0]
    assert "measured here" in str(summary)
    assert comparing.default_pair(desk, BEN) == ("stored:0", "stored:1")


def test_stored_results_stay_beside_own_ones_where_only_the_size_counts(desk: Desk, scheduler: FakeScheduler) -> None:
    def named(cost: str) -> list[str]:
        return [row[0] for row in comparing.front(desk.entries(ANNA), cost, "perplexity").rows]

    other = Recipe(steps=(Step(method="quantize/rtn", params={"bits": 3}),))
    fakes.finished(scheduler, other, ANNA, 4.0, 0.2)
    assert named("size.bytes") == ["RTN 3 bit", "original", "GPTQ 4 bit"]
    fakes.finished(scheduler, BASELINE, ANNA)
    assert named("size.bytes") == ["original", "RTN 3 bit", "stored: GPTQ 4 bit"]
    assert named("latency.tpot") == ["original", "RTN 3 bit"]
    assert comparing.front(desk.entries(ANNA), "size.bytes", "kl").figure


def test_streaming_merges_the_panes_and_marks_where_they_part(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    values = [step.panes for step in comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "free"))]
    assert scheduler.asked == [(["demo", small.id], "Mara", False)]
    last = values[-1]
    assert [len(pane["tokens"]) for pane in last["panes"]] == [len(fakes.WORDS), len(fakes.WORDS) - 4]
    assert last["split"] == 5
    assert not last["shade"]
    assert scheduler.closed_streams == 1


def test_the_same_text_is_shaded_by_its_divergence(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    last = [step.panes for step in comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "same"))][-1]
    assert last["shade"]
    assert last["split"] is None
    assert last["panes"][1]["tokens"][5][3] == 0.9


def test_updates_are_fewer_than_tokens(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    assert len(list(comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "same")))) < len(fakes.WORDS)


def test_stop_ends_the_engines_stream(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    scheduler.pause = 0.02
    stop = threading.Event()
    stream = comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "same"), stop)
    next(stream), next(stream), next(stream), next(stream)
    stop.set()
    last = list(stream)[-1].panes
    assert {pane["note"] for pane in last["panes"]} == {"Stopped."}
    assert all(len(pane["tokens"]) < len(fakes.WORDS) for pane in last["panes"])
    assert scheduler.closed_streams == 1


def test_leaving_ends_the_engines_stream(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    stream = comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "same"))
    next(stream), next(stream), next(stream)
    stream.close()
    assert scheduler.closed_streams == 1


@pytest.mark.parametrize("prompt", ["", "   \n", "x" * 3000])
def test_prompts_that_cannot_work_are_refused_before_any_process(
    prompt: str, desk: Desk, scheduler: FakeScheduler
) -> None:
    with pytest.raises(InputError):
        next(comparing.stream(desk, ANNA, asked("stored:0", "stored:0", prompt, "same")))
    assert scheduler.asked == []


def test_stored_numbers_cannot_write_until_a_run_stands_in(desk: Desk, scheduler: FakeScheduler) -> None:
    with pytest.raises(InputError, match="numbers only"):
        next(comparing.stream(desk, ANNA, asked("stored:0", "stored:1", "Mara", "same")))
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    next(comparing.stream(desk, ANNA, asked("stored:0", "stored:1", "Mara", "same")))
    assert desk.source(desk.stored_entries()[1], ANNA) == small.id


def test_a_blind_vote_hides_names_and_drift_until_it_is_cast(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    steps = list(comparing.stream(desk, ANNA, asked("stored:0", small.id, "Mara", "blind")))
    shown = json.dumps([step.panes for step in steps])
    assert "GPTQ" not in shown
    assert "tokens/s" not in shown
    held = steps[-1].ballot
    html = ballot.cast(desk, ANNA, held, "left")
    assert "GPTQ" in html
    vote = scheduler.store.votes()[0]
    assert (vote.owner, vote.winner) == (ANNA, held["left"])
    with pytest.raises(InputError):
        ballot.cast(desk, ANNA, None, "left")
    with pytest.raises(InputError):
        ballot.cast(desk, ANNA, held, "whatever")
    with pytest.raises(UnknownName):
        ballot.cast(desk, BEN, held, "left")


def test_the_legend_and_the_names_go_in_a_blind_round(desk: Desk, scheduler: FakeScheduler) -> None:
    assert [compare._is_shaded(mode)["visible"] for mode in ("same", "free", "blind")] == [True, False, False]
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id
    drawn = comparing.render(desk, ANNA, asked("stored:0", small, "", "blind"), "size.bytes", "perplexity")
    assert [(pane["title"], pane["tokens"]) for pane in drawn[1]["panes"]] == [("Left", []), ("Right", [])]


def test_a_blind_round_of_equal_texts_has_no_vote(desk: Desk, scheduler: FakeScheduler) -> None:
    small = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id
    *_, last = comparing.stream(desk, ANNA, asked(small, small, "Mara", "blind"))
    assert last.ballot is not None
    scheduler.alike = True
    *_, last = comparing.stream(desk, ANNA, asked(small, small, "Mara", "blind"))
    assert last.ballot is None
    panes, voting, held, said, *_ = compare._changes(last)
    assert (panes, voting, held) == (last.panes, gr.skip(), gr.skip())
    assert "The same text" in str(said)
    assert "Left was GPTQ 4 bit" in str(said)


def test_a_refresh_sends_only_what_changed(desk: Desk, scheduler: FakeScheduler) -> None:
    run = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    journal = Journal(scheduler.store)
    first = runs.refresh(desk, journal, ANNA, run.id, "", ("", "", ""))
    assert run.id in str(first[0])
    again = runs.refresh(desk, journal, ANNA, run.id, "", cast(runs.Shown, first[2]))
    assert all(part == gr.skip() for part in (*again[:2], *again[3:]))


def offered(desk: Desk, scheduler: FakeScheduler, run: Run, owner: str = ANNA) -> tuple[str, list[str]]:
    """What a run's page says, and the two buttons that are there for a training that diverged."""
    _, detail, _, *buttons = runs.refresh(desk, Journal(scheduler.store), owner, run.id, "", ("", "", ""))
    updates = cast(list[dict[str, object]], buttons[5:7])
    return str(detail), [str(each.get("value", "#mq-slower")) for each in updates if each["visible"]]


def test_a_run_that_diverged_offers_its_checkpoint_and_says_what_resume_would_do(
    desk: Desk, scheduler: FakeScheduler
) -> None:
    both = ["#mq-slower", "End at step 100"]
    run = fakes.diverged(scheduler, fakes.HALF, ANNA)
    detail, shown = offered(desk, scheduler, run)
    assert shown == both
    assert "diverge at the same place" in detail
    assert "go on at a tenth" in detail
    assert "training ends there" in detail
    team = Desk(scheduler.store, desk.scheduler, None, Mode.TEAM)
    scheduler.share(run.id, True, ANNA)
    assert offered(team, scheduler, run)[1] == both
    assert offered(team, scheduler, run, BEN)[1] == []
    pruned = fakes.diverged(scheduler, Recipe.model_validate({"steps": ["prune/gradual"]}), ANNA)
    detail, shown = offered(desk, scheduler, pruned)
    assert shown == both[:1]
    assert "training ends there" not in detail
    early = fakes.diverged(scheduler, fakes.HALF, ANNA, kept=0)
    detail, shown = offered(desk, scheduler, early)
    assert shown == []
    assert "diverge at the same place" in detail
    assert "no checkpoint to go on from" in detail


def test_a_run_whose_training_ended_at_its_checkpoint_says_so_wherever_it_is_told(
    desk: Desk, scheduler: FakeScheduler
) -> None:
    run = fakes.diverged(scheduler, fakes.HALF, ANNA)
    scheduler.resume(run.id, ANNA, factor=0)
    fakes.say(scheduler, scheduler.store.begin_attempt(run.id), ("finished", {"status": "succeeded", "reason": ""}))
    detail, shown = offered(desk, scheduler, run)
    assert shown == []
    compared = asked("stored:0", run.id)
    page = str(comparing.render(desk, ANNA, compared, "size.bytes", "perplexity")[0])
    first, second = json.loads(dossier.as_json(desk, ANNA, compared))["models"]
    said = " ".join(second["diverged"])
    assert first["diverged"] == []
    for text in (page, said, dossier.html(desk, ANNA, compared)):
        assert "in attempt 1: the loss is nan." in text
        assert "the training ends after step 100, with the weights of that step." in text
    for text in (detail, report.markdown(desk.entry(run.id, ANNA)).replace("\\_", "_")):
        assert "Training diverged at step 121 in attempt 1: the loss is nan." in text
        assert "the training ends after step 100, with the weights of that step." in text
        assert "learning_rate_factors: 0 after 100" in text
    with language.use(language.CHINESE):
        detail, _ = offered(desk, scheduler, run)
    assert "第 1 次尝试的训练在第 121 步发散：损失为 nan。" in detail
    assert "训练在第 100 步之后结束" in detail


def test_a_refresh_shows_nothing_of_another_visitor(desk: Desk, scheduler: FakeScheduler) -> None:
    run = fakes.running(scheduler, fakes.HALF, ANNA)
    shown = runs.refresh(desk, Journal(scheduler.store), BEN, run.id, "", ("", "", ""))
    assert run.id not in str(shown)
    assert "Distilled" not in str(shown)


def test_a_run_that_a_link_may_not_open_is_refused_as_everywhere(desk: Desk, scheduler: FakeScheduler) -> None:
    run = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    assert runs.open_link(desk, ANNA, run.id) == run.id
    for run_id in (run.id, "00000000", "stored:0", "../" * 500):
        with pytest.raises(UnknownName) as refused:
            runs.open_link(desk, BEN, run_id)
        with pytest.raises(UnknownName) as usual:
            desk.run(run_id, BEN)
        assert edge.line(refused.value) == edge.line(usual.value)
    assert desk.opened.of(BEN) == ()


def test_an_address_says_which_tab_is_open(desk: Desk) -> None:
    async def make() -> Page:  # Gradio opens an event loop, and leaves it open, where none is running
        return page.lay_out(desk, Journal(desk.store))

    components = asyncio.run(make()).get_config_file()["components"]
    assert tuple(each["props"]["id"] for each in components if each["type"] == "tabitem") == links.TABS
    assert [links.tab_of({"tab": each}) for each in links.TABS] == list(links.TABS)
    for query, tab in (
        ({}, ""), ({"tab": "<b>"}, ""), ({"run": "x"}, "runs"), ({"recipe": "x", "lang": "en"}, "compress"),
        ({"run": "x", "tab": "methods"}, "methods"), ({"tab": "none", "run": "x"}, "runs"), ({"compare": "a,b"}, ""),
    ):  # fmt: skip
        assert links.tab_of(query) == tab


def test_the_journal_reads_each_event_once(scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fakes.running(scheduler, fakes.HALF, ANNA)
    journal, asked = Journal(scheduler.store), []
    read = scheduler.store.events
    monkeypatch.setattr(scheduler.store, "events", lambda *a, **k: asked.append(k["after"]) or read(*a, **k))
    story = journal.story(run)
    assert [name for _, name in story.phases] == ["loading", "GPTQ", "measuring"]
    assert len(story.series["loss"][1]) == 36
    fakes.say(scheduler, run, ("sample", {"series": "loss", "value": 0.1, "unit": "nat"}), start=500)
    assert len(journal.story(run).series["loss"][1]) == 37
    assert asked[0] == 0
    assert asked[1] > 70


def test_files_carry_no_formula_and_no_markup(desk: Desk, scheduler: FakeScheduler) -> None:
    entry = desk.entry(fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1).id, ANNA)
    evil = entry.measured["perplexity"].model_copy(update={"name": "=cmd|' /C calc'!A0", "unit": "@x"})
    loaded = type(entry)(entry.key, entry.label, entry.run, {**entry.measured, evil.name: evil})
    rows = report.measurements(loaded).splitlines()
    assert any(row.startswith("'=cmd") and ",'@x," in row for row in rows)
    assert not any(row.startswith("=") for row in rows)
    assert "\\|" in report.markdown(loaded)
    assert "quantize/gptq" in report.recipe(loaded)


@pytest.mark.parametrize("port", ["0", "70000", "x", "-1"])
def test_a_bad_port_is_one_line(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", port)
    with pytest.raises(SystemExit, match="PORT"):
        server.address()


def test_a_run_shows_its_estimate_beside_the_truth(desk: Desk, scheduler: FakeScheduler) -> None:
    journal = Journal(desk.store)
    working = runs.describe(desk, journal, ANNA, fakes.running(scheduler, FIRST, ANNA))
    assert working.count('class="limit"') == 2
    assert "Estimate and truth" not in working
    done = runs.describe(desk, journal, ANNA, fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1))
    for cell in ("5.00 GiB", "1.12 GiB", "0.22×", "40 s", "1 min 50 s", "2.8×"):
        assert f"<td>{cell}</td>" in done, cell
