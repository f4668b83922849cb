/* Plays what was recorded of one puzzle: a board, a play button, a slider. */
"use strict";

const $ = (id) => document.getElementById(id);
const PAUSE_MS = 900;
const ICONS = { play: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 5.5v13l11-6.5z"/></svg>', pause: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 5h4v14H7zm6 0h4v14h-4z"/></svg>' };
const trace = JSON.parse($("trace").textContent);
let language = navigator.language?.startsWith("ar") ? "ar" : "en";
let current = 0;
let timer = null;

const words = () => WORDS[language];
const show = (text) => glyph(text, language === "ar");
const steps = (n) => words().steps(n, show(n));

function render() {
  const w = words(), thought = trace.steps[current - 1];
  [document.documentElement.lang, document.documentElement.dir] = [language, w.direction];
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  $("board").className = `board ${trace.format.kind}${thought?.right ? " solved" : ""}`;
  drawBoard($("drawing"), {
    format: trace.format, question: trace.question, arabicDigits: language === "ar",
    answer: thought?.answer ?? null, confidence: thought?.confidence ?? null, changed: new Set(thought?.changed), way: Boolean(thought?.right),
  });
  drawCertainty($("certainty"), trace.steps, current - 1, w.certainty);
  $("language").textContent = w.other;
  $("step").textContent = thought ? w.step(show(current)) : w.question;
  $("sure").textContent = thought ? w.sure(`${show(Math.round(100 * Math.min(thought.q, 0.994)))}${language === "ar" ? "٪" : "%"}`) : "";
  $("changed").textContent = thought ? w.changed(thought.changed.length, show(thought.changed.length)) : "";
  [$("scrub").max, $("scrub").value] = [trace.steps.length, current];
  $("scrub").setAttribute("aria-label", w.strip);
  $("play").innerHTML = timer ? ICONS.pause : ICONS.play;
  $("play").setAttribute("aria-label", timer ? w.stop : w.replay);
  $("label").textContent = w.certainty;
  $("halts").textContent = w.halts;
  $("status").className = `status ${trace.verdict}`;
  const verdict = document.createElement("strong");
  verdict.textContent = trace.verdict === "solved" ? w.solved(steps(trace.taken)) : trace.verdict === "unsolved" ? w.unsolved(steps(trace.steps.length)) : "";
  $("status").replaceChildren(verdict);
  $("model").textContent = trace.model;
}

function go(step) {
  current = Math.max(0, Math.min(trace.steps.length, step));
  render();
}

function stop() {
  clearInterval(timer);
  timer = null;
  render();
}

function play() {
  if (timer) { stop(); return; }
  if (current === trace.steps.length) current = 0;
  timer = setInterval(() => { go(current + 1); if (current === trace.steps.length) stop(); }, PAUSE_MS);
  render();
}

$("play").onclick = play;
$("scrub").oninput = () => { if (timer) stop(); go(Number($("scrub").value)); };
$("language").onclick = () => { language = language === "en" ? "ar" : "en"; render(); };
document.addEventListener("keydown", (event) => {
  if (event.target === $("scrub")) return;
  if (event.key === "ArrowRight") go(current + 1);
  else if (event.key === "ArrowLeft") go(current - 1);
  else if (event.key === " " && event.target === document.body) { event.preventDefault(); play(); }
});
if (matchMedia("(prefers-reduced-motion: reduce)").matches) go(trace.taken ?? trace.steps.length);
else play();
