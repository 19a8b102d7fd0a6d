"""What a visitor sees and does, in a real browser against a real server with real workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, StorageState, expect

from tests.browser.conftest import PATIENCE, Open, barriers
from ui.wording import DICTIONARIES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]  # the first comparison is real work
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
TABS = ("Compare", "Compress", "Runs", "Methods")


FITTING = """() => {
  const charts = [...document.querySelectorAll(".js-plotly-plot")].filter((chart) => chart.clientWidth);
  const fits = (chart) => chart.querySelector(".main-svg").clientWidth === chart.clientWidth;
  return charts.length >= 5 && charts.every(fits);
}"""


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def first_run(page: Page) -> str:
    tab(page, "Runs")
    button = page.locator("#mq-runs [data-run]").first
    expect(button).to_be_visible(timeout=30_000)
    return button.get_attribute("data-run") or ""


def test_a_visitor_who_does_nothing_sees_a_real_comparison(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    expect(page.locator("#mq-summary .mq-chip.good")).to_have_text("measured here", timeout=30_000)
    expect(page.locator(".mq-verdict").first).to_contain_text(re.compile(r"smaller.*perplexity"))
    expect(page.locator("#mq-summary .mq-card")).to_have_count(5)
    expect(page.locator("#mq-front .main-svg").first).to_be_visible(timeout=30_000)
    expect(page.locator(".mq-pane .tok").first).to_be_visible()
    expect(page.locator(".mq-pane").nth(1).locator(".stats")).to_contain_text("KL")


def test_both_models_work_at_once_and_a_token_tells_its_rivals(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    expect(page.locator(".mq-pane .tok").first).to_be_visible(timeout=30_000)
    page.get_by_label("Free run").check()
    page.evaluate("""() => {
        window.together = false;
        new MutationObserver(() => {
            if (document.querySelectorAll('.mq-pane[aria-busy="true"]').length === 2) window.together = true;
        }).observe(document.querySelector('#mq-panes'), {subtree: true, childList: true, attributes: true});
    }""")
    page.locator("#mq-prompt textarea").fill("One morning")
    page.locator("#mq-run-both").click()
    for place in (0, 1):
        expect(page.locator(".mq-pane").nth(place).locator(".stats")).to_contain_text("tokens", timeout=PATIENCE)
        assert page.locator(".mq-pane").nth(place).locator(".tok").count() > 3
    assert page.evaluate("window.together")
    page.locator(".mq-pane").first.locator(".tok").first.click()
    expect(page.locator(".mq-token")).to_be_visible()
    expect(page.locator(".mq-token .column")).to_have_count(2)
    assert page.locator(".mq-token .column").first.locator("li").count() == 5


def test_the_same_text_is_shaded_live(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    expect(page.locator(".mq-pane .tok").first).to_be_visible(timeout=30_000)
    page.locator("#mq-prompt textarea").fill("The baker")
    page.locator("#mq-run-both").click()
    expect(page.locator(".mq-pane").nth(1).locator(".stats")).to_contain_text("tokens", timeout=PATIENCE)
    texts = [page.locator(".mq-pane .text").nth(place).inner_text() for place in (0, 1)]
    assert texts[0] == texts[1] != ""
    assert page.locator(".mq-pane").first.locator(".kl1, .kl2, .kl3").count() == 0
    page.locator(".mq-pane").nth(1).locator(".tok").nth(1).click()
    expect(page.locator(".mq-token")).to_contain_text("nats")


def test_stop_ends_the_waiting_and_both_can_run_again_at_once(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    expect(page.locator(".mq-pane .tok").first).to_be_visible(timeout=30_000)
    page.locator("#mq-prompt textarea").fill("Once")
    page.locator("#mq-run-both").click()
    page.locator("#mq-stop").click()
    expect(page.locator("#mq-panes")).to_contain_text(re.compile(r"Stopped\.|tokens"), timeout=30_000)
    expect(page.locator('.mq-pane[aria-busy="true"]')).to_have_count(0)
    for _ in range(2):  # the second click replaces what the first one started
        page.locator("#mq-run-both").click()
    for place in (0, 1):
        expect(page.locator(".mq-pane").nth(place).locator(".stats")).to_contain_text("tokens", timeout=60_000)


def test_a_blind_vote_reveals_the_models_afterwards(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    expect(page.locator(".mq-pane .tok").first).to_be_visible(timeout=30_000)
    page.get_by_label("Blind vote").check()
    page.locator("#mq-run-both").click()
    left = page.get_by_role("button", name="Left is better")
    expect(left).to_be_visible(timeout=PATIENCE)
    assert "GPTQ" not in page.locator("#mq-panes").inner_text()
    left.click()
    expect(page.get_by_text(re.compile("Left was .*GPTQ|right was .*GPTQ"))).to_be_visible(timeout=30_000)


def test_three_models_part_and_are_sent_around(
    open_page: Open, returning: StorageState, browser: Browser, tmp_path: Path
) -> None:
    page = open_page("?compare=stored:0,stored:1,stored:0&mode=free&prompt=One+morning&max_tokens=24", state=returning)
    expect(page.locator("#mq-prompt textarea")).to_have_value("One morning", timeout=30_000)
    expect(page.locator("#mq-pick-c")).to_be_visible()
    page.locator("#mq-run-both").click()
    expect(page.locator(".mq-pane")).to_have_count(3, timeout=30_000)
    for place in range(3):
        expect(page.locator(".mq-pane").nth(place).locator(".stats")).to_contain_text("tokens", timeout=PATIENCE)
    texts = [page.locator(".mq-pane .text").nth(place).inner_text() for place in range(3)]
    assert texts[0] == texts[2]
    page.locator("#mq-differing summary").click()
    expect(page.locator("#mq-differing")).to_contain_text("wrote the same words")
    token = page.locator(".mq-pane").first.locator(".tok").first
    token.focus()  # by keyboard alone: to the next token, and what else the models had in mind there
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".mq-token .column")).to_have_count(3 if texts[0][:3] == texts[1][:3] else 2)
    with page.expect_download() as found:
        page.get_by_role("link", name="Report (HTML, one file)").click()
    report = tmp_path / "report.html"
    found.value.save_as(report)
    alone = browser.new_context(offline=True).new_page()
    said: list[str] = []
    alone.on("console", lambda message: said.append(message.text))
    alone.goto(report.as_uri())
    expect(alone.locator(".panes section")).to_have_count(3)
    assert alone.locator(".panes .text").first.inner_text() == texts[0]
    assert (
        alone.locator("main").evaluate("e => getComputedStyle(e).maxWidth") == "1000px"
    )  # its policy lets its style in
    assert said == []
    alone.context.close()


def test_start_then_reload_finds_the_run_which_is_cancelled_and_deleted(
    open_page: Open, returning: StorageState
) -> None:
    page = open_page(state=returning)
    tab(page, "Compress")
    expect(page.locator("#mq-fit")).to_contain_text("Fits", timeout=30_000)
    page.get_by_label("Half: prune depth → distill → 8 bit").check()
    expect(page.locator("#mq-recipe")).to_contain_text("distill/logits")
    page.locator("#mq-start").click()
    expect(page.locator("#mq-detail .mq-badge")).to_have_text(re.compile("queued|running"), timeout=30_000)
    run = first_run(page)
    page.reload()
    expect(page.locator(".mq-strip")).to_be_visible(timeout=30_000)
    assert first_run(page) == run
    expect(page.locator("#mq-cancel-now")).to_be_visible(timeout=60_000)
    page.locator("#mq-cancel").click()  # of the newest, which is shown where none was chosen
    expect(page.locator("#mq-detail .mq-badge")).to_have_text("cancelled", timeout=60_000)
    page.locator("#mq-delete").click()
    expect(page.locator("#mq-keep")).to_be_focused(timeout=30_000)
    expect(page.locator("#mq-keep")).to_have_accessible_description(re.compile("^Delete for good: "))
    page.keyboard.press("Enter")
    expect(page.locator("#mq-delete")).to_be_focused()
    expect(page.locator("#mq-sure")).to_be_hidden(timeout=30_000)
    page.keyboard.press("Enter")
    page.locator("#mq-sure").click(timeout=30_000)
    expect(page.locator(f"#mq-runs [data-run='{run}']")).to_have_count(0, timeout=30_000)
    expect(page.locator("#mq-runs [tabindex]")).to_be_focused(timeout=30_000)
    expect(page.locator("#mq-sure")).to_be_hidden(timeout=30_000)


def test_cards_edit_the_recipe(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    tab(page, "Compress")
    page.get_by_role("button", name="Steps and their settings").click()
    expect(page.locator(".mq-step")).to_have_count(1, timeout=30_000)
    page.locator(".mq-step").get_by_label("3", exact=True).check()
    expect(page.locator("#mq-recipe")).to_contain_text("bits: 3", timeout=30_000)
    page.get_by_label("Quarter: prune depth → distill → 4 bit").check()
    expect(page.locator(".mq-step")).to_have_count(3, timeout=30_000)
    student = page.locator(".mq-step").nth(1)
    expect(student.get_by_label("Hidden size")).to_have_count(0)
    student.get_by_label("a given size").check()
    expect(student.get_by_label("Hidden size")).to_be_visible(timeout=30_000)
    expect(student.get_by_label("Teachers")).to_be_hidden()
    student.get_by_role("button", name="More settings").click()
    expect(student.get_by_label("Teachers")).to_be_visible(timeout=30_000)
    student.get_by_role("button", name="Remove").click()
    expect(page.locator(".mq-step")).to_have_count(2, timeout=30_000)
    expect(page.locator("#mq-recipe")).not_to_contain_text("distill")


def test_bad_input_is_one_line_and_nothing_is_run(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    tab(page, "Compress")
    page.get_by_role("button", name="Paste a recipe").click()
    page.locator("#mq-paste textarea").fill("model: demo\nsteps: [{quantize/gptk: {}}]")
    page.get_by_role("button", name="Use this recipe").click()
    toast = page.get_by_text("Did you mean quantize/gptq")
    expect(toast).to_be_visible(timeout=30_000)
    assert "Traceback" not in page.content()
    page.locator("#mq-model textarea, #mq-model input").first.fill("/nowhere/<img src=x onerror=alert(1)>")
    expect(page.locator("#mq-fit")).to_contain_text("There is no model folder", timeout=30_000)
    assert page.locator("#mq-fit img").count() == 0


def test_a_link_carries_a_recipe_and_is_judged(open_page: Open, returning: StorageState) -> None:
    page = open_page("?recipe=steps%3A%20%5B%7Bquantize%2Frtn%3A%20%7Bbits%3A%202%7D%7D%5D", state=returning)
    expect(page.locator("#mq-recipe")).to_contain_text("bits: 2", timeout=30_000)
    expect(page.get_by_role("tab", name="Compress", exact=True)).to_have_attribute("aria-selected", "true")
    bad = open_page("?recipe=%7B%7B%3Cscript%3E", state=returning)
    expect(bad.get_by_text("not valid YAML")).to_be_visible(timeout=30_000)


def test_differences_and_files_of_finished_runs(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    tab(page, "Runs")
    row = page.locator("#mq-runs tr", has_text="succeeded").filter(has_text="GPTQ").locator("[data-run]").first
    run = row.get_attribute("data-run")
    row.click()
    expect(page.locator("#mq-detail .mq-files a")).to_have_count(5, timeout=30_000)
    assert page.url.endswith(f"/?tab=runs&run={run}")
    with page.expect_download() as found:
        page.get_by_role("link", name="Recipe (YAML)").click()
    assert "quantize/gptq" in Path(found.value.path()).read_text()
    again, stranger = open_page(f"?run={run}&note=kept", state=returning), open_page(f"?run={run}")
    for each in (again, stranger):
        expect(each.locator("[data-tab-id=runs]")).to_have_attribute("aria-selected", "true", timeout=30_000)
        assert each.url.endswith(f"/?run={run}&{'note=kept&' if each is again else ''}tab=runs")
    expect(again.locator("#mq-detail .mq-run-head code")).to_have_text(str(run), timeout=30_000)
    expect(stranger.get_by_text("Unknown run")).to_be_visible(timeout=30_000)
    expect(stranger.locator("#mq-detail")).not_to_contain_text(str(run))  # an own first run may stand there
    for name in ("recipe.yaml", "model.zip"):
        assert stranger.request.get(f"/runs/{run}/{name}", fail_on_status_code=False).status == 404
    expect(page.locator("#mq-detail .mq-live").first).to_be_visible()
    expect(page.locator("#mq-detail .mq-heat td.sum").last).to_contain_text("bits")
    expect(page.locator("#mq-scaling .main-svg").first).to_be_visible(timeout=30_000)
    page.locator("#mq-scaling-numbers summary").click()
    with page.expect_download() as drawn:
        page.get_by_role("link", name="The same as CSV").click()
    assert "GPTQ 4 bit" in Path(drawn.value.path()).read_text()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("tab", name="Compare", exact=True)).to_have_attribute("aria-selected", "true")
    assert "tab=compare" in page.url
    page.wait_for_function(FITTING)  # they were drawn while their tab was hidden


def test_headers_and_health(open_page: Open) -> None:
    page = open_page()
    answer = page.request.get("/healthz")
    assert answer.json() == {"status": "ok"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    cookie = next(c for c in page.context.cookies() if c.get("name") == "maquette_visitor")
    assert cookie.get("httpOnly") is True


def test_a_phone_needs_no_sideways_scrolling(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning, width=390)
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(800)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("language", "width"), [("en", 1280), ("zh-CN", 390)])
def test_axe_finds_nothing(language: str, width: int, scheme: str, open_page: Open, returning: StorageState) -> None:
    page = open_page(f"?lang={language}", state=returning, width=width)
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
    for name in TABS:
        tab(page, DICTIONARIES[language][f"tab.{name.lower()}"])
        page.wait_for_timeout(1200)
        for summary in page.locator("summary:visible").all():
            summary.click()
        closed = page.locator("button.label-wrap:visible:not(.open)")
        for _ in range(closed.count()):
            closed.first.click()
            page.wait_for_timeout(300)
        if name == "Compress":
            expect(page.locator(".mq-step")).to_have_count(1, timeout=30_000)
        assert (name, barriers(page)) == (name, [])


def test_a_visitor_switches_to_chinese_and_back(open_page: Open, returning: StorageState) -> None:
    page = open_page("?note=kept", state=returning)
    expect(page.get_by_role("tab", name="Compare", exact=True)).to_be_visible()
    page.get_by_role("link", name="简体中文").click()
    expect(page.get_by_role("tab", name="对比", exact=True)).to_be_visible(timeout=30_000)
    assert "note=kept" in page.url
    assert page.evaluate("[document.documentElement.lang, navigator.language]") == ["zh-CN", "zh-CN"]
    expect(page.get_by_label("提示词", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="同时生成")).to_be_visible()
    expect(page.locator(".mq-verdict").first).to_contain_text(re.compile(r"缩小 .*困惑度"), timeout=30_000)
    expect(page.locator("#mq-front .xtitle")).to_have_text("磁盘占用，MiB", timeout=30_000)
    page.locator("#mq-summary summary", has_text="全部测量结果").click()
    expect(page.locator("#mq-summary tbody th").first).to_have_text("磁盘占用")
    tab(page, "压缩")
    expect(page.locator("#mq-fit")).to_contain_text("装得下", timeout=30_000)
    page.get_by_role("button", name="步骤与设置").click()
    expect(page.locator(".mq-step").get_by_label("组大小")).to_be_visible(timeout=30_000)
    page.get_by_role("button", name="粘贴配方").click()
    page.locator("#mq-paste textarea").fill("steps: [{quantize/gptk: {}}]")
    page.get_by_role("button", name="使用此配方").click()
    expect(page.get_by_text("您是不是指 quantize/gptq")).to_be_visible(timeout=30_000)
    tab(page, "运行")
    expect(page.locator("#mq-runs .mq-badge").first).to_have_text(
        re.compile("已完成|运行中|排队中|已取消"), timeout=30_000
    )
    assert "__type__" not in page.content()

    phone = open_page(state=page.context.storage_state(), width=390)  # the choice is kept
    for name in ("对比", "压缩", "运行", "方法"):
        tab(phone, name)
        phone.wait_for_timeout(600)
        assert phone.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name

    page.get_by_role("link", name="English").click()
    expect(page.get_by_role("tab", name="Compare", exact=True)).to_be_visible(timeout=30_000)
    expect(page.locator(".mq-verdict").first).to_contain_text("smaller", timeout=30_000)
    assert page.evaluate("document.documentElement.lang") == "en"
    shown = page.locator("#mq-summary, [role=tab], label").all_inner_texts()
    assert not re.search("[\u4e00-\u9fff]", "".join(shown))


def test_what_was_opened_stays_open_when_news_replace_it(open_page: Open, returning: StorageState) -> None:
    """Gradio takes from an element what its news do not have: the mark of being open among them."""
    page = open_page(state=returning)
    tab(page, "Methods")
    details = page.locator("details.mq-details:visible").first
    details.locator("summary").click()
    expect(details).to_have_attribute("open", "")
    details.evaluate("each => each.removeAttribute('open')")
    expect(details).to_have_attribute("open", "")
    details.locator("summary").click()
    expect(details).not_to_have_attribute("open", "")
