"""Advice in a real browser: cards are drawn as they are asked for, and one click makes one the recipe."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import StorageState, expect

from tests.browser.conftest import Open

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def test_advice_is_one_click_from_a_recipe(open_page: Open, returning: StorageState) -> None:
    page = open_page(state=returning)
    page.get_by_role("tab", name="Compress", exact=True).click()
    meter = page.locator("#mq-fit")
    expect(meter.locator(".mq-free .free")).to_have_count(2, timeout=30_000)
    page.get_by_role("button", name="Advice: what to do first").click()
    page.get_by_label("Lower latency").check()
    expect(page.locator("#mq-goal-number input")).to_have_value("0.5")
    page.locator("#mq-goal-number input").fill("0.6")
    page.locator("#mq-goal-number input").blur()
    page.locator("#mq-advise").click()
    first = page.locator(".mq-step", has=page.get_by_text("start here"))
    expect(first).to_be_visible(timeout=30_000)
    expect(first).to_contain_text("GPTQ, 4 bit, and the KV cache in 8")
    expect(page.locator(".mq-advice").last).to_contain_text("for the teacher's tokens")
    expect(page.get_by_text("No help for this goal: Write for more sequences at a time")).to_be_visible()
    first.get_by_role("button", name="Use this recipe").click()
    expect(page.locator("#mq-recipe")).to_contain_text("quantize/kv_cache")
    expect(meter).to_contain_text("KV cache")
