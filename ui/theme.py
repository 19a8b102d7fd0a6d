"""The look: system fonts, one accent colour, contrast that holds in light and dark; nothing from another host."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from ui.language import LANGUAGES, use
from ui.wording import say

ASSETS = Path(__file__).parent.parent / "assets"
SANS = (
    "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC",
    "WenQuanYi Micro Hei", "sans-serif",
)  # fmt: skip
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# One listener for every copy button and language: HTML that arrives later needs no script of its own. And a chart that
# was drawn while its tab was hidden knew no width: it follows its place when the page's size changes, as it then does.
SCRIPT = """
<meta name="color-scheme" content="light dark">
<script>
// The address says which tab is open and which run was chosen, so that a reload or a link comes back to them.
const addressSays = (name, value) => {
  const address = new URL(location.href);
  if (value) address.searchParams.set(name, value);
  else address.searchParams.delete(name);
  if (address.href !== location.href) history.replaceState(history.state, "", address);
};
new MutationObserver((changes) => {
  const open = changes.map(({target}) => target).find((each) => each.matches('[data-tab-id][aria-selected="true"]'));
  if (open) addressSays("tab", open.dataset.tabId);
}).observe(document, {subtree: true, attributeFilter: ["aria-selected"]});
document.addEventListener("click", (event) => {
  const run = event.target.closest("#mq-runs [data-run]");
  if (run) addressSays("run", run.dataset.run);
  if (event.target.closest("#mq-start, #mq-look, #mq-sure")) addressSays("run", "");  // another run is shown
  const copy = event.target.closest("[data-copy]");
  if (copy) {
    const before = copy.textContent;
    const done = (sign) => { copy.textContent = sign; setTimeout(() => { copy.textContent = before; }, 1200); };
    const selected = () => {  // without HTTPS there is no clipboard: what is selected can be copied by hand
      const text = copy.closest(".mq-copy, .mq-code, div")?.querySelector("pre, code") ?? copy.parentElement;
      getSelection().selectAllChildren(text);
      done(document.execCommand("copy") ? "✓" : "⌘/Ctrl C");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(copy.dataset.copy).then(() => done("✓"), selected);
    else selected();
  }
  const language = event.target.closest("[data-language]");
  if (language && !event.ctrlKey && !event.metaKey) {  // keep what else the address says
    event.preventDefault();
    const address = new URL(location.href);
    address.searchParams.set("lang", language.dataset.language);
    location.assign(address);
  }
});
// What a reader opened stays open when news replace it: Gradio takes from an element what the new one does not have.
const opened = new Set();
const nameOf = (details) => {
  const place = details.closest("[id]")?.id ?? "";
  return `${place} ${details.querySelector("summary")?.textContent}`;
};
document.addEventListener("click", (event) => {
  const details = event.target.closest("summary")?.parentElement;
  if (details?.matches("details.mq-details")) opened[details.open ? "delete" : "add"](nameOf(details));
}, true);
new MutationObserver(() => {
  for (const details of document.querySelectorAll("details.mq-details:not([open])")) {
    if (opened.has(nameOf(details))) details.open = true;
  }
}).observe(document, {subtree: true, childList: true, attributeFilter: ["open"]});
let soon;
new ResizeObserver(() => {
  clearTimeout(soon);
  soon = setTimeout(() => {
    const charts = [...document.querySelectorAll(".js-plotly-plot")].filter((chart) => chart.clientWidth);
    const wrong = (chart) => chart.querySelector(".main-svg")?.clientWidth !== chart.clientWidth;
    if (charts.some(wrong)) window.dispatchEvent(new Event("resize"));
  }, 300);
}).observe(document.documentElement);
</script>
"""


def head() -> str:
    """What goes into the page's head. The style sheet too: Gradio's `css` rewrites selectors and breaks `:is()`."""
    return f"{SCRIPT}<style>{(ASSETS / 'maquette.css').read_text()}{''.join(map(_toast, LANGUAGES))}</style>"


def _toast(code: str) -> str:
    """What stands over an error in the corner, where Gradio says "Warning" in every language, whatever the title."""
    with use(code):
        return f"html:lang({code}) {{ --mq-toast: {json.dumps(say('error.title'), ensure_ascii=False)}; }}\n"


def theme() -> gr.themes.Base:
    """Gradio's base theme with our accent, local fonts and the contrast that axe asks for."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        font=list(SANS),
        font_mono=list(MONO),
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_shadow="none",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="white",
    )
