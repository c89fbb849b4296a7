// Light, dark, or what the system says. What the page begins with is set by first.js.

const system = matchMedia('(prefers-color-scheme: dark)');
const root = document.documentElement;
const select = document.getElementById('theme');
const listeners = [];

function apply() {
  const dark = root.dataset.choice === 'dark' || (root.dataset.choice === 'auto' && system.matches);
  root.dataset.theme = dark ? 'dark' : 'light';
  for (const listener of listeners) listener();
}

/** Call a function after each change of colours. */
export function onTheme(listener) {
  listeners.push(listener);
}

/** A colour of the style sheet, by its name. */
export function colour(name) {
  return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
}

system.addEventListener('change', apply);
select.value = root.dataset.choice;
select.addEventListener('change', () => {
  root.dataset.choice = select.value;
  try {
    localStorage.setItem('epslots-theme', select.value);
  } catch {
    // it holds until the page is closed
  }
  apply();
});
