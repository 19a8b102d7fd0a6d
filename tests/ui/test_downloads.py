"""What leaves the page as a file: the report that stands alone, numbers, the card, the model; and only one's own."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import time
import zipfile
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine import card, hardware
from engine.records import Model, Output, Run, Token
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, asked
from tests.ui.fakes import FakeScheduler
from ui import cards, charts, comparing, dossier, still, views
from ui.desk import BASELINE, FIRST, Desk
from ui.downloads import Downloads
from ui.edge import COOKIE
from ui.journal import Journal

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def client(desk: Desk) -> TestClient:
    return TestClient(Starlette(routes=[*Downloads(desk).routes()]), cookies={COOKIE: ANNA})


@pytest.fixture
def small(scheduler: FakeScheduler) -> Run:
    run = fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.1)
    folder = Path(str(run.artifact))
    weights = bytes(range(256)) * 9000  # more than one piece
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    (folder / "model.safetensors").write_bytes(weights)
    card.write(folder, run.recipe)
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
    }
    source = run.recipe.model_copy(update={"model": Model(source="/home/anna/secret-folder/llama")})
    body = {"format": 1, "recipe": source.model_dump(mode="json"), "versions": {}, "files": files}
    (folder / "MANIFEST.json").write_text(json.dumps(body))
    return run


def test_the_report_stands_alone_and_says_what_the_page_says(desk: Desk, small: Run, client: TestClient) -> None:
    said = asked("stored:0", small.id, "Mara lives in", "same")
    answer = client.get(f"/compare/report.html?compare=stored:0,{small.id}&prompt=Mara+lives+in")
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    page = answer.text
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src &#39;none&#39;; style-src &#39;sha256-{digest}&#39;" in page
    assert not re.search(r"<script|style=|src=|url\(|@import|href=| on\w+=", page.replace("style-src", ""))
    for text in ("3.0× smaller", "GPTQ 4 bit", "bits: 4", "Mara lives in", "a test", "torch ", "joint standard errors"):
        assert text in page, text
    assert page.count("<svg") >= 5
    assert re.search(r'<span class="tok kl3" title="Its prediction moved by 0.900 nats', page)
    summary = str(comparing.render(desk, ANNA, said, "size.bytes", "perplexity")[0])
    for number in re.findall(r"<dd>([\d.]+ \w+)", summary):
        assert number in page


def test_a_report_names_the_machine_and_the_day_instead_of_here_and_now(
    desk: Desk, scheduler: FakeScheduler, small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "machine", lambda: "a quiet machine")
    base = fakes.finished(scheduler, BASELINE, ANNA)
    page = dossier.html(desk, ANNA, asked(base.id, small.id))
    assert "measured here" not in page
    assert "this machine" not in page
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(run.finished or 0)) for run in (base, small)})
    assert f"Measured on a quiet machine, {', '.join(days)}." in page


def test_a_live_text_is_in_the_report_and_marked_where_it_parts(desk: Desk, small: Run, client: TestClient) -> None:
    said = asked("stored:0", small.id, f"Tell {EVIL}", "free", temperature=0.5)
    list(comparing.stream(desk, ANNA, said))
    query = {"compare": f"stored:0,{small.id}", "prompt": f"Tell {EVIL}", "mode": "free", "temperature": "0.5"}
    page = client.get("/compare/report.html", params=query).text
    assert page.count('class="tok split"') == 2
    assert "&lt;script&gt;" in page
    assert EVIL not in page
    assert "<mark" in page
    body = client.get("/compare/comparison.json", params=query).json()
    assert [text["parts_at"] for text in body["texts"]] == [5, 5]
    assert body["writing"]["temperature"] == 0.5


def test_csv_and_json_carry_every_number_and_no_formula(desk: Desk, small: Run, client: TestClient) -> None:
    query = f"?compare=stored:0,{small.id}"
    rows = list(csv.DictReader(io.StringIO(client.get(f"/compare/comparison.csv{query}").text)))
    mine = {row["name"]: row for row in rows if row["model"].startswith("B")}
    assert float(mine["perplexity"]["difference"]) == pytest.approx(0.1)
    assert (mine["perplexity"]["inside_noise"], mine["size.bytes"]["inside_noise"]) == ("True", "False")
    body = client.get(f"/compare/comparison.json{query}").json()
    assert {m["name"] for m in body["models"][1]["measurements"]} == set(mine)
    entry = desk.entry(small.id, ANNA)
    evil = entry.measured["perplexity"].model_copy(update={"name": "=cmd()"})
    (key,) = (known for known in desk._finished if known[0] == small.id)
    desk._finished[key] = type(entry)(entry.key, entry.label, entry.run, {"=cmd()": evil})
    assert ",'=cmd()," in client.get(f"/compare/comparison.csv{query}").text


def test_everything_with_an_interval_says_which_it_is(desk: Desk, small: Run, client: TestClient) -> None:
    entries = [desk.entry("stored:0", ANNA), desk.entry(small.id, ANNA)]
    page = str(views.run_detail(small, Journal(desk.store).story(small), (), None, entries[1], entries[0]))
    report = client.get(f"/compare/report.html?compare=stored:0,{small.id}").text
    taken = [client.get(f"/runs/{small.id}/{name}").text for name in ("report.md", "README.md")]
    for text in (page, report, str(cards.comparison(entries, "")), *taken):
        assert "± 0.118" in text
        assert text.count("± is a 95 % interval.") == 1
    for table in (f"/runs/{small.id}/measurements.csv", f"/compare/comparison.csv?compare=stored:0,{small.id}"):
        rows = {row["name"]: row for row in csv.DictReader(io.StringIO(client.get(table).text))}
        assert rows["perplexity"]["standard_error"] == "0.06"


def test_bad_addresses_and_other_visitors_get_nothing(small: Run, client: TestClient, scheduler: FakeScheduler) -> None:
    theirs = fakes.finished(scheduler, FIRST, BEN, 3.0, 0.1).id
    for path in (
        f"/compare/report.html?compare=stored:0,{theirs}", f"/runs/{theirs}/model.zip", f"/runs/{theirs}/README.md",
        "/compare/else.html?compare=stored:0,stored:1", "/runs/nothere/recipe.yaml", f"/runs/{small.id}/MANIFEST.json",
        "/compare/report.html?compare=../../etc,passwd",
    ):  # fmt: skip
        assert client.get(path).status_code == 404, path
    for path, words in (("?compare=stored:0", "two to four"), ("?compare=stored:0,stored:1&seed=x", "seed")):
        answer = client.get(f"/compare/report.html{path}")
        assert (answer.status_code, words in answer.text) == (400, True)
    odd = fakes.finished(scheduler, FIRST, "short", 3.0, 0.1).id  # no name that a cookie of ours can hold
    assert client.get(f"/runs/{odd}/recipe.yaml", cookies={COOKIE: "short"}).status_code == 404
    client.cookies.clear()
    assert client.get(f"/runs/{small.id}/recipe.yaml").status_code == 404
    assert client.get("/compare/report.html?compare=stored:0,stored:1").status_code == 404
    assert client.get("/runs/stored:0/model.zip", cookies={COOKIE: ANNA}).status_code == 409


def test_the_model_is_a_whole_zip_with_a_card_that_has_the_numbers(small: Run, client: TestClient) -> None:
    answer = client.get(f"/runs/{small.id}/model.zip")
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.testzip() is None
    files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert files["model.safetensors"] == bytes(range(256)) * 9000
    manifest = json.loads(files["MANIFEST.json"])
    assert set(manifest["files"]) == set(files) - {"MANIFEST.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}, name
    assert "secret-folder" not in files["MANIFEST.json"].decode()
    text = files["README.md"].decode()
    assert text == client.get(f"/runs/{small.id}/README.md").text
    for words in ("perplexity +2.4 % (inside the noise)", "| Perplexity | 4.20 ± 0.118 |", "from_pretrained"):
        assert words in text, words
    written = (Path(str(small.artifact)) / "README.md").read_text()
    assert "Perplexity" not in written  # the manifest covers it: no number that another run would not have


def test_a_model_that_is_not_whole_is_one_line(small: Run, client: TestClient) -> None:
    folder = Path(str(small.artifact))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")
    answer = client.get(f"/runs/{small.id}/model.zip")
    assert (answer.status_code, "not there any more" in answer.text) == (409, True)
    (folder / "MANIFEST.json").unlink()
    assert "not complete any more" in client.get(f"/runs/{small.id}/model.zip").text


def test_still_charts_hold_what_the_figures_hold() -> None:
    runs = [(name, {m.name: m for m in fakes.measured(shrink, worse)}) for name, shrink, worse in
            (("original", 1, 0), ("small", 3, 0.3))]  # fmt: skip
    for draw in (charts.accuracy, charts.latency, charts.memory, charts.pareto):
        chart = draw(runs)
        svg = str(still.draw(chart.figure, f"{chart.caption} {EVIL}"))
        assert EVIL not in svg
        assert "style=" not in svg
        assert "nan" not in svg
        places = [float(number) for number in re.findall(r' (?:x|y|cx|cy|width|height)="(-?[\d.]+)"', svg)]
        assert all(-1 <= place <= still.WIDTH for place in places)
    bars = str(still.draw(charts.memory(runs).figure, "x"))
    heights = [
        float(height) for height in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', bars)
    ]
    assert heights[0] / heights[3] == pytest.approx(3.0, rel=0.02)  # 5.4 MB beside 1.8 MB
    front = str(still.draw(charts.pareto(runs).figure, "x"))
    assert front.count("<circle") == 2
    assert "inside the noise" in front


def test_the_shelf_keeps_the_last_texts_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    from ui import shelf

    monkeypatch.setattr(shelf, "MOST", 2)
    kept = shelf.Shelf()
    pane = shelf.WrittenPane(title="A", tokens=(Token(text="x", probability=0.5),))
    for owner in (ANNA, BEN, "carl"):
        kept.put(owner, shelf.Written(asked=asked("a", "b"), panes=(pane, pane)))
    assert kept.find(ANNA, asked("a", "b")) is None
    found = kept.find(BEN, asked("a", "b"))
    assert found is not None
    assert found.panes[0] == pane
    assert kept.find(BEN, asked("a", "b", "other")) is None


def test_a_report_of_a_run_with_odd_tokens_is_text(desk: Desk, small: Run) -> None:
    entry = desk.entry(small.id, ANNA)
    odd = Output(prompt="Mara lives in", tokens=(Token(text=EVIL, probability=1.0),))
    desk._finished[(small.id, small.attempt)] = type(entry)(entry.key, EVIL, entry.run, entry.measured, (odd,))
    assert EVIL not in dossier.html(desk, ANNA, asked(small.id, small.id, "Mara lives in", "free"))


def test_nothing_that_is_sent_around_names_a_folder_of_this_machine(desk: Desk, scheduler: FakeScheduler) -> None:
    source = Model(source="/home/anna/secret-folder/llama")
    run = fakes.finished(scheduler, FIRST.model_copy(update={"model": source}), ANNA, 3.0, 0.1)
    for make, _ in dossier.WRITERS.values():
        text = make(desk, ANNA, asked("stored:0", run.id))
        assert "GPTQ" in text
        assert "secret-folder" not in text
