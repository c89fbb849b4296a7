// The heat map: ranks x experts of one MoE layer on a canvas, with a cursor for pointer and keyboard.

import { bytes, count, speed } from './format.js';
import { colour, onTheme } from './theme.js';

const LEFT = 46; // CSS pixels beside and below the cells
const RIGHT = 84; // for the bars, where there is room for them
const BARS_FROM = 560;
const BELOW = 18;
const HEIGHT = 232; // that the cells share
const LEAST_WIDTH = 2;
const STOPS = 6;
const SHADES = 256;

const canvas = document.getElementById('heat');
const scroll = document.getElementById('heat-scroll');
const readout = document.getElementById('heat-readout');
const most = document.getElementById('ramp-most');
const ramp = document.getElementById('ramp');
const tip = document.createElement('div');
tip.className = 'tip';
tip.hidden = true;
document.body.append(tip);

let shown = null; // { layer, layers, ranks, held: Set per rank }
let peak = 0; // pairs a second of the fullest colour
let shades = [];
let grid = null; // where the cells are, in device pixels
let cursor = null; // { rank, expert }

function channels(name) {
  const hex = colour(name);
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** The colours from nothing to the peak. */
function makeShades() {
  const stops = Array.from({ length: STOPS }, (_, number) => channels(`heat-${number}`));
  shades = Array.from({ length: SHADES }, (_, number) => {
    const place = (number / (SHADES - 1)) * (STOPS - 1);
    const low = Math.min(STOPS - 2, Math.floor(place));
    return `rgb(${stops[low].map((from, which) => Math.round(from + (stops[low + 1][which] - from) * (place - low))).join()})`;
  });
  const pen = ramp.getContext('2d');
  for (let x = 0; x < ramp.width; x += 1) {
    pen.fillStyle = shades[Math.floor((x / (ramp.width - 1)) * (SHADES - 1))];
    pen.fillRect(x, 0, 1, ramp.height);
  }
}

/** Show a layer; null while there is none. */
export function showHeat(layer, frame) {
  if (layer === null || !frame.ranks.length) {
    shown = null;
    canvas.hidden = true;
    most.textContent = '';
    readout.textContent = frame.phase === 'starting' ? 'The ranks are loading the model.' : 'Waiting for the ranks.';
    return;
  }
  const held = frame.ranks.map(() => new Set());
  layer.holders?.forEach((ranks, expert) => ranks.forEach((rank) => held[rank]?.add(expert)));
  shown = { layer, layers: frame.layers, ranks: frame.ranks, held };
  const loads = layer.pairs?.map((row) => row.map((pairs) => pairs / layer.seconds)) ?? null;
  shown.loads = loads;
  const largest = loads === null ? 0 : loads.reduce((found, row) => row.reduce((a, b) => Math.max(a, b), found), 0);
  peak = Math.max(largest, peak * 0.8); // colours change calmly when the load falls
  if (peak < 0.05) peak = 0;
  most.textContent = peak ? `${speed(peak)} pairs/s` : 'no load';
  canvas.hidden = false;
  describe(loads, largest);
  draw();
  if (cursor === null || document.activeElement !== canvas) readout.textContent = summary();
  else readout.textContent = cellText(cursor);
}

function describe(loads, largest) {
  const { layer, layers, ranks } = shown;
  const what = `Expert load of MoE layer ${layer.number + 1} of ${layers}: ${ranks.length} ranks, ${layer.experts} experts`;
  let busiest = '';
  if (largest > 0) {
    const rank = loads.findIndex((row) => row.includes(largest));
    busiest = `; most on rank ${rank}, expert ${loads[rank].indexOf(largest)}, ${speed(largest)} pairs a second`;
  }
  canvas.setAttribute('aria-label', what + busiest);
}

function summary() {
  const { layer, ranks } = shown;
  const name = `${layer.name}: ${layer.experts} experts on ${ranks.length} ${ranks.length === 1 ? 'rank' : 'ranks'}`;
  if (layer.holders === null) return name;
  const resident = layer.holders.filter((found) => found.length).length;
  const copies = layer.holders.reduce((sum, found) => sum + found.length, 0);
  return `${name}; ${count(resident)} in slots, ${count(copies)} copies, ${count(layer.slots.reduce((a, b) => a + b, 0))} slots`;
}

function cellText({ rank, expert }) {
  const { layer, loads, held } = shown;
  const load = loads === null ? 'measuring' : `${speed(loads[rank][expert])} pairs/s`;
  const others = layer.holders === null ? [] : layer.holders[expert].filter((other) => other !== rank);
  const here = layer.holders === null ? '' : held[rank].has(expert) ? ', in a slot here' : ', in no slot here';
  const more = others.length > 6 ? `, ${others.length - 6} more` : '';
  const there = others.length ? `; on rank ${others.slice(0, 6).join(', ')}${more}` : '';
  return `Rank ${rank}, expert ${expert}: ${load}${here}${there}`;
}

function rankText(number) {
  const rank = shown.ranks[number];
  const computed = rank.computed === null ? 'measuring' : `${speed(rank.computed)} pairs/s computed in all layers`;
  return `Rank ${rank.rank}: ${computed}, ${rank.requests} requests, ${bytes(rank.memory_bytes)}`;
}

/** Where the cells go, for the width that there is. */
function layOut() {
  const scale = window.devicePixelRatio || 1;
  const experts = shown.layer.experts;
  const rows = shown.ranks.length;
  const right = scroll.clientWidth < BARS_FROM ? 0 : RIGHT;
  const wide = Math.max(LEAST_WIDTH, (scroll.clientWidth - LEFT - right) / experts);
  const high = Math.min(30, Math.max(4, Math.floor(HEIGHT / rows)));
  const cell = { wide: wide * scale, high: Math.round(high * scale) };
  const gap = wide >= 5 && high >= 5 ? Math.max(1, Math.round(scale)) : 0;
  const left = Math.round(LEFT * scale);
  const edge = (expert) => left + Math.round(expert * cell.wide); // whole pixels, and the whole width
  return { scale, experts, rows, cell, gap, left, edge, right: Math.round(right * scale) };
}

function draw() {
  if (shown === null) return;
  grid = layOut();
  const { scale, experts, rows, cell, edge, right } = grid;
  canvas.width = edge(experts) + right;
  canvas.height = rows * cell.high + Math.round(BELOW * scale);
  canvas.style.width = `${canvas.width / scale}px`;
  canvas.style.height = `${canvas.height / scale}px`;
  const pen = canvas.getContext('2d', { alpha: false });
  pen.fillStyle = colour('card');
  pen.fillRect(0, 0, canvas.width, canvas.height);
  drawCells(pen);
  drawLabels(pen);
  if (right) drawBars(pen);
  if (cursor !== null && cursor.rank < rows && cursor.expert < experts) {
    pen.strokeStyle = colour('ink');
    pen.lineWidth = Math.max(2, 2 * scale);
    pen.strokeRect(edge(cursor.expert) - scale, cursor.rank * cell.high, cell.wide + scale, cell.high);
  }
}

function drawCells(pen) {
  const { experts, rows, cell, gap, edge, scale } = grid;
  const mark = colour('mark');
  const markHigh = Math.max(Math.round(scale), Math.round((cell.high - gap) * 0.16));
  for (let rank = 0; rank < rows; rank += 1) {
    const loads = shown.loads?.[rank];
    const y = rank * cell.high;
    for (let expert = 0; expert < experts; expert += 1) {
      const share = peak && loads ? Math.sqrt(Math.min(1, loads[expert] / peak)) : 0; // small loads can be told apart
      pen.fillStyle = shades[Math.round(share * (SHADES - 1))];
      pen.fillRect(edge(expert), y, edge(expert + 1) - edge(expert) - gap, cell.high - gap);
    }
    pen.fillStyle = mark;
    for (const expert of shown.held[rank]) {
      pen.fillRect(edge(expert), y + cell.high - gap - markHigh, edge(expert + 1) - edge(expert) - gap, markHigh);
    }
  }
}

/** A round number of cells from a label to the next. */
function step(cells, pixels, room) {
  return [1, 2, 4, 8, 16, 32, 64, 128, 256].find((every) => every * pixels >= room) ?? cells;
}

function drawLabels(pen) {
  const { experts, rows, cell, left, scale } = grid;
  pen.fillStyle = colour('dim');
  pen.font = `${11 * scale}px system-ui, sans-serif`;
  pen.textAlign = 'right';
  pen.textBaseline = 'middle';
  const everyRow = step(rows, cell.high, 12 * scale);
  for (let rank = 0; rank < rows; rank += everyRow) {
    pen.fillText(String(shown.ranks[rank].rank), left - 7 * scale, Math.max(6 * scale, (rank + 0.5) * cell.high));
  }
  pen.textAlign = 'center';
  pen.textBaseline = 'bottom';
  const everyColumn = step(experts, cell.wide, 30 * scale);
  for (let expert = 0; expert < experts; expert += everyColumn) {
    pen.fillText(String(expert), left + (expert + 0.5) * cell.wide, canvas.height - scale);
  }
  pen.textAlign = 'left';
  pen.fillText('expert', 0, canvas.height - scale);
  pen.save();
  pen.translate(0, (rows * cell.high) / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = 'center';
  pen.textBaseline = 'top';
  pen.fillText('rank', 0, 0);
  pen.restore();
}

/** The load that each rank computes, beside its row; the line is their mean, and the number below the longest bar's. */
function drawBars(pen) {
  const { experts, rows, cell, gap, edge, scale } = grid;
  const computed = shown.ranks.map((rank) => rank.computed ?? 0);
  const largest = Math.max(...computed);
  if (!largest) return;
  const from = edge(experts) + 10 * scale;
  const room = (RIGHT - 14) * scale;
  pen.fillStyle = colour('first');
  pen.globalAlpha = 0.75;
  computed.forEach((value, rank) => {
    const high = Math.max(Math.round(2 * scale), Math.round((cell.high - gap) * 0.5));
    pen.fillRect(from, rank * cell.high + Math.round((cell.high - gap - high) / 2), (value / largest) * room, high);
  });
  pen.globalAlpha = 1;
  const mean = computed.reduce((a, b) => a + b, 0) / rows;
  pen.fillStyle = colour('ink');
  pen.fillRect(Math.round(from + (mean / largest) * room), 0, Math.max(1, Math.round(scale)), rows * cell.high - gap);
  pen.fillStyle = colour('dim');
  pen.textAlign = 'right';
  pen.textBaseline = 'bottom';
  pen.fillText(`${speed(largest)}/s`, from + room, canvas.height - scale);
}

function cellAt(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * grid.scale - grid.left;
  const rank = Math.floor(((event.clientY - box.top) * grid.scale) / grid.cell.high);
  const expert = Math.floor(x / grid.cell.wide);
  if (rank < 0 || rank >= grid.rows || x < 0) return null;
  return { rank, expert: expert < grid.experts ? expert : null };
}

function point(event) {
  const found = shown === null ? null : cellAt(event);
  tip.hidden = found === null;
  if (found === null) return;
  tip.textContent = found.expert === null ? rankText(found.rank) : cellText(found);
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${event.clientY + 18}px`;
}

canvas.addEventListener('pointermove', point);
canvas.addEventListener('pointerdown', point);
canvas.addEventListener('pointerleave', () => (tip.hidden = true));

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-8, 0], PageDown: [8, 0] };

canvas.addEventListener('keydown', (event) => {
  if (shown === null) return;
  const { rank, expert } = cursor ?? { rank: 0, expert: 0 };
  const [down, right] = MOVES[event.key] ?? [0, 0];
  const ends = { Home: 0, End: shown.layer.experts - 1 };
  if (!(event.key in MOVES) && !(event.key in ends)) return;
  event.preventDefault();
  const within = (value, end) => Math.max(0, Math.min(end - 1, value));
  cursor = {
    rank: within(rank + (cursor === null ? 0 : down), shown.ranks.length),
    expert: within(ends[event.key] ?? expert + (cursor === null ? 0 : right), shown.layer.experts),
  };
  draw();
  readout.textContent = cellText(cursor);
  const x = (grid.left + cursor.expert * grid.cell.wide) / grid.scale;
  if (x < scroll.scrollLeft || x > scroll.scrollLeft + scroll.clientWidth - 20) scroll.scrollLeft = x - scroll.clientWidth / 2;
});
canvas.addEventListener('blur', () => {
  cursor = null;
  draw();
});

onTheme(() => {
  makeShades();
  draw();
});
makeShades();
new ResizeObserver(draw).observe(scroll);
