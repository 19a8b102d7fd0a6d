// Token panes: appends what is new, shades by KL, and shows both models' five likeliest on a click.
// The value is {key, shade, split, panes: [{title, note, state, stats, split, tokens: [[text, probability, top, kl]]}]}.
// Texts only ever enter through textContent.
const root = element.querySelector(".mq-panes");
const detail = element.querySelector(".mq-token");
let shown = null;

const make = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const level = (kl) => (kl === null || kl === undefined || kl < 0.005 ? 0 : kl < 0.05 ? 1 : kl < 0.5 ? 2 : 3);
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)) + " %";

function span(value, pane, index) {
  const [text, , , kl] = value.panes[pane].tokens[index];
  const node = make("span", "tok", text);
  node.dataset.pane = pane;
  node.dataset.index = index;
  node.setAttribute("role", "button");
  node.tabIndex = index === 0 ? 0 : -1;
  const marks = level(value.shade ? kl : null);
  if (marks) node.classList.add("kl" + marks);
  return node;
}

function part(text, place, words) {
  const node = text.children[place];
  if (!node || node.classList.contains("split")) return;
  text.querySelectorAll(".tok.split").forEach((other) => {
    other.classList.remove("split");
    other.removeAttribute("title");
  });
  node.classList.add("split");
  node.title = words.split;
}

function build(value) {
  root.replaceChildren();
  detail.hidden = true;
  value.panes.forEach((pane, place) => {
    const card = make("section", "mq-pane");
    card.setAttribute("aria-label", pane.title);
    const head = make("header");
    head.append(make("h3", "", pane.title), make("span", "stats"));
    const text = make("div", "text");
    text.dataset.pane = place;
    card.append(head, make("p", "note"), text);
    root.append(card);
  });
  root.style.setProperty("--panes", String(Math.min(2, value.panes.length)));
  shown = { key: value.key, counts: value.panes.map(() => 0) };
}

function update() {
  const value = props.value;
  if (!value || !value.panes) return;
  if (!shown || shown.key !== value.key || root.children.length !== value.panes.length) build(value);
  value.panes.forEach((pane, place) => {
    const card = root.children[place];
    card.querySelector(".stats").textContent = pane.stats || "";
    card.querySelector(".note").textContent = pane.note || "";
    card.classList.toggle("busy", pane.state === "loading" || pane.state === "running");
    card.setAttribute("aria-busy", String(pane.state === "loading" || pane.state === "running"));
    const text = card.querySelector(".text");
    const fresh = document.createDocumentFragment();
    for (let index = shown.counts[place]; index < pane.tokens.length; index++) fresh.append(span(value, place, index));
    const bottom = text.scrollHeight - text.scrollTop - text.clientHeight < 30;
    text.append(fresh);
    if (bottom && pane.state === "running") text.scrollTop = text.scrollHeight;
    shown.counts[place] = pane.tokens.length;
    if (pane.split !== null) part(text, pane.split, value.words);
  });
}

function five(value, place, index) {
  const pane = value.panes[place];
  const token = pane.tokens[index];
  if (!token) return null;
  const column = make("div", "column");
  column.append(make("h4", "", pane.title));
  const kl = token[3];
  if (value.shade && kl !== null && kl !== undefined)
    column.append(make("p", "mq-sub", value.words.kl.replace("{kl}", kl.toFixed(3))));
  const list = make("ol");
  for (const [text, probability] of token[2]) {
    const row = make("li");
    if (text === token[0]) row.className = "chosen";
    const bar = make("span", "bar");
    bar.style.width = (100 * probability).toFixed(1) + "%";
    row.append(make("code", "", text.replace(/\n/g, "⏎").replace(/^ /, "␣")), make("span", "share", percent(probability)), bar);
    list.append(row);
  }
  column.append(list);
  return column;
}

function explain(node) {
  const value = props.value;
  const place = Number(node.dataset.pane);
  const index = Number(node.dataset.index);
  const token = value.panes[place].tokens[index];
  detail.replaceChildren();
  element.querySelectorAll(".tok.on").forEach((other) => other.classList.remove("on"));
  node.classList.add("on");
  const line = value.words.token.replace("{token}", () => JSON.stringify(token[0])).replace("{probability}", percent(token[1]));
  detail.append(make("p", "", line));
  const columns = make("div", "columns");
  // What another model had in mind is comparable only where it has read the same words before.
  const before = (other) => JSON.stringify(value.panes[other].tokens.slice(0, index).map((each) => each[0]));
  let apart = 0;
  value.panes.forEach((_, other) => {
    if (value.shade || other === place || before(other) === before(place)) columns.append(five(value, other, index) || "");
    else apart++;
  });
  detail.append(columns);
  if (apart) detail.append(make("p", "mq-sub", value.words.apart));
  detail.hidden = false;
}

element.addEventListener("click", (event) => {
  const node = event.target.closest(".tok");
  if (node) explain(node);
});
element.addEventListener("keydown", (event) => {
  const node = event.target.closest(".tok");
  if (!node) return;
  const next = event.key === "ArrowRight" ? node.nextElementSibling : event.key === "ArrowLeft" ? node.previousElementSibling : null;
  if (next) {
    node.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  if (event.key === "Enter" || event.key === " ") explain(node);
  if (next || event.key === "Enter" || event.key === " ") event.preventDefault();
});
watch("value", update);
update();
