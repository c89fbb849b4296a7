// The figures, the ranks, the placement, and the state of the service. All text goes in as text.

import { bytes, count, milliseconds, percent, speed } from './format.js';

const NONE = '–';
const OLD_S = 3; // since the ranks answered

function pair(times) {
  return times ? times.map(milliseconds).join(' / ') : NONE;
}

// Key, label, meaning, value, unit, note.
const TILES = [
  ['tokens', 'Tokens/s', 'New tokens that ranks returned, a second', (f) => (f.rates ? speed(f.rates.new_tokens) : NONE), '', (f) => f.totals && `${count(f.totals.new_tokens)} since the start`],
  ['ttft', 'TTFT P50 / P99, ms', 'From a request to its first token; requests that ended in the last minute', (f) => pair(f.ttft_s), '', () => 'last minute'],
  ['tpot', 'TPOT P50 / P99, ms', 'From a token to the next, a request’s average; requests that ended in the last minute', (f) => pair(f.per_token_s), '', () => 'last minute'],
  ['requests', 'Running / waiting', 'Requests that a rank has, and that wait for a rank with room', (f) => `${count(f.running)} / ${count(f.waiting)}`, '', (f) => (f.places ? `room for ${count(f.places)}` : '')],
  ['kv', 'KV cache', 'Share of the caches in use', (f) => (f.totals ? percent(f.totals.kv_usage) : NONE), '%', (f) => f.totals && `${count(f.totals.preempted)} preempted`],
  ['hits', 'Hit rate', 'Uses of an expert that found it in a slot', (f) => share(f.rates?.hit_rate), '%', (f) => f.totals && `${percent(f.totals.hit_rate)} % since the start`],
  ['zero', 'Zero-miss steps', 'Steps in which a rank missed in no layer', (f) => share(f.rates?.zero_miss), '%', (f) => f.totals && `${percent(f.totals.zero_miss)} % since the start`],
  ['balance', 'Balance', 'Mean load of the ranks over the largest one’s; 1 = equal loads', (f) => (f.totals ? f.totals.balance.toFixed(3) : NONE), '', (f) => f.rates && `${bytes(f.rates.host_bytes + f.rates.peer_bytes)}/s fetched`],
];

function share(value) {
  return value === null || value === undefined ? NONE : percent(value);
}

function element(kind, text, name) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

/** Set a text if it is another one: selections and screen readers are left alone. */
function write(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

const tiles = document.getElementById('tiles');
const parts = TILES.map(([key, label, meaning, , unit]) => {
  const tile = document.createElement('div');
  tile.title = meaning;
  const value = element('span', NONE);
  value.id = `tile-${key}`;
  const figure = document.createElement('dd');
  figure.append(value);
  const units = element('small', '');
  figure.append(units);
  const note = element('dd', '', 'note');
  note.id = `note-${key}`;
  tile.append(element('dt', label), figure, note);
  tiles.append(tile);
  return { value, units, unit, note };
});

export function showTiles(frame) {
  TILES.forEach(([, , , read, , remark], number) => {
    const { value, units, unit, note } = parts[number];
    const text = read(frame);
    write(value, text);
    write(units, text === NONE ? '' : unit);
    write(note, remark(frame) || '');
  });
}

const rows = document.getElementById('ranks');
const ranksNote = document.getElementById('ranks-note');

/** A group by its number, and its role if it has one. */
function groupName(number, role) {
  return role === 'mixed' ? String(number) : `${number}, ${role}`;
}

export function showRanks(frame) {
  const several = frame.groups.length > 1;
  document.getElementById('ranks-group').hidden = !several;
  const found = frame.ranks.map((rank) => {
    const row = document.createElement('tr');
    const serves = frame.serving > 0 && frame.groups[rank.group]?.formed !== false;
    const state = element('td', serves ? 'serving' : 'regrouping', 'state');
    state.dataset.kind = serves ? 'good' : 'wait';
    const computed = rank.computed === null ? NONE : speed(rank.computed);
    row.append(
      element('td', String(rank.rank)), ...(several ? [element('td', groupName(rank.group, rank.role))] : []), state, element('td', count(rank.requests), 'number'), element('td', computed, 'number'),
      element('td', bytes(rank.memory_bytes), 'number'), element('td', rank.where, 'dim'),
    );
    return row;
  });
  for (const line of frame.missing) {
    const row = document.createElement('tr');
    const state = element('td', 'missing', 'state');
    state.dataset.kind = 'bad';
    const reason = element('td', line, 'reason');
    reason.colSpan = several ? 5 : 4;
    row.append(element('td', NONE), state, reason);
    found.unshift(row);
  }
  rows.replaceChildren(...found);
  write(ranksNote, frame.recoveries ? `regrouped ${frame.recoveries} ${frame.recoveries === 1 ? 'time' : 'times'}` : '');
}

const groups = document.getElementById('groups');

export function showGroups(frame) {
  document.getElementById('groups-part').hidden = frame.groups.length < 2;
  groups.replaceChildren(...frame.groups.map((group) => {
    const row = document.createElement('tr');
    const state = element('td', group.formed ? 'serving' : 'forming', 'state');
    state.dataset.kind = group.formed ? 'good' : 'wait';
    row.append(
      element('td', String(group.number)), element('td', group.role), state, element('td', count(group.serving), 'number'),
      element('td', count(group.requests), 'number'), element('td', count(group.handing_over), 'number'),
      element('td', group.epoch < 0 ? NONE : String(group.epoch), 'number'),
      element('td', group.controller ? `${group.placement}, ${group.controller}` : 'stays', 'dim'),
    );
    return row;
  }));
  const handed = frame.hand_overs;
  const failed = handed?.failed ? `, ${count(handed.failed)} failed` : '';
  const each = handed?.done ? `; ${milliseconds(handed.mean_s)} ms and ${bytes(handed.mean_bytes)} each` : '';
  write(document.getElementById('groups-note'), handed ? `${count(handed.done)} hand-overs${failed}${each}` : '');
}

const placement = document.getElementById('placement');
let sentences = '';

export function showPlacement(frame) {
  const now = JSON.stringify(frame.placement);
  if (now === sentences) return;
  sentences = now;
  placement.replaceChildren(...(frame.placement.length ? frame.placement : ['Nothing is known yet.']).map((text) => element('p', text)));
}

const status = document.getElementById('status');
const statusText = document.getElementById('status-text');
const banner = document.getElementById('banner');

/** The state in words: kind of the dot, short text, and a sentence if something is out of the ordinary. */
function stateOf(frame) {
  switch (frame.phase) {
    case 'starting':
      return ['wait', 'loading', 'The model is being loaded. Requests are refused until its ranks serve.'];
    case 'draining':
      return ['wait', 'draining', `The service is shutting down: ${count(frame.running)} running requests may end, new ones are refused.`];
    case 'failed':
      return ['bad', 'failed', 'The ranks have failed for good. The log of the service says why.'];
  }
  const forming = frame.groups.filter((group) => !group.formed);
  if (frame.serving === 0) return ['bad', 'no ranks', 'No rank serves: the group is being formed anew. Requests wait, and go on from their last token.'];
  if (frame.age_s !== null && frame.age_s > OLD_S) return ['wait', 'busy', `The ranks have not answered for ${Math.round(frame.age_s)} s; their figures are old.`];
  if (frame.missing.length) return ['wait', 'short of ranks', frame.missing[0]];
  if (forming.length) return ['wait', 'regrouping', `Group ${groupName(forming[0].number, forming[0].role)} is being formed; the others serve.`];
  return ['good', 'serving', ''];
}

function setState([kind, text, sentence]) {
  status.dataset.kind = kind;
  write(statusText, text);
  banner.dataset.kind = kind;
  banner.hidden = !sentence;
  write(banner, sentence);
}

export function showState(frame) {
  document.body.classList.remove('stale');
  write(document.getElementById('model'), frame.model);
  const several = frame.groups.length > 1 ? ` in ${frame.groups.length} groups` : '';
  const ranks = `${frame.serving} ${frame.serving === 1 ? 'rank' : 'ranks'}${several}`;
  write(document.getElementById('group'), frame.epoch < 0 ? '' : `${ranks}, epoch ${frame.epoch}`);
  document.title = `${frame.model} · epslots`;
  setState(stateOf(frame));
}

/** Frames stopped coming; an empty reason: the page could not be seen. */
export function showGap(reason) {
  document.body.classList.add('stale');
  setState(['wait', 'reconnecting', reason ? `Trying again: ${reason}. The figures below are old.` : '']);
}
