/* The page: what is given, what is shown, and how one leads to the other. */
"use strict";

const $ = (id) => document.getElementById(id);
const store = {
  get(key, fallback) { try { return JSON.parse(localStorage.getItem("tafkir.trm." + key)) ?? fallback; } catch { return fallback; } },
  set(key, value) { try { localStorage.setItem("tafkir.trm." + key, JSON.stringify(value)); } catch { /* private mode */ } },
};
const PAUSE_MS = 420;
const MOST = [8, 16, 32, 64];

const settings = {
  language: store.get("language", navigator.language?.startsWith("ar") ? "ar" : "en"),
  theme: store.get("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
  arabicDigits: store.get("digits", null),
  pace: store.get("pace", matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "steps"),
  most: store.get("most", 16),
};
/* Of each puzzle: its model, tokens, cursor, and what was thought: steps, the one shown (-1 is the question), verdict. */
let places = [];
let place = null;
let running = null;
let awake = false;
let tool = "wall";

const words = () => WORDS[settings.language];
const eastern = () => settings.arabicDigits ?? settings.language === "ar";
const show = (text) => glyph(text, eastern());
const number = (value) => {
  const text = show(Math.round(value).toLocaleString("en"));
  return eastern() ? text.replaceAll(",", "٬") : text;
};
const percent = (p) => `${show(Math.round(100 * Math.min(p, p < 1 ? 0.994 : 1)))}${eastern() ? "٪" : "%"}`;
const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const signOf = (format, name) => format.symbols.indexOf(name);

/* ---- what is shown ------------------------------------------------------------------------------------------- */

function boardOf(here, step) {
  const thought = here.steps[step];
  return {
    format: here.model.puzzles, question: here.question, arabicDigits: eastern(),
    answer: thought?.answer ?? null, confidence: thought?.confidence ?? null,
    changed: thought ? new Set(thought.changed) : null,
    clashes: thought ? null : clashesOf(here.model.puzzles, here.question),
    way: Boolean(thought?.right),
  };
}

function renderWords() {
  const root = document.documentElement;
  [root.lang, root.dir] = [settings.language, words().direction];
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = words()[node.dataset.word];
  $("language").textContent = words().other;
  $("language").lang = settings.language === "en" ? "ar" : "en";
  $("language").setAttribute("aria-label", words().otherLabel);
  for (const [id, key] of [["theme", "theme"], ["tune", "settings"]]) {
    $(id).setAttribute("aria-label", words()[key]);
    $(id).title = words()[key];
  }
  root.dataset.theme = settings.theme;
  $("digits").checked = eastern();
  choose("pace", ["steps", "instant"], (key) => words().paces[key]);
  choose("most", MOST, (count) => number(count));
  $("how").replaceChildren(...words().how.map(([head, text]) => {
    const part = element("div");
    part.append(element("h2", "", head), element("p", "", text));
    return part;
  }));
}

/* A row of buttons, one of which is pressed. */
function choose(key, values, label) {
  $(key).replaceChildren(...values.map((value) => {
    const button = element("button", "", label(value));
    button.type = "button";
    button.setAttribute("aria-pressed", settings[key] === value);
    button.onclick = () => { settings[key] = value; store.set(key, value); renderWords(); };
    return button;
  }));
}

function renderTabs() {
  $("tabs").hidden = places.length < 2;
  $("tabs").replaceChildren(...places.map((each) => {
    const format = each.model.puzzles, button = element("button", "", words()[format.kind](show(format.rows)));
    button.type = "button";
    button.setAttribute("role", "tab");
    button.setAttribute("aria-selected", each === place);
    button.onclick = () => enter(each);
    return button;
  }));
}

/* Everything that depends on the puzzle chosen, but not on its cells. */
function renderPlace() {
  const { model } = place, format = model.puzzles;
  $("lead").textContent = words().lead(number(model.parameters));
  $("facts").textContent = words().facts(number(model.parameters), model.weights, number(model.bytes / 1000));
  $("hint").textContent = words().hint[format.kind];
  $("board").className = `board ${format.kind}`;
  $("cells").style.gridTemplateColumns = `repeat(${format.columns}, 1fr)`;
  $("cells").setAttribute("aria-label", words().board);
  $("cells").replaceChildren(...Array.from({ length: format.rows }, (_, row) => {
    const line = element("div");
    line.setAttribute("role", "row");
    line.append(...Array.from({ length: format.columns }, (_, column) => {
      const button = element("button");
      button.type = "button";
      button.setAttribute("role", "gridcell");
      button.dataset.cell = row * format.columns + column;
      return button;
    }));
    return line;
  }));
  renderKeys();
  render();
}

const ERASER = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M9 6h11v12H9l-6-6zM12 9.5l5 5m0-5-5 5"/></svg>';

function renderKeys() {
  const format = place.model.puzzles, key = (label, act, pressed) => {
    const button = element("button", "", label);
    button.type = "button";
    if (pressed !== undefined) button.setAttribute("aria-pressed", pressed);
    button.onclick = act;
    return button;
  };
  $("keys").dir = format.kind === "maze" ? words().direction : "ltr";
  if (format.kind === "maze") {
    $("keys").replaceChildren(...["wall", "start", "goal"].map((name) => key(words()[name], () => { tool = name; renderKeys(); }, tool === name)));
    return;
  }
  const eraser = key("", () => put(place.cursor, 1));
  eraser.innerHTML = ERASER;
  eraser.setAttribute("aria-label", words().erase);
  eraser.title = words().erase;
  $("keys").replaceChildren(...format.symbols.slice(2).map((sign, digit) => key(show(sign), () => put(place.cursor, digit + 2))), eraser);
}

function render() {
  const { steps, shown, verdict } = place, format = place.model.puzzles;
  drawBoard($("drawing"), boardOf(place, shown));
  $("board").classList.toggle("solved", Boolean(steps[shown]?.right));
  $("board").classList.toggle("wrong", verdict === "unsolved");
  $("cells").querySelectorAll("button").forEach((button, cell) => {
    const sign = format.symbols[place.question[cell]];
    const answer = steps[shown] ? format.symbols[steps[shown].answer[cell]] : sign;
    const spoken = format.kind === "maze" ? words().signs[sign] : answer === format.blank ? words().emptyCell : show(answer);
    button.setAttribute("aria-label", words().cell(number(Math.floor(cell / format.columns) + 1), number((cell % format.columns) + 1), spoken));
    button.tabIndex = cell === place.cursor ? 0 : -1;
    button.classList.toggle("cursor", cell === place.cursor);
  });
  renderStatus();
  renderSteps();
  $("solve").textContent = running ? words().stop : words().solve;
  $("solve").disabled = !awake;
  $("fresh").disabled = $("clear").disabled = Boolean(running);
}

function renderStatus() {
  const { steps, verdict } = place, status = $("status"), w = words();
  const count = (n) => w.steps(n, number(n));
  const milliseconds = steps.reduce((sum, step) => sum + step.milliseconds, 0);
  const say = (kind, head, tail) => {
    status.className = `status ${kind}`;
    status.replaceChildren(element("strong", "", head), ...(tail ? [element("small", "", tail)] : []));
  };
  if (w.faults[verdict]) say("fault", w.faults[verdict]);
  else if (running) say("busy", w.thinking(number(steps.length || 1)));
  else if (verdict === "solved") say("solved", w.solved(count(steps.length)), w.took(number(milliseconds)));
  else if (verdict === "unsolved") say("unsolved", w.unsolved(count(steps.length)), w.attempts);
  else say("", awake ? w.ready : w.loading);
}

function renderSteps() {
  const { steps, shown } = place, w = words();
  $("placeholder").hidden = steps.length > 0;
  $("replay").hidden = steps.length < 2 || Boolean(running);
  drawCertainty($("certainty"), steps, shown, w.certainty);
  const strip = $("strip"), wanted = steps.length ? steps.length + 1 : 0;
  while (strip.children.length > wanted) strip.lastChild.remove();
  for (let k = 0; k < wanted; k++) {
    if (!strip.children[k]) {
      const item = element("li"), button = element("button");
      button.type = "button";
      button.append(element("span", "mini"), element("span"), element("small"));
      item.append(button);
      strip.append(item);
    }
    const button = strip.children[k].firstChild, [mini, name, about] = button.children, step = steps[k - 1];
    button.onclick = () => look(k - 1);
    button.setAttribute("aria-current", shown === k - 1);
    drawBoard(mini, boardOf(place, k - 1), true);
    name.textContent = step ? w.step(number(k)) : w.question;
    about.textContent = step ? w.sure(percent(step.q)) : "\u00a0";
    if (step) button.title = w.changed(step.changed.length, number(step.changed.length));
  }
}

/* ---- what is done -------------------------------------------------------------------------------------------- */

function enter(next) {
  running?.stop();
  place = next;
  renderTabs();
  renderPlace();
}

/* The puzzle is another one: what was thought about the old one goes. */
function pose(question) {
  running?.stop();
  Object.assign(place, { question, steps: [], shown: -1, verdict: null });
  render();
}

function put(cell, token) {
  const question = [...place.question], format = place.model.puzzles;
  if (format.kind === "maze") for (const end of ["S", "G"]) {
    if (token === signOf(format, end) && question.includes(token)) question[question.indexOf(token)] = signOf(format, " ");
  }
  if (question[cell] === token) return;
  question[cell] = token;
  pose(question);
}

function look(step) {
  place.shown = step;
  render();
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function solve() {
  if (running) { running.stop(); return; }
  if (!awake) return;
  const here = place, format = here.model.puzzles;
  Object.assign(here, { steps: [], shown: -1, verdict: faultOf(format, here.question) });
  if (here.verdict) { render(); return; }
  let stopped = false;
  const mine = { stop() { stopped = true; if (running === mine) running = null; } };
  running = mine;
  render();
  try {
    let before = here.question;
    for await (const step of Thinker.think(here.model, here.question, settings.most)) {
      if (stopped) return;
      step.changed = step.answer.flatMap((token, cell) => (token !== before[cell] ? [cell] : []));
      step.right = isRight(format, here.question, step.answer);
      before = step.answer;
      here.steps.push(step);
      here.shown = here.steps.length - 1;
      if (step.right) break;
      if (settings.pace === "steps") { render(); await sleep(PAUSE_MS); }
      if (stopped) return;
    }
    here.verdict = here.steps.at(-1).right ? "solved" : "unsolved";
    if (here.verdict === "unsolved") here.shown = -1;
  } catch (error) {
    console.error(error);
    here.verdict = "failed";
  } finally {
    if (running === mine) running = null;
    if (here === place) render();
  }
}

async function replay() {
  const here = place;
  for (let step = -1; step < here.steps.length && here === place && !running; step++) {
    look(step);
    await sleep(PAUSE_MS);
  }
}

function makePuzzle(format) {
  return format.kind === "maze" ? makeMaze(format, Math.floor((format.rows + format.columns) * 0.6)) : makeSudoku(format);
}

function empty(format) {
  if (format.kind !== "maze") return new Array(format.rows * format.columns).fill(1);
  const inside = (cell) => { const r = Math.floor(cell / format.columns), c = cell % format.columns; return r > 0 && c > 0 && r < format.rows - 1 && c < format.columns - 1; };
  const tokens = Array.from({ length: format.rows * format.columns }, (_, cell) => signOf(format, inside(cell) ? " " : "#"));
  tokens[format.columns + 1] = signOf(format, "S");
  tokens[tokens.length - format.columns - 2] = signOf(format, "G");
  return tokens;
}

/* A grid in text, for whichever of the puzzles it fits. */
function take(text) {
  for (const each of [place, ...places.filter((other) => other !== place)]) {
    const tokens = readGrid(each.model.puzzles, text);
    if (!tokens) continue;
    if (each !== place) enter(each);
    pose(tokens);
    return true;
  }
  running?.stop();
  Object.assign(place, { steps: [], shown: -1, verdict: "text" });
  render();
  return false;
}

/* ---- keys, fingers and mice ---------------------------------------------------------------------------------- */

function moveCursor(cell) {
  place.cursor = cell;
  render();
  $("cells").querySelector(`[data-cell="${cell}"]`).focus({ preventScroll: true });
}

function onBoardKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { rows, columns, kind, symbols } = place.model.puzzles, cell = place.cursor;
  const row = Math.floor(cell / columns), column = cell % columns, key = readKey(event.key);
  const moves = { ArrowUp: row > 0 && cell - columns, ArrowDown: row < rows - 1 && cell + columns, ArrowLeft: column > 0 && cell - 1, ArrowRight: column < columns - 1 && cell + 1 };
  let act = null;
  if (event.key in moves) act = () => moves[event.key] !== false && moveCursor(moves[event.key]);
  else if (event.key === "Enter") act = solve;
  else if (kind === "maze") {
    const ends = { s: "S", g: "G" };
    if (key === " ") act = () => put(cell, signOf(place.model.puzzles, symbols[place.question[cell]] === "#" ? " " : "#"));
    else if (ends[key.toLowerCase()]) act = () => put(cell, symbols.indexOf(ends[key.toLowerCase()]));
  } else if (["0", ".", " ", "Backspace", "Delete"].includes(key)) act = () => put(cell, 1);
  else if (symbols.indexOf(key.toUpperCase()) > 1) act = () => put(cell, symbols.indexOf(key.toUpperCase()));
  if (!act) return;
  event.preventDefault();
  act();
}

const readKey = (key) => key.replace(/^[٠-٩۰-۹]$/, (d) => String(d.charCodeAt(0) & 15));

/* Drawing in a maze: the first cell says whether walls are built or opened; start and goal follow the finger. */
let drawing = null;

function cellUnder(event) {
  const box = $("cells").getBoundingClientRect(), { rows, columns } = place.model.puzzles;
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns), row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return column >= 0 && row >= 0 && column < columns && row < rows ? row * columns + column : null;
}

function onDown(event) {
  const cell = cellUnder(event), format = place.model.puzzles;
  if (cell === null) return;
  place.cursor = cell;
  if (format.kind !== "maze") { render(); return; }
  const sign = format.symbols[place.question[cell]];
  if (tool === "start" || tool === "goal") drawing = tool === "start" ? "S" : "G";
  else drawing = sign === "S" || sign === "G" ? sign : sign === "#" ? " " : "#";
  $("cells").setPointerCapture(event.pointerId);
  draw(cell);
}

function draw(cell) {
  const format = place.model.puzzles, sign = format.symbols[place.question[cell]];
  if ((drawing === "#" || drawing === " ") && (sign === "S" || sign === "G")) return;
  if ((drawing === "S" && sign === "G") || (drawing === "G" && sign === "S")) return;
  if (tool === "wall" && (drawing === "S" || drawing === "G") && sign === "#") return;
  put(cell, signOf(format, drawing));
}

function listen() {
  const cells = $("cells");
  cells.addEventListener("keydown", onBoardKey);
  cells.addEventListener("pointerdown", onDown);
  cells.addEventListener("pointermove", (event) => { const cell = cellUnder(event); if (drawing && cell !== null) draw(cell); });
  for (const end of ["pointerup", "pointercancel"]) cells.addEventListener(end, () => { drawing = null; });
  cells.addEventListener("focusin", (event) => { if (event.target.dataset.cell !== undefined) place.cursor = Number(event.target.dataset.cell); });
  document.addEventListener("paste", (event) => { const text = event.clipboardData?.getData("text"); if (text?.trim()) { event.preventDefault(); take(text); } });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") toggleSettings(false);
    if (event.target.closest?.("#strip") && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      const ahead = (event.key === "ArrowRight") === (words().direction === "ltr") ? 1 : -1;
      const next = Math.min(place.steps.length - 1, Math.max(-1, place.shown + ahead));
      look(next);
      $("strip").children[next + 1].firstChild.focus();
    }
  });
  $("solve").onclick = solve;
  $("replay").onclick = replay;
  $("fresh").onclick = () => pose(makePuzzle(place.model.puzzles));
  $("clear").onclick = () => pose(empty(place.model.puzzles));
  $("language").onclick = () => { settings.language = settings.language === "en" ? "ar" : "en"; store.set("language", settings.language); renderAll(); };
  $("theme").onclick = () => { settings.theme = settings.theme === "dark" ? "light" : "dark"; store.set("theme", settings.theme); renderWords(); };
  $("digits").onchange = () => { settings.arabicDigits = $("digits").checked; store.set("digits", settings.arabicDigits); renderAll(); };
  $("settings").onsubmit = (event) => event.preventDefault();
  $("tune").onclick = (event) => { event.stopPropagation(); toggleSettings($("settings").hidden); };
  document.addEventListener("click", (event) => { if (!event.target.closest("#settings")) toggleSettings(false); });
}

function toggleSettings(open) {
  $("settings").hidden = !open;
  $("tune").setAttribute("aria-expanded", open);
}

function renderAll() {
  renderWords();
  renderTabs();
  renderPlace();
}

async function wake() {
  try {
    await Thinker.load();
    await Thinker.session(place.model);
    awake = true;
  } catch (error) {
    console.error(error);
    place.verdict = "failed";
  }
  render();
}

function begin() {
  Thinker.models = JSON.parse($("models").textContent);
  places = Thinker.models.map((model) => ({ model, question: makePuzzle(model.puzzles), cursor: 0, steps: [], shown: -1, verdict: null }));
  place = places[0];
  listen();
  renderAll();
  const given = new URLSearchParams(location.hash.slice(1)).get("puzzle");
  if (given) take(given);
  return wake();
}

window.tafkir = { ready: new Promise((done) => document.addEventListener("DOMContentLoaded", () => done(begin()))), take, solve, settings, renderAll, places: () => places, place: () => place, look };
