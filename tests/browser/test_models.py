"""A model of the hub in a real browser: found while typing, chosen, judged, and a gated one with a token."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect

from tests.browser.conftest import Open
from tests.hub import Hub

pytestmark = pytest.mark.browser


def test_a_model_is_found_chosen_and_judged(open_page: Open, hub: Hub) -> None:
    page = open_page()
    page.get_by_role("tab", name="Compress", exact=True).click()
    page.get_by_role("button", name="Find a model on the hub").click()
    search = page.locator("#mq-search input, #mq-search textarea").first
    search.fill("org/gat")  # as pasting does: all at once, without keys
    expect(page.get_by_text("org/gated · 0 downloads")).to_be_visible(timeout=30_000)
    search.fill("")
    search.press_sequentially("org/")
    page.get_by_text("org/tiny · 1,234 downloads").click(timeout=30_000)
    expect(page.locator("#mq-model input, #mq-model textarea").first).to_have_value("org/tiny")
    fit = page.locator("#mq-fit")
    expect(fit).to_contain_text(hub.repos["org/tiny"].commit[:12], timeout=30_000)
    expect(fit).to_contain_text("mit")
    page.get_by_text("org/gated · 0 downloads").click()
    expect(fit).to_contain_text("org/gated is gated", timeout=30_000)
    token = page.locator("#mq-token input")
    assert token.get_attribute("type") == "password"
    token.fill("hf_may_read")
    token.blur()
    expect(fit).to_contain_text(hub.repos["org/gated"].commit[:12], timeout=30_000)
    assert "hf_may_read" not in page.content()
