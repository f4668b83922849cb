/* The chat: what is asked, how it is drawn as it comes, and everything that can be pressed. */
"use strict";

const $ = (id) => document.getElementById(id);
const DEFAULTS = { temperature: 0, top_p: 1, max_tokens: "", seed: "", thinking: "auto", budget: "", system: "", history: null, theme: "auto", digits: false, language: null };
const MOST_TRIES = 8;
// Models with a smaller context were trained on single questions, as those of this project are.
const LONG_CONTEXT = 2048;

const settings = { ...DEFAULTS, ...store.get("settings", {}) };
const asked = new URLSearchParams(location.search).get("lang");
if (asked in WORDS) settings.language = asked;
let language, words;
let talk = talks.fresh();
let running = null; // what stops the answer that is being written
let model = null;
let apiKey = sessionStorage.getItem("tafkir-key") ?? "";

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), use = document.createElementNS(svg.namespaceURI, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}
function label(node, text) {
  node.title = text;
  node.setAttribute("aria-label", text);
}
function button(className, text, act, sign) {
  const node = element("button", className, sign ? undefined : text);
  node.type = "button";
  if (sign) { node.append(icon(sign)); label(node, text); }
  node.onclick = act;
  return node;
}
const locale = () => (language === "ar" ? `ar-u-nu-${settings.digits ? "arab" : "latn"}` : "en");
const number = (value, options) => new Intl.NumberFormat(locale(), options).format(value);
const digits = (value, most = 1) => number(value, { maximumFractionDigits: most });
const duration = (ms) => (ms < 1000 ? words.ms(digits(ms, ms < 10 ? 1 : 0)) : words.s(digits(ms / 1000)));
const say = (text) => { $("status").textContent = text; };

/* --- the conversation on the page ------------------------------------------------------------------------------- */

const scroller = $("scroll");
const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

/* Whether the text is on the clipboard; a page that came over plain HTTP from another machine has but the old way. */
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = element("textarea", "sr");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
function copyButton(text) {
  const node = button("icon", words.copy, async () => {
    if (!(await copied(text()))) return;
    label(node, words.copied);
    say(words.copied);
    setTimeout(() => label(node, words.copy), 1500);
  }, "copy");
  return node;
}

function showQuestion(turn) {
  const node = element("article", "turn user"), foot = element("div", "foot");
  node.setAttribute("aria-label", words.you);
  const bubble = element("div", "bubble", turn.content);
  bubble.dir = "auto";
  foot.append(copyButton(() => turn.content), button("icon", words.edit, () => edit(turn, node), "edit"));
  node.append(bubble, foot);
  return node;
}

/* The question becomes a box; asking again drops what came after it. */
function edit(turn, node) {
  if (running) return;
  const box = element("div", "editor"), area = element("textarea"), buttons = element("div", "buttons");
  area.value = turn.content;
  area.dir = "auto";
  area.setAttribute("aria-label", words.editing);
  const cancel = () => { const back = showQuestion(turn); box.parentNode.replaceWith(back); back.querySelector(".foot button:last-child").focus(); };
  const save = () => {
    const text = area.value.trim();
    if (!text || running) return;
    talk.turns.length = talk.turns.indexOf(turn);
    ask(text);
  };
  area.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
  };
  buttons.append(button("plain", words.cancel, cancel), button("strong", words.save, save));
  box.append(area, buttons);
  node.replaceChildren(box);
  area.focus();
  area.style.height = `${area.scrollHeight + 4}px`;
}

/* Where the next word would come. */
function endOf(node) {
  while (node.lastElementChild?.matches("p, ul, ol, li, blockquote, h1, h2, h3, h4, h5, h6")) node = node.lastElementChild;
  return node;
}

/* One answer: drawn as it comes, at most as often as drawing it takes little of the time. */
class Answer {
  constructor(turn, question) {
    this.turn = turn;
    this.node = element("article", "turn assistant");
    this.node.setAttribute("aria-label", words.answer);
    this.body = element("div", "body");
    this.body.dir = drawText.direction(question); // what digits and signs alone follow
    this.node.append(this.body);
    this.cursor = element("span", "cursor");
    this.timer = 0;
    this.cost = 0;
  }
  draw() {
    const began = performance.now(), { turn } = this;
    this.timer = 0;
    if (turn.reasoning.trim() && !this.thought) this.openThought();
    if (this.thought?.open) drawText(this.thoughtBody, turn.reasoning, words);
    drawText(this.body, turn.content, words);
    this.body.hidden = !turn.content && !this.live;
    if (this.live && this.thoughtBody && !turn.content) this.thoughtBody.scrollTop = this.thoughtBody.scrollHeight;
    if (this.live) endOf(turn.content || !this.thought?.open ? this.body : this.thoughtBody).append(this.cursor);
    this.cost = performance.now() - began;
  }
  schedule() {
    this.timer ||= setTimeout(() => {
      const follow = nearEnd();
      this.draw();
      if (follow) toEnd();
    }, Math.max(40, 4 * this.cost));
  }
  openThought() {
    this.thought = element("details", "thought");
    this.thought.classList.toggle("live", this.live);
    this.thought.open = this.live;
    const summary = element("summary");
    this.label = element("span", "", words.thinking);
    summary.append(icon("chevron"), this.label);
    this.thoughtBody = element("div", "body");
    this.thoughtBody.dir = this.body.dir;
    this.thought.append(summary, this.thoughtBody);
    this.thought.ontoggle = () => { if (this.thought.open) drawText(this.thoughtBody, this.turn.reasoning, words); };
    this.node.prepend(this.thought);
    if (!this.live) this.labelThought();
  }
  labelThought() {
    const tokens = this.turn.usage?.completion_tokens_details?.reasoning_tokens;
    const count = tokens === undefined ? "" : words.tokens(tokens, digits(tokens));
    this.label.textContent = this.turn.thoughtMs === undefined ? words.thought : words.thoughtFor(digits(this.turn.thoughtMs / 1000), count).replace(/ · $/, "");
  }
  /* From the first delta on. */
  start() {
    this.live = true;
    this.began = performance.now();
    this.node.querySelector(".waiting")?.remove();
  }
  wait(text) {
    const note = this.node.querySelector(".waiting") ?? element("p", "waiting");
    note.textContent = text;
    this.node.append(note);
  }
  add(delta) {
    if (!this.live) this.start();
    if (delta.reasoning_content) this.turn.reasoning += delta.reasoning_content;
    if (delta.content && !this.turn.content) this.foldThought();
    if (delta.content) this.turn.content += delta.content;
    const seconds = (performance.now() - this.began) / 1000;
    if (this.thought?.classList.contains("live")) this.label.textContent = `${words.thinking} ${words.s(digits(seconds))}`;
    this.schedule();
  }
  foldThought() {
    if (this.turn.reasoning.trim()) {
      this.turn.thoughtMs = performance.now() - this.began;
      say(words.answering);
    }
    if (!this.thought?.classList.contains("live")) return;
    this.thought.classList.remove("live");
    this.labelThought();
    this.thought.open = false;
  }
  finish() {
    clearTimeout(this.timer);
    this.node.querySelector(".waiting")?.remove();
    if (this.live && !this.turn.content) this.foldThought();
    this.live = false;
    this.cursor.remove();
    this.draw();
    if (this.thought) this.labelThought();
  }
  /* Buttons and figures under a finished answer. */
  showFoot() {
    const foot = element("div", "foot"), { turn } = this;
    if (turn.content) foot.append(copyButton(() => turn.content));
    foot.append(button("icon", words.again, () => again(turn), "again"));
    const facts = element("span", "facts", factsOf(turn).join(" · "));
    if (turn.timings?.draft_n) facts.title = words.draftsHint(digits(turn.timings.draft_n_accepted), digits(turn.timings.draft_n));
    foot.append(facts);
    this.node.append(foot);
  }
  /* What went wrong in the server's words, what helps in the reader's language. */
  fail(text, hint, retry) {
    const problem = element("div", "problem"), said = element("div");
    problem.setAttribute("role", "alert");
    for (const part of [text, hint]) if (part) said.append(Object.assign(element("p", "", part), { dir: "auto" }));
    problem.append(said, button("plain", words.retry, retry));
    this.node.append(problem);
  }
}

function factsOf({ usage, timings, end, seed }) {
  const facts = [];
  if (usage) facts.push(words.tokens(usage.completion_tokens, digits(usage.completion_tokens)));
  if (timings?.predicted_per_second) facts.push(words.rate(digits(timings.predicted_per_second, 0)));
  if (timings) facts.push(words.first(duration(timings.ttft_ms)));
  if (timings?.draft_n) facts.push(words.drafts(number(timings.draft_n_accepted / timings.draft_n, { style: "percent" })));
  if (seed !== undefined) facts.push(words.seed(digits(seed, 0)));
  if (end in words.ends) facts.push(words.ends[end]);
  return facts;
}

function showTalk() {
  $("talk").replaceChildren();
  let question = "";
  for (const turn of talk.turns) {
    if (turn.role === "user") { question = turn.content; $("talk").append(showQuestion(turn)); continue; }
    const view = new Answer(turn, question);
    view.draw();
    view.showFoot();
    $("talk").append(view.node);
  }
  $("welcome").hidden = talk.turns.length > 0;
  const last = talk.turns.at(-1);
  if (last?.role === "user" && !running) {
    $("talk").append(button("plain", words.retry, () => answer()));
  }
  toEnd();
}

/* --- asking ----------------------------------------------------------------------------------------------------- */

class Refusal extends Error {
  constructor(text, code) { super(text); this.code = code; }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const line = buffer.slice(0, end);
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function askKey(why) {
  const dialog = $("key");
  $("key-why").textContent = why;
  $("key-value").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => { dialog.onclose = () => done(dialog.returnValue); });
}

/* One request: asks for a key where one is wanted, and comes back later where the server is full and says when.
   `waiting` is told how many seconds are left. */
async function call(path, options = {}, waiting = () => {}) {
  for (let tries = 1; ; tries++) {
    const headers = { ...options.headers, ...(apiKey && { Authorization: `Bearer ${apiKey}` }) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const error = (await response.json().catch(() => null))?.error ?? {};
    if (response.status === 401) {
      const given = await askKey(apiKey ? words.keyWrong : words.keyAsk);
      if (!given) throw new Refusal(error.message ?? words.keyAsk, "invalid_api_key");
      apiKey = given;
      sessionStorage.setItem("tafkir-key", apiKey);
      showKey();
      continue;
    }
    const after = Number(response.headers.get("Retry-After"));
    if (error.code === "stopped") throw new Refusal(words.problems.gone, error.code);
    if (![429, 503].includes(response.status) || !after || tries === MOST_TRIES) {
      throw new Refusal(error.message ?? words.problems.status(digits(response.status, 0)), error.code);
    }
    for (let left = after; left > 0; left--) {
      waiting((response.status === 429 ? words.problems.limited : words.problems.busy)(digits(left, 0)));
      await pause(1000, options.signal);
    }
  }
}
function pause(ms, signal) {
  return new Promise((done, fail) => {
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", () => { clearTimeout(timer); fail(new DOMException("stopped", "AbortError")); });
  });
}

function requestOf(turns) {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const history = settings.history ?? (model?.max_model_len ?? LONG_CONTEXT) >= LONG_CONTEXT;
  const body = { messages: history ? messages : messages.slice(-1), stream: true, stream_options: { include_usage: true }, temperature: Number(settings.temperature), top_p: Number(settings.top_p) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  for (const [name, value, least] of [["max_tokens", settings.max_tokens, 1], ["seed", settings.seed, 0], ["max_thinking_tokens", settings.budget, 0]]) {
    if (value !== "" && Number.isFinite(Number(value))) body[name] = Math.max(least, Math.floor(Number(value)));
  }
  if (settings.thinking !== "auto") body.enable_thinking = settings.thinking === "on";
  return body;
}

/** Ask a question at the end of the conversation. */
function ask(question) {
  if (!talk.turns.length) talk.title = question.split("\n")[0].slice(0, 80);
  talk.turns.push({ role: "user", content: question });
  keep(talk);
  return answer();
}
/* Another answer in place of one, and of what came after it. */
function again(turn) {
  if (running) return;
  const at = talk.turns.indexOf(turn);
  if (at >= 0) talk.turns.length = at; // one that was stopped before its first token is not kept
  answer();
}

/** Have the last question answered. */
async function answer() {
  const mine = talk, stop = running = new AbortController(), body = requestOf(mine.turns);
  showTalk();
  const turn = { role: "assistant", content: "", reasoning: "" };
  if (body.seed !== undefined) turn.seed = body.seed;
  const view = new Answer(turn, mine.turns.at(-1).content);
  $("talk").append(view.node);
  view.wait(words.waiting);
  say(words.thinking);
  showState();
  toEnd();
  let problem = null;
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await call("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: stop.signal }, (text) => { view.wait(text); say(text); });
    view.wait(words.waiting);
    for await (const event of events(response)) {
      if (event.error) throw new Refusal(event.error.message, event.error.code);
      if (event.usage) Object.assign(turn, { usage: event.usage, timings: event.timings });
      const choice = event.choices[0];
      if (choice?.delta.content || choice?.delta.reasoning_content) view.add(choice.delta);
      if (choice?.finish_reason) turn.end = choice.finish_reason;
    }
    if (!turn.end) throw new Refusal(words.problems.early);
  } catch (error) {
    if (error.name === "AbortError") turn.end = "stopped";
    else problem = error instanceof Refusal ? error : new Refusal(words.problems.unreachable);
    if (!(error instanceof Refusal || error instanceof TypeError || error.name === "AbortError")) console.error(error);
  }
  if (running === stop) running = null;
  const follow = nearEnd();
  view.finish();
  if (problem) {
    const hint = problem.code === "context_length_exceeded" ? words.problems.context : "";
    view.fail(problem.message, hint, () => { if (!running && talk === mine) answer(); });
    say(""); // the alert speaks
  } else {
    if (turn.content || turn.reasoning) mine.turns.push(turn);
    view.showFoot();
    say(turn.end === "stopped" ? words.ends.stopped : view.body.innerText);
    keep(mine);
  }
  if (follow) toEnd();
  showState();
}

/* Whatever is kept has the model's name and a time. */
function keep(kept) {
  Object.assign(kept, { updated: Date.now(), model: model?.id });
  if (!talks.save(kept)) notice(words.problems.full);
}

/* --- what can be pressed ---------------------------------------------------------------------------------------- */

function showState() {
  const send = $("send");
  send.replaceChildren(icon(running ? "stop" : "send"));
  label(send, running ? words.stop : words.send);
  send.disabled = !running && !$("question").value.trim();
}
function fit() {
  const box = $("question");
  box.dir = box.value ? "auto" : words.direction; // an empty one would run from the left
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  showState();
}
function submit() {
  const question = $("question").value.trim();
  if (running || !question) return;
  $("question").value = "";
  fit();
  ask(question);
}
function leave() {
  running?.abort();
  running = null;
}
function open(other) {
  leave();
  talk = other;
  showTalk();
  showState();
  $("question").focus();
}
function notice(text, action, act) {
  const box = $("notice");
  const close = () => { box.hidden = true; };
  box.firstElementChild.textContent = text;
  box.lastElementChild.textContent = action ?? words.close;
  box.lastElementChild.onclick = () => { close(); act?.(); };
  box.hidden = false;
  clearTimeout(notice.timer);
  notice.timer = setTimeout(close, 8000);
}

function listTalks() {
  const all = talks.all(), when = new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" });
  $("talk-list").replaceChildren(...all.map((kept) => {
    const row = element("li"), opener = button("open", "", () => { $("talks").close(); open(kept); });
    opener.append(element("b", "", kept.title || words.untitled), element("small", "", when.format(kept.updated)));
    if (kept.id === talk.id) row.setAttribute("aria-current", "true");
    const remove = button("icon", words.remove, () => {
      talks.remove(kept);
      if (kept.id === talk.id) open(talks.fresh());
      listTalks();
      $("talks").close();
      notice(words.removed, words.undo, () => talks.save(kept));
    }, "remove");
    row.append(opener, remove);
    return row;
  }));
  $("no-talks").hidden = all.length > 0;
  $("export-one").disabled = !talk.turns.length;
  $("export-all").disabled = !all.length;
}

function showKey() { $("forget").hidden = !apiKey; }
function showModel() {
  if (!model) return;
  const compact = (value) => number(value, { notation: "compact", maximumFractionDigits: 1 });
  const active = model.num_active_parameters < model.num_parameters ? compact(model.num_active_parameters) : "";
  $("model").replaceChildren(element("bdi", "", model.id), ` · ${words.model(compact(model.num_parameters), active)}`);
  document.title = `${model.id} · Tafkir`;
}
function showTheme() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
}

/* Every word on the page, in the language that is chosen. */
function speak() {
  language = settings.language ?? (navigator.language.startsWith("ar") ? "ar" : "en");
  words = WORDS[language];
  Object.assign(document.documentElement, { lang: language, dir: words.direction });
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) label(node, words[node.dataset.label]);
  for (const node of document.querySelectorAll("[data-aria]")) node.setAttribute("aria-label", words[node.dataset.aria]);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words[node.dataset.placeholder];
  for (const option of $("thinking").options) option.textContent = words.thinkingModes[option.value];
  for (const option of $("theme-choice").options) option.textContent = words.themes[option.value];
  $("language").lang = language === "ar" ? "en" : "ar";
  $("examples").replaceChildren(...words.examples.map((text) => {
    const node = button("", text, () => { if (!running) ask(text); });
    node.dir = "auto";
    return node;
  }));
  showSettings();
  showModel();
  fit();
}

const INPUTS = { temperature: "value", top_p: "value", max_tokens: "value", seed: "value", thinking: "value", budget: "value", system: "value", history: "checked", digits: "checked", "theme-choice": "value" };
function showSettings() {
  for (const [id, property] of Object.entries(INPUTS)) $(id)[property] = settings[id.replace("-choice", "")];
  $("history").checked = settings.history ?? (model?.max_model_len ?? 0) >= LONG_CONTEXT;
  $("digits").parentNode.hidden = language !== "ar";
  for (const id of ["temperature", "top_p"]) $(`${id}-value`).textContent = number(settings[id], { minimumFractionDigits: 2 });
}
function change(name, value) {
  settings[name] = value;
  store.set("settings", settings);
  showTheme();
  if (name === "digits" || name === "language") { speak(); if (!running) showTalk(); }
  else showSettings();
}
for (const [id, property] of Object.entries(INPUTS)) {
  $(id).addEventListener("input", (event) => change(id.replace("-choice", ""), event.target[property]));
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); if (running) leave(); else submit(); showState(); });
$("question").addEventListener("input", fit);
$("question").addEventListener("keydown", (event) => {
  // A keyboard on a screen has no Shift+Enter; there the button sends.
  const typed = !matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && typed && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) { leave(); showState(); $("question").focus(); }
});
document.addEventListener("click", async (event) => {
  if (event.target.dataset?.copies !== "code") return;
  if (!(await copied(event.target.closest("figure").querySelector("code").textContent))) return;
  event.target.textContent = words.copied;
  say(words.copied);
});
$("fresh").addEventListener("click", () => open(talks.fresh()));
$("language").addEventListener("click", () => change("language", language === "ar" ? "en" : "ar"));
$("theme").addEventListener("click", () => {
  const dark = settings.theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : settings.theme === "dark";
  change("theme", dark ? "light" : "dark");
});
$("show-talks").addEventListener("click", () => { listTalks(); $("talks").showModal(); });
$("show-settings").addEventListener("click", () => { showSettings(); showKey(); $("settings").showModal(); });
for (const drawer of document.querySelectorAll(".drawer")) {
  drawer.querySelector(".close").onclick = () => drawer.close();
  drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); }); // the backdrop
}
$("parameters").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => {
  Object.assign(settings, DEFAULTS, { language: settings.language, theme: settings.theme, digits: settings.digits });
  change("temperature", DEFAULTS.temperature);
});
$("forget").addEventListener("click", () => { apiKey = ""; sessionStorage.removeItem("tafkir-key"); showKey(); });
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); $("key").close(event.submitter?.value ? $("key-value").value.trim() : ""); });
$("export-one").addEventListener("click", () => talks.download(`${talk.id}.md`, "text/markdown", talks.markdown(talk, words)));
$("export-all").addEventListener("click", () => talks.download("tafkir-conversations.json", "application/json", JSON.stringify(talks.all(), null, 2)));
addEventListener("pagehide", () => { if (running) leave(); });

showTheme();
speak();
call("v1/models").then((response) => response.json()).then(({ data }) => { model = data[0]; showModel(); showSettings(); }).catch((error) => {
  $("model").textContent = error instanceof Refusal ? error.message : words.problems.unreachable;
});
