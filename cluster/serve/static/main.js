// The page: frames come in (feed.js), and each panel shows its part of them.

import { breakCharts, showCharts } from './charts.js';
import { updateChat } from './chat.js';
import { openFeed } from './feed.js';
import { showHeat } from './heat.js';
import { showGap, showGroups, showPlacement, showRanks, showState, showTiles } from './panels.js';

const field = document.getElementById('layer');
const back = document.getElementById('layer-back');
const on = document.getElementById('layer-on');
const layers = document.getElementById('layers');
let chosen = 0;
let number = 0; // of layers

const chooseLayer = openFeed(
  (frame, layer) => {
    number = frame.layers;
    field.max = String(Math.max(1, number));
    layers.textContent = number ? `of ${number}` : '';
    setButtons();
    showState(frame);
    showTiles(frame);
    showCharts(frame);
    showHeat(layer, frame);
    showGroups(frame);
    showRanks(frame);
    showPlacement(frame);
    updateChat(frame);
    document.documentElement.dataset.frames = String(Number(document.documentElement.dataset.frames ?? 0) + 1);
  },
  (problem) => {
    breakCharts();
    showGap(problem);
  },
);

function setButtons() {
  back.disabled = chosen <= 0;
  on.disabled = chosen >= number - 1;
}

function choose(layer) {
  chosen = Math.max(0, Math.min(Math.max(0, number - 1), layer));
  field.value = String(chosen + 1);
  setButtons();
  chooseLayer(chosen);
}

back.addEventListener('click', () => choose(chosen - 1));
on.addEventListener('click', () => choose(chosen + 1));
field.addEventListener('change', () => choose(Math.round(Number(field.value) || 1) - 1));
setButtons();
