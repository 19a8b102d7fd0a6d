"""A team server in a browser: the form, the page behind it, a session that ends."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, expect

from engine.users import UserFile
from tests.browser.conftest import Watch, barriers, running

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("team")
    UserFile(home).add("anna", PASSWORD)
    with running(home, MAQUETTE_MODE="team") as address:
        yield address


def test_login_page_and_logout(team: str, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 900}, base_url=team)
    page = context.new_page()
    watch = Watch(page, team)
    page.goto(f"{team}?recipe=steps%3A%20%5Bquantize%2Frtn%5D")
    page.get_by_label("Name").fill("anna")
    page.get_by_label("Password").fill("wrong password")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("Wrong name or password")
    assert barriers(page) == []
    watch.problems.clear()  # the browser reports the 403, as it should
    page.get_by_label("Name").fill("anna")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".mq-who")).to_contain_text("Logged in as anna.", timeout=60_000)
    expect(page.locator("#mq-recipe")).to_contain_text("quantize/rtn", timeout=30_000)  # the link survived the login
    page.get_by_text("What one visitor may take here").click()
    expect(page.locator("#mq-limits")).to_contain_text("3 waiting")
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    page.locator("#mq-start").click()
    expect(page.locator("#mq-detail .mq-badge")).to_have_text(re.compile("queued|running"), timeout=30_000)
    page.get_by_role("button", name="Share", exact=True).click()
    expect(page.locator("#mq-detail")).to_contain_text("The team can look at this run", timeout=30_000)
    expect(page.get_by_role("button", name="Stop sharing")).to_be_visible()
    assert watch.problems == []
    assert watch.foreign == []
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Password")).to_be_visible()
    page.goto(team)
    expect(page.get_by_label("Password")).to_be_visible()
    context.close()
