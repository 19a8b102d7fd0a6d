"""The fit meter: every part in a bar and a table, the free memory as a line, a way out where it does not fit."""

from __future__ import annotations

import re
from typing import cast

import pytest

from engine import fit, hardware, preflight
from engine.fit import Estimate, Need
from engine.records import Recipe
from tests.ui import fakes
from tests.ui.conftest import ANNA, request
from ui import meter, wording
from ui.desk import Desk
from ui.pages import compress, fitting
from ui.words import ENGLISH

GiB = 1 << 30
PARTS = {"weights": GiB, "kv_cache": GiB // 4, "activations": 1 << 20, "runtime": 700 << 20}
SERVING = Need("serve", {"weights": GiB // 2, "runtime": 350 << 20})


def shown(free: int) -> str:
    needs = (Need("compress", PARTS, "GPTQ"), Need("verify", {"weights": GiB, "runtime": 1 << 20}))
    return meter.fit_meter(Estimate(needs, SERVING, free, {"steps": 60.0, "measure": 30.0}, ("a note",)))


def test_the_meter_shows_every_part_in_two_bars_and_a_table() -> None:
    html = shown(8 * GiB)
    for words in ("Fits", "weights 1.00 GiB", "KV cache", "activations", "runtime 700 MiB", "a note", "1 min 30 s"):
        assert words in html, words
    assert html.count('class="mq-bar parts"') == 2
    assert html.count('class="free"') == 2
    assert "GPTQ" in html
    assert "steps 1 min · measure 30 s" in html
    table = html[html.index("<table") :]
    assert re.search(r"Sum</th><td>1\.93 GiB</td><td>1\.00 GiB</td><td>864 MiB", table) or "Sum" in table
    assert table.count("8.00 GiB") == 3  # what is free, for each situation


def test_what_does_not_fit_says_so_beyond_the_line() -> None:
    html = shown(GiB)
    assert "Does not fit" in html
    assert 'class="mq-bar parts over"' in html
    assert "Needs 1.93 GiB, 1.00 GiB are free" in html
    line = re.search(r'class="free" style="left:([\d.]+)%', html)
    assert line is not None
    assert 50 < float(line[1]) < 53  # of 1.93


def test_serving_more_or_longer_says_what_is_too_much() -> None:
    needs = (Need("compress", PARTS),)
    some = {(1, 1024): GiB, (1, 4096): 3 * GiB, (8, 1024): 2 * GiB, (8, 4096): 10 * GiB}
    html = meter.fit_meter(Estimate(needs, SERVING, 4 * GiB, loads=some))
    assert "1,024 tokens each</th>" in html
    assert re.search(r"8</th><td>2\.00 GiB</td><td>10\.0 GiB, too much</td>", html)
    assert html.count("too much") == 1


def test_every_part_and_situation_has_words_and_a_colour() -> None:
    from ui.theme import ASSETS

    css = (ASSETS / "maquette.css").read_text()
    for part in fit.PARTS:
        assert f"fit.{part}" in ENGLISH
        assert f".part.{part} {{" in css
    for situation in ("probe", "compress", "save", "verify", "measure", "serve"):
        assert f"fit.situation.{situation}" in ENGLISH


def test_a_way_out_is_one_click(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Recipe.model_validate({"steps": [{"quantize/rtn": {"group_size": 64}}]})
    needs = preflight.estimate(whole).total
    monkeypatch.setattr(hardware, "free_memory", lambda: needs - (1 << 20))
    html, way = fitting.look(desk, whole)
    assert way is not None
    assert way.fits
    button = cast(dict[str, object], fitting.button(way))
    assert (button["visible"], button["value"]) == (True, meter.way_label(way))
    assert wording.size(way.total) in html
    changed = fitting.changed(desk, whole)
    assert preflight.estimate(changed).fits
    assert changed.steps == whole.steps
    assert fitting.look(desk, changed)[1] is None
    compress.submit(desk, compress.as_draft(changed), False, request(ANNA))
    scheduler = cast(fakes.FakeScheduler, desk.scheduler)
    scheduler.idle = 1 << 20  # of a warm model that ends when the run is started
    assert fitting.look(desk, whole)[1] is None
    assert fitting.changed(desk, whole) == whole
