/* What the rules say, and puzzles made by them: Sudoku of any band shape, mazes. Grids are lists of tokens. */
"use strict";

/* The cells of every row, column and box. */
function unitsOf({ rows: side, box: [boxRows, boxColumns] }) {
  const units = [];
  for (let i = 0; i < side; i++) {
    units.push(Array.from({ length: side }, (_, c) => i * side + c), Array.from({ length: side }, (_, r) => r * side + i));
  }
  for (let r = 0; r < side; r += boxRows) for (let c = 0; c < side; c += boxColumns) {
    units.push(Array.from({ length: side }, (_, i) => (r + Math.floor(i / boxColumns)) * side + c + (i % boxColumns)));
  }
  return units;
}

/* Cells whose digit stands twice in a row, column or box. Digit d is token d + 1; 1 is a blank. */
function clashesOf(format, tokens) {
  const clashes = new Set();
  if (format.kind !== "sudoku") return clashes;
  for (const unit of unitsOf(format)) {
    const seen = new Map();
    for (const cell of unit) {
      if (tokens[cell] <= 1) continue;
      if (seen.has(tokens[cell])) clashes.add(cell).add(seen.get(tokens[cell]));
      seen.set(tokens[cell], cell);
    }
  }
  return clashes;
}

/* Solutions of a Sudoku, counted up to `limit`, in random order where `shuffled`; the last one found is kept. */
function solveSudoku(format, tokens, limit = 2, shuffled = false) {
  const side = format.rows, peers = Array.from({ length: side * side }, () => new Set());
  for (const unit of unitsOf(format)) for (const a of unit) for (const b of unit) if (a !== b) peers[a].add(b);
  const grid = tokens.map((token) => Math.max(0, token - 1));
  let found = 0, solution = null;
  const choices = (cell) => {
    let taken = 0;
    for (const peer of peers[cell]) taken |= 1 << grid[peer];
    const left = [];
    for (let digit = 1; digit <= side; digit++) if (!((taken >> digit) & 1)) left.push(digit);
    return left;
  };
  const search = () => {
    let best = -1, options = null;
    for (let cell = 0; cell < grid.length; cell++) {
      if (grid[cell]) continue;
      const left = choices(cell);
      if (!options || left.length < options.length) [best, options] = [cell, left];
      if (options.length < 2) break;
    }
    if (best < 0) { found += 1; solution = grid.map((digit) => digit + 1); return; }
    for (const digit of shuffled ? shuffle(options) : options) {
      grid[best] = digit;
      search();
      grid[best] = 0;
      if (found >= limit) return;
    }
  };
  if (!clashesOf(format, tokens).size) search();
  return { found, solution };
}

function shuffle(list) {
  const copy = [...list];
  for (let i = copy.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [copy[i], copy[j]] = [copy[j], copy[i]];
  }
  return copy;
}

/* A puzzle with one solution: digits are taken away while it stays the only one, then up to three are given back. */
function makeSudoku(format) {
  const cells = format.rows * format.columns;
  const { solution } = solveSudoku(format, new Array(cells).fill(1), 1, true);
  const grid = [...solution];
  for (const cell of shuffle(grid.keys())) {
    grid[cell] = 1;
    if (solveSudoku(format, grid).found > 1) grid[cell] = solution[cell];
  }
  const empty = shuffle(grid.flatMap((token, cell) => (token === 1 ? [cell] : [])));
  for (const cell of empty.slice(0, Math.floor(Math.random() * 4))) grid[cell] = solution[cell];
  return grid;
}

const neighbours = ({ rows, columns }, cell) => {
  const r = Math.floor(cell / columns), c = cell % columns, found = [];
  if (r > 0) found.push(cell - columns);
  if (r < rows - 1) found.push(cell + columns);
  if (c > 0) found.push(cell - 1);
  if (c < columns - 1) found.push(cell + 1);
  return found;
};

/* Fewest moves from a cell to every other one along cells that are open. */
function distancesIn(format, start, isOpen) {
  const found = new Map([[start, 0]]);
  for (const cell of found.keys()) {
    for (const next of neighbours(format, cell)) if (!found.has(next) && isOpen(next)) found.set(next, found.get(cell) + 1);
  }
  return found;
}

/* A maze with exactly one way between any two cells, S and G at least `least` moves apart. */
function makeMaze(format, least) {
  const { rows, columns, symbols } = format;
  const wall = symbols.indexOf("#"), way = symbols.indexOf(" ");
  for (let attempt = 0; ; attempt++) {
    const grid = new Array(rows * columns).fill(wall), stack = [columns + 1];
    grid[columns + 1] = way;
    while (stack.length) {
      const cell = stack.at(-1), r = Math.floor(cell / columns), c = cell % columns;
      const ahead = [[0, 2], [0, -2], [2, 0], [-2, 0]].filter(([down, right]) => r + down > 0 && r + down < rows - 1 && c + right > 0 && c + right < columns - 1 && grid[cell + down * columns + right] === wall);
      if (!ahead.length) { stack.pop(); continue; }
      const [down, right] = ahead[Math.floor(Math.random() * ahead.length)];
      grid[cell + (down / 2) * columns + right / 2] = grid[cell + down * columns + right] = way;
      stack.push(cell + down * columns + right);
    }
    const rooms = grid.flatMap((token, cell) => (token === way && Math.floor(cell / columns) % 2 && (cell % columns) % 2 ? [cell] : []));
    const start = rooms[Math.floor(Math.random() * rooms.length)];
    const away = distancesIn(format, start, (cell) => grid[cell] === way);
    const ends = rooms.filter((cell) => away.get(cell) >= Math.min(least, attempt < 200 ? least : 2));
    if (!ends.length) continue;
    grid[start] = symbols.indexOf("S");
    grid[ends[Math.floor(Math.random() * ends.length)]] = symbols.indexOf("G");
    return grid;
  }
}

/* What is wrong with a question: the key of a message, or null. */
function faultOf(format, tokens) {
  if (format.kind === "sudoku") {
    if (clashesOf(format, tokens).size) return "clash";
    const { found } = solveSudoku(format, tokens);
    return found === 0 ? "none" : found > 1 ? "several" : null;
  }
  const [wall, start, goal] = ["#", "S", "G"].map((sign) => format.symbols.indexOf(sign));
  if (!tokens.includes(start) || !tokens.includes(goal)) return "ends";
  const away = distancesIn(format, tokens.indexOf(start), (cell) => tokens[cell] !== wall);
  return away.has(tokens.indexOf(goal)) ? null : "blocked";
}

/* Whether an answer keeps the rules and what was given. */
function isRight(format, question, answer) {
  if (format.kind === "sudoku") {
    return answer.every((token, cell) => token > 1 && (question[cell] === 1 || token === question[cell])) && !clashesOf(format, answer).size;
  }
  const token = Object.fromEntries(["#", " ", "S", "G", "o"].map((sign) => [sign, format.symbols.indexOf(sign)]));
  if (!answer.every((found, cell) => found !== 0 && (found === token.o ? token[" "] : found) === question[cell])) return false;
  const start = question.indexOf(token.S), goal = question.indexOf(token.G);
  const shortest = distancesIn(format, start, (cell) => question[cell] !== token["#"]).get(goal);
  const inside = distancesIn(format, start, (cell) => answer[cell] === token.o || answer[cell] === token.G).get(goal);
  return inside === shortest && answer.filter((found) => found === token.o).length === shortest - 1;
}

/* Tokens of a grid in text, rows on lines or all cells on one, in any digits; null where it is no such grid. */
function readGrid(format, text) {
  const eastern = text.replace(/[٠-٩۰-۹]/g, (d) => String(d.charCodeAt(0) & 15)).replace(/\r/g, "");
  let cells;
  if (format.kind === "maze") {
    const lines = eastern.split("\n").filter((line) => line.length);
    cells = lines.length > 1 ? lines.map((line) => line.padEnd(format.columns)).join("") : lines.join("");
    cells = cells.toUpperCase().replace(/O/g, " ").replace(/\./g, " ");
  } else {
    cells = eastern.replace(/[|+─│┼\s-]/g, "").replace(/[0_*?]/g, ".").toUpperCase();
  }
  const tokens = [...cells].map((sign) => format.symbols.indexOf(sign));
  return tokens.length === format.rows * format.columns && tokens.every((token) => token > 0) ? tokens : null;
}

function writeGrid(format, tokens) {
  const signs = tokens.map((token) => format.symbols[token] || " ");
  return Array.from({ length: format.rows }, (_, r) => signs.slice(r * format.columns, (r + 1) * format.columns).join("")).join("\n");
}
