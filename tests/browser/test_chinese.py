"""The page in Chinese in a real browser: the switch, what Gradio builds, what handlers send, and a phone."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Page, StorageState, expect

from tests.browser.conftest import Open

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
HAN = re.compile("[\u4e00-\u9fff]")


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_a_visitor_switches_to_chinese_and_back(open_page: Open, returning: StorageState) -> None:
    page = open_page("?note=kept", state=returning)
    expect(page.get_by_role("tab", name="Compare", exact=True)).to_be_visible()
    page.get_by_role("link", name="简体中文").click()
    expect(page.get_by_role("tab", name="对比", exact=True)).to_be_visible(timeout=30_000)
    assert "note=kept" in page.url
    assert page.evaluate("[document.documentElement.lang, navigator.language]") == ["zh-CN", "zh-CN"]
    expect(page.get_by_label("提示词")).to_be_visible()
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
    expect(page.locator("#mq-runs .mq-badge").first).to_have_text("已完成", timeout=30_000)
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
    assert not HAN.search("".join(shown))
