// The API key: asked for when the service wants one, kept in this tab's session storage, sent as a header and never in a URL.

const STORED = 'epslots-key';
const dialog = document.getElementById('key-dialog');
const form = document.getElementById('key-form');
const field = document.getElementById('key');
const problem = document.getElementById('key-problem');
const forget = document.getElementById('forget-key');
let key = read();
let asked = null;

function read() {
  try {
    return sessionStorage.getItem(STORED) ?? '';
  } catch {
    return ''; // storage is off: the key stays in memory
  }
}

function keep(value) {
  key = value;
  forget.hidden = !key;
  try {
    if (key) sessionStorage.setItem(STORED, key);
    else sessionStorage.removeItem(STORED);
  } catch {
    // memory has it
  }
}

/** Headers that let a request in. */
export function keyHeaders() {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Ask the user for a key; resolves when there is one. */
export function askForKey() {
  if (asked) return asked;
  problem.hidden = !key;
  problem.textContent = 'The service refused this key.';
  keep('');
  field.value = '';
  dialog.showModal();
  field.focus();
  asked = new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const given = field.value.trim();
      if (!/^[\x21-\x7e]+$/.test(given)) {
        problem.textContent = 'A key has printable ASCII characters without spaces.';
        problem.hidden = false;
        return;
      }
      keep(given);
      asked = null;
      dialog.close();
      resolve();
    };
  });
  return asked;
}

dialog.addEventListener('close', () => {
  if (asked) dialog.showModal(); // there is nothing to see without a key
});
forget.addEventListener('click', () => {
  keep('');
  location.reload();
});
forget.hidden = !key;
