// Before the first paint: the page comes in the colours that were chosen here, or the system's.
(() => {
  let choice = 'auto';
  try {
    choice = localStorage.getItem('epslots-theme') ?? choice;
  } catch {
    // storage is off
  }
  const root = document.documentElement;
  root.dataset.choice = choice;
  root.dataset.theme = choice === 'auto' ? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light') : choice;
})();
