"""The whole way of a visitor, in both languages: find a model on the hub, see that it fits, make it smaller, compare,
take the report and the model away, and load that in stock transformers; take it in another program's format, too."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Locator, Page, StorageState, expect

from tests.browser.conftest import PATIENCE, Open, barriers
from ui.language import CHINESE, ENGLISH
from ui.wording import DICTIONARIES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
RECIPE = """\
model: org/tiny
steps:
  - quantize/rtn: {{bits: {bits}, group_size: 64}}
measure: [size]
"""


def take(page: Page, link: Locator, place: Path) -> Path:
    """Click a link and keep the file that comes."""
    with page.expect_download(timeout=60_000) as coming:
        link.click()
    file = place / coming.value.suggested_filename
    coming.value.save_as(file)
    return file


@pytest.mark.parametrize(("code", "bits"), [(ENGLISH, 4), (CHINESE, 8)])
def test_from_a_search_to_a_model_that_transformers_loads(
    code: str, bits: int, open_page: Open, returning: StorageState, tmp_path: Path
) -> None:
    words, other = DICTIONARIES[code], "awq" if bits == 4 else "gptq"
    page = open_page(f"?lang={code}", state=returning)
    page.get_by_role("tab", name=words["tab.compress"], exact=True).click()
    page.get_by_role("button", name=words["models.find"]).click()
    page.locator("#mq-search input, #mq-search textarea").first.press_sequentially("org/ti")
    page.locator("#mq-hits").get_by_text("org/tiny").click(timeout=30_000)
    expect(page.locator("#mq-fit")).to_contain_text(words["fit.yes"], timeout=30_000)
    expect(page.locator("#mq-fit")).to_contain_text(words["models.architecture"])

    page.get_by_role("button", name=words["compress.yaml"]).click()
    page.locator("#mq-paste textarea").fill(RECIPE.format(bits=bits))
    page.get_by_role("button", name=words["compress.read"], exact=True).click()
    expect(page.locator("#mq-recipe")).to_contain_text("org/tiny", timeout=30_000)
    page.locator("#mq-start").click()
    detail = page.locator("#mq-detail")
    expect(detail).to_contain_text(words["status.succeeded"], timeout=PATIENCE)

    model = take(page, detail.locator('a[href$="model.zip"]'), tmp_path)
    expect(page.locator("#mq-export-format")).to_contain_text(words[f"format.{other}.for"])
    page.locator("#mq-export-start").dblclick()
    expect(page.locator("#mq-export-told a")).to_be_visible(timeout=PATIENCE)
    with zipfile.ZipFile(take(page, page.locator("#mq-export-told a"), tmp_path)) as archive:
        (config,) = (name for name in archive.namelist() if name.endswith("/config.json"))
        assert json.loads(archive.read(config))["quantization_config"]["quant_method"] == other
    expect(detail).to_contain_text(words["file.export"].format(format=words[f"format.{other}"]), timeout=30_000)
    page.get_by_role("button", name=words["runs.compare"], exact=True).click()
    expect(page.locator(".mq-verdict").first).to_contain_text(
        words["ratio.smaller"].format(ratio="").strip(), timeout=60_000
    )
    report = take(page, page.locator('a[href*="report.html"]').first, tmp_path).read_text()
    assert f'lang="{code}"' in report
    assert words["name.size.bytes"] in report
    assert "<script" not in report
    reader = page.context.new_page()
    reader.set_content(report)
    assert barriers(reader) == []
    reader.close()

    with zipfile.ZipFile(model) as archive:
        archive.extractall(tmp_path / "model")
    (folder,) = (file.parent for file in (tmp_path / "model").rglob("config.json"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = network(**tokenizer("Once upon a time", return_tensors="pt")).logits
    assert logits.isfinite().all()
