/* Draws a puzzle as SVG: a Sudoku, a maze, or any grid of signs; large, small, and after any supervision step. */
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const ARABIC_INDIC = "٠١٢٣٤٥٦٧٨٩";

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* A sign as it is shown: Arabic-Indic digits where they are wanted. */
function glyph(sign, arabicDigits) {
  return arabicDigits ? String(sign).replace(/[0-9]/g, (d) => ARABIC_INDIC[d]) : String(sign);
}

/*
 * A board: { format, question, answer, confidence, changed, clashes, way, arabicDigits }.
 *   format      { kind, rows, columns, symbols, box } as in a checkpoint
 *   question    tokens; answer: tokens after a step, or null; confidence: 0 to 1 for each cell, or null
 *   changed     cells to flash; clashes: cells that break a rule; way: whether to draw the answer's way as a line
 */
function drawBoard(target, board, small = false) {
  const { rows, columns, kind } = board.format;
  const root = svg("svg", { viewBox: `0 0 ${columns} ${rows}`, class: `grid ${kind}${small ? " small" : ""}`, "aria-hidden": "true" });
  (kind === "maze" ? drawMaze : drawSigns)(root, board, small);
  target.replaceChildren(root);
  return root;
}

function drawSigns(root, board, small) {
  const { rows, columns, symbols, box, kind, blank } = board.format;
  const empty = blank === null || blank === undefined ? -1 : symbols.indexOf(blank);
  board.question.forEach((given, cell) => {
    const row = Math.floor(cell / columns), column = cell % columns;
    const isGiven = kind === "sudoku" ? given !== empty : !board.answer;
    const token = isGiven || !board.answer ? given : board.answer[cell];
    const sure = isGiven || !board.confidence ? 1 : board.confidence[cell];
    const place = { x: column, y: row, width: 1, height: 1 };
    if (board.clashes?.has(cell)) root.append(svg("rect", { ...place, class: "clash" }));
    else if (isGiven && kind === "sudoku") root.append(svg("rect", { ...place, class: "given" }));
    else if (board.answer) root.append(svg("rect", { ...place, class: "thought", opacity: (0.22 * sure ** 2).toFixed(3) }));
    if (board.changed?.has(cell) && !isGiven && !small) root.append(svg("rect", { x: column + 0.08, y: row + 0.08, width: 0.84, height: 0.84, rx: 0.14, class: "changed" }));
    if (token === empty || token === 0) return;
    const text = svg("text", { x: column + 0.5, y: row + 0.53, class: isGiven ? "sign" : "sign found" }, glyph(symbols[token], board.arabicDigits));
    if (!isGiven) text.setAttribute("opacity", (0.28 + 0.72 * sure).toFixed(3));
    root.append(text);
  });
  const line = (x1, y1, x2, y2, strong) => root.append(svg("line", { x1, y1, x2, y2, class: strong ? "rule strong" : "rule" }));
  const [boxRows, boxColumns] = box ?? [rows, columns];
  for (const strong of [false, true]) {
    for (let c = 1; c < columns; c++) if ((c % boxColumns === 0) === strong) line(c, 0, c, rows, strong);
    for (let r = 1; r < rows; r++) if ((r % boxRows === 0) === strong) line(0, r, columns, r, strong);
  }
}

function drawMaze(root, board, small) {
  const { rows, columns, symbols } = board.format;
  const token = Object.fromEntries(["#", " ", "S", "G", "o"].map((sign) => [sign, symbols.indexOf(sign)]));
  const at = (r, c) => board.question[r * columns + c];
  const isWall = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && at(r, c) === token["#"];
  /* Walls are one path of rounded strokes between neighbours; a block of four is filled. */
  let strokes = "", blocks = "";
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    if (!isWall(r, c)) continue;
    const x = c + 0.5, y = r + 0.5;
    strokes += `M${x} ${y}h0`;
    if (isWall(r, c + 1)) strokes += `M${x} ${y}h1`;
    if (isWall(r + 1, c)) strokes += `M${x} ${y}v1`;
    if (isWall(r, c + 1) && isWall(r + 1, c) && isWall(r + 1, c + 1)) blocks += `M${x} ${y}h1v1h-1z`;
  }
  root.append(svg("path", { d: strokes, class: "walls" }), svg("path", { d: blocks, class: "blocks" }));
  if (board.answer) drawThoughts(root, board, token, small);
  board.question.forEach((given, cell) => {
    const x = (cell % columns) + 0.5, y = Math.floor(cell / columns) + 0.5;
    if (given === token.S) root.append(svg("circle", { cx: x, cy: y, r: 0.3, class: "start" }));
    if (given === token.G) root.append(svg("circle", { cx: x, cy: y, r: 0.24, class: "goal" }), svg("circle", { cx: x, cy: y, r: 0.09, class: "goal-dot" }));
  });
}

/* The way as dots that grow with certainty; as a line once it is right. */
function drawThoughts(root, board, token, small) {
  const { columns } = board.format;
  const way = board.way ? wayOf(board.format, board.question, board.answer) : null;
  if (way) {
    const points = way.map((cell) => `${(cell % columns) + 0.5},${Math.floor(cell / columns) + 0.5}`).join(" ");
    root.append(svg("polyline", { points, class: "way", pathLength: 1 }));
    return;
  }
  board.answer.forEach((found, cell) => {
    const x = (cell % columns) + 0.5, y = Math.floor(cell / columns) + 0.5, given = board.question[cell];
    if (given !== token[" "] && found === given) return;
    const sure = board.confidence ? board.confidence[cell] : 1;
    if (found === token.o && given === token[" "]) root.append(svg("circle", { cx: x, cy: y, r: (0.1 + 0.14 * sure).toFixed(3), class: "step", opacity: (0.25 + 0.75 * sure).toFixed(3) }));
    else if (found !== given && !small) root.append(svg("circle", { cx: x, cy: y, r: 0.12, class: "slip" }));
  });
}

/* The cells of the marked way from S to G in order; null where the marks make no single way. */
function wayOf(format, question, answer) {
  const { columns, symbols } = format;
  const start = question.indexOf(symbols.indexOf("S")), goal = question.indexOf(symbols.indexOf("G"));
  const marked = new Set(answer.flatMap((found, cell) => (found === symbols.indexOf("o") ? [cell] : [])).concat(goal));
  const way = [start];
  while (way.at(-1) !== goal) {
    const cell = way.at(-1), column = cell % columns;
    const next = [cell - columns, cell + columns, ...(column ? [cell - 1] : []), ...(column < columns - 1 ? [cell + 1] : [])].filter((other) => marked.has(other));
    const ahead = next.includes(goal) ? goal : next[0];
    if (ahead === undefined) return null;
    marked.delete(ahead);
    way.push(ahead);
  }
  return way;
}

/* The halting head's certainty after each step, as a line from nought to a whole. */
function drawCertainty(target, steps, current, label) {
  const width = 320, height = 96, pad = 8;
  const count = Math.max(steps.length, 6);
  const x = (k) => pad + ((width - 2 * pad) * k) / (count - 1), y = (q) => height - pad - (height - 2 * pad) * q;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "certainty", role: "img", "aria-label": label });
  root.append(svg("line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "axis" }), svg("line", { x1: 0, x2: width, y1: y(0.5), y2: y(0.5), class: "halt" }));
  const points = steps.map((step, k) => `${x(k).toFixed(1)},${y(step.q).toFixed(1)}`);
  if (points.length > 1) {
    root.append(svg("polygon", { points: `${x(0)},${y(0)} ${points.join(" ")} ${x(steps.length - 1)},${y(0)}`, class: "area" }));
    root.append(svg("polyline", { points: points.join(" "), class: "curve" }));
  }
  steps.forEach((step, k) => root.append(svg("circle", { cx: x(k), cy: y(step.q), r: k === current ? 5 : 2.8, class: k === current ? "dot current" : "dot" })));
  target.replaceChildren(root);
}
