// The box to talk with the model: the service's own API, streamed. A model without a chat template continues texts.

import { count, milliseconds, speed } from './format.js';
import { askForKey, keyHeaders } from './key.js';
import { events } from './sse.js';

const log = document.getElementById('chat-log');
const form = document.getElementById('chat-form');
const text = document.getElementById('chat-text');
const most = document.getElementById('chat-most');
const send = document.getElementById('chat-send');
const stop = document.getElementById('chat-stop');
const clear = document.getElementById('chat-clear');
const title = document.getElementById('chat-title');

let said = []; // the conversation, as the API has it
let running = null;
let open = false; // the service takes requests
let chats = true;
let model = '';

/** Follow the service's state. */
export function updateChat(frame) {
  model = frame.model;
  open = frame.phase === 'ready';
  if (chats !== frame.chat && frame.phase !== 'starting') {
    chats = frame.chat;
    title.textContent = chats ? 'Chat' : 'Continue a text';
    text.placeholder = chats ? 'Ask the model something' : 'import os\n';
  }
  setButtons();
}

function setButtons() {
  send.disabled = !open || running !== null;
  send.hidden = running !== null;
  stop.hidden = running === null;
  log.setAttribute('aria-busy', String(running !== null));
}

function bubble(kind) {
  const made = document.createElement('div');
  made.className = `said ${kind}${kind === 'model' && !chats ? ' plain' : ''}`;
  log.append(made);
  return made;
}

function part(kind, into) {
  const made = document.createElement('span');
  if (kind) made.className = kind;
  into.append(made);
  return made;
}

/** Keep the end of the conversation in sight, unless the reader has scrolled away from it. */
function following(change) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (near) log.scrollTop = log.scrollHeight;
}

function bodyOf(given) {
  const common = { model, stream: true, stream_options: { include_usage: true }, max_tokens: Math.max(1, Number(most.value) || 256) };
  return chats ? ['v1/chat/completions', { ...common, messages: said }] : ['v1/completions', { ...common, prompt: given }];
}

async function ask(given) {
  const bubbles = { thought: null, answer: null, facts: null };
  const whole = bubble('model');
  bubbles.thought = part('thought', whole);
  bubbles.answer = part('', whole);
  bubbles.facts = part('facts', whole);
  const began = performance.now();
  let first = null;
  let usage = null;
  let answer = '';
  const facts = () => {
    const seconds = (performance.now() - began) / 1e3;
    const tokens = usage?.completion_tokens;
    const pace = tokens > 1 && seconds > first ? `, ${speed((tokens - 1) / (seconds - first))} tokens/s` : '';
    return first === null ? '' : `${tokens ? `${count(tokens)} tokens, ` : ''}first after ${milliseconds(first)} ms${pace}`;
  };
  try {
    const [path, body] = bodyOf(given);
    const headers = { 'content-type': 'application/json', ...keyHeaders() };
    const response = await fetch(path, { method: 'POST', headers, body: JSON.stringify(body), signal: running.signal });
    if (response.status === 401) {
      await askForKey();
      throw new Error('The key is there now. Send it again.');
    }
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? '';
      const more = choice.delta?.content ?? choice.text ?? '';
      if (first === null && (thought || more)) first = (performance.now() - began) / 1e3;
      answer += more;
      following(() => {
        bubbles.thought.append(thought);
        bubbles.answer.append(more);
      });
    }
  } catch (error) {
    if (error.name !== 'AbortError') part('problem', whole).textContent = error.message || 'The connection broke.';
  }
  following(() => (bubbles.facts.textContent = facts()));
  return answer;
}

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  const given = text.value;
  if (!given.trim() || !open || running !== null) return;
  text.value = '';
  running = new AbortController();
  setButtons();
  following(() => (bubble('you').textContent = given));
  said.push({ role: 'user', content: given });
  const about = said;
  const answer = await ask(given);
  if (answer) about.push({ role: 'assistant', content: answer });
  else about.pop(); // it was never answered: the next one begins where this one did
  running = null;
  setButtons();
});

text.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener('click', () => running?.abort());
clear.addEventListener('click', () => {
  running?.abort();
  said = [];
  log.replaceChildren();
});
setButtons();
