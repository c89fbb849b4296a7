// Charts of the last ten minutes, drawn by uPlot (vendor/), and the history that they show. It begins when the page is opened.

import { milliseconds, percent, speed } from './format.js';
import { colour, onTheme } from './theme.js';

const MOST = 600; // points, one a second
const LEAST_SPAN_S = 60;
const HEIGHT = 104;
const whole = (value) => String(Math.round(value));

const CHARTS = [
  {
    id: 'chart-tokens',
    title: 'New tokens a second',
    series: [['tokens', (frame) => frame.rates?.new_tokens ?? null]],
    say: speed,
  },
  {
    id: 'chart-hits',
    title: 'Experts found in slots, %',
    series: [
      ['hit rate', (frame) => frame.rates?.hit_rate ?? null],
      ['zero-miss steps', (frame) => frame.rates?.zero_miss ?? null],
    ],
    say: percent,
    range: [0, 1],
    tick: (value) => whole(value * 100),
  },
  {
    id: 'chart-latency',
    title: 'Time to first token, ms',
    series: [
      ['P50', (frame) => frame.ttft_s?.[0] ?? null],
      ['P99', (frame) => frame.ttft_s?.[1] ?? null],
    ],
    say: milliseconds,
  },
  {
    id: 'chart-queue',
    title: 'Requests',
    series: [
      ['running', (frame) => frame.running],
      ['waiting', (frame) => frame.waiting],
    ],
    say: whole,
    least: 4,
  },
];

const times = [];
const history = CHARTS.map(({ series }) => series.map(() => []));
let plots = [];

function clock(second) {
  return new Date(second * 1e3).toTimeString().slice(0, 8);
}

function build(chart, number) {
  const figure = document.getElementById(chart.id);
  const caption = document.createElement('figcaption');
  const title = document.createElement('b');
  title.textContent = chart.title;
  caption.append(title);
  const keys = chart.series.map(([name], which) => {
    const key = document.createElement('span');
    key.className = which ? 'key second' : 'key';
    const value = document.createElement('span');
    key.append(document.createElement('i'), `${name} `, value);
    caption.append(key);
    return value;
  });
  const room = document.createElement('div');
  room.setAttribute('role', 'img');
  figure.replaceChildren(caption, room);
  const plot = new uPlot(options(chart, keys, figure), [times, ...history[number]], room);
  return { chart, figure, keys, room, plot };
}

function options(chart, keys, figure) {
  const axis = { stroke: colour('dim'), grid: { stroke: colour('line'), width: 1 }, ticks: { show: false }, font: '11px system-ui, sans-serif' };
  const styles = [{ stroke: colour('first'), width: 2 }, { stroke: colour('second'), width: 2, dash: [6, 4] }];
  const tick = chart.tick ?? chart.say;
  return {
    width: Math.max(160, figure.clientWidth),
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, sync: { key: 'epslots' }, drag: { setScale: false, x: false } },
    padding: [8, 26, 0, 0], // half a time's width to the right
    scales: {
      x: { time: true, range: (_, from, to) => [Math.min(from ?? 0, (to ?? 0) - LEAST_SPAN_S), to ?? 1] },
      y: { range: chart.range ?? ((_, from, to) => [0, Math.max(chart.least ?? 0, (to ?? 0) * 1.15) || 1]) },
    },
    axes: [
      { ...axis, size: 20, space: 64, values: (_, ticks) => ticks.map((at) => clock(at).slice(0, ticks.some((one) => one % 60) ? 8 : 5)) },
      { ...axis, size: 48, space: 28, values: (_, ticks) => ticks.map((value) => tick(value)) },
    ],
    series: [{}, ...chart.series.map(([label], which) => ({ label, ...styles[which], points: { show: false } }))],
    hooks: { setCursor: [(plot) => say(chart, keys, plot.cursor.idx ?? times.length - 1, plot.data)] },
  };
}

function say(chart, keys, at, data) {
  keys.forEach((key, which) => {
    const value = data[which + 1][at];
    key.textContent = value === null || value === undefined ? '–' : chart.say(value);
  });
}

function show({ chart, keys, room, plot }, number) {
  const data = [times, ...history[number]];
  plot.setData(data);
  say(chart, keys, plot.cursor.idx ?? times.length - 1, data);
  room.setAttribute('aria-label', `${chart.title}: ${chart.series.map(([name], which) => `${name} ${keys[which].textContent}`).join(', ')}`);
}

function add(at, values) {
  times.push(at);
  values.forEach((row, number) => row.forEach((value, which) => history[number][which].push(value)));
  if (times.length > MOST) [times, ...history.flat()].forEach((column) => column.shift());
}

/** Add a frame's point, and draw. */
export function showCharts(frame) {
  add(frame.at, CHARTS.map(({ series }) => series.map(([, read]) => read(frame))));
  plots.forEach(show);
}

/** Frames stop coming: lines end here. */
export function breakCharts() {
  if (times.length) add(times[times.length - 1] + 0.001, CHARTS.map(({ series }) => series.map(() => null)));
}

function rebuild() {
  plots.forEach(({ plot }) => plot.destroy());
  plots = CHARTS.map(build);
  plots.forEach(show);
}

rebuild();
onTheme(rebuild);
new ResizeObserver(() => {
  for (const { figure, plot } of plots) plot.setSize({ width: Math.max(160, figure.clientWidth), height: HEIGHT });
}).observe(document.querySelector('.charts'));
