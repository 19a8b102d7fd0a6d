"""How long a visitor waits: from the page being up to the first comparison, from Start to the second one.

    python -m benchmarks.visit

Needs Chromium and Playwright, as the browser tests do. Nothing is clicked until the live comparison stands; then
Start is pressed on 4-bit GPTQ with another seed, so that it is a run of its own.
"""

from __future__ import annotations

import os
import re
import sys
import time

from playwright.sync_api import expect, sync_playwright

from benchmarks.sections import CHROMIUM, FLAGS, README, running_page, write_section
from engine import hardware

PATIENCE = 300_000  # milliseconds
RECIPE = "model: demo\nsteps: [{quantize/gptq: {bits: 4, group_size: 64}}]\nseed: 1\n"


def main() -> None:
    """Measure and write the result."""
    with running_page() as (address, started), sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.monotonic()
        page.goto(address)
        expect(page.locator("#mq-summary .mq-card").first).to_be_visible(timeout=PATIENCE)
        stored = time.monotonic() - began
        expect(page.locator("#mq-summary .mq-chip.good")).to_be_visible(timeout=PATIENCE)
        live = time.monotonic() - began
        page.get_by_role("tab", name="Compress", exact=True).click()
        page.get_by_role("button", name="Paste a recipe").click()
        page.locator("#mq-paste textarea").fill(RECIPE)
        page.get_by_role("button", name="Use this recipe").click()
        expect(page.locator("#mq-recipe")).to_contain_text("seed: 1", timeout=PATIENCE)
        expect(page.locator("#mq-fit")).to_contain_text("Fits", timeout=PATIENCE)
        began = time.monotonic()
        page.locator("#mq-start").click()
        expect(page.locator("#mq-detail .mq-badge")).to_have_text(re.compile("queued|running"), timeout=PATIENCE)
        # Start leads to the Runs tab, where the finished run shows its verdict against the original.
        expect(page.locator("#mq-detail .mq-badge")).to_have_text("succeeded", timeout=PATIENCE)
        expect(page.locator("#mq-detail .mq-verdict")).to_be_visible(timeout=PATIENCE)
        compared = time.monotonic() - began
        browser.close()
    rows = (
        ("`python app.py` answers", started),
        ("the stored comparison stands", stored),
        ("a visitor who does nothing sees both models measured here", live),
        ("a visitor who presses Start on 4-bit GPTQ sees it compared", compared),
    )
    lines = [
        f"{hardware.machine()}, load average {os.getloadavg()[0]:.1f} at the end; one run.",
        "", "| what | seconds |", "| --- | ---: |", *(f"| {what} | {seconds:.1f} |" for what, seconds in rows),
    ]  # fmt: skip
    write_section(README, "visit", "\n".join(lines))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
