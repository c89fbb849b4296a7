// The feed of frames: open while the page can be seen, and opened again when it breaks.

import { askForKey, keyHeaders } from './key.js';
import { events } from './sse.js';

const SILENCE_MS = 10_000;
const MOST_PAUSE_MS = 10_000;

/**
 * Show frames for as long as the page lives.
 *
 * @param onFrame gets each frame, with its layer (or null).
 * @param onGap is told what is wrong when frames stop coming, and an empty text when the page was only hidden.
 * @returns a function that chooses the layer.
 */
export function openFeed(onFrame, onGap) {
  let layer = 0;
  let opened = null;

  async function follow() {
    let pause = 0;
    for (;;) {
      if (document.hidden) await new Promise((seen) => document.addEventListener('visibilitychange', seen, { once: true }));
      if (document.hidden) continue;
      const now = new AbortController();
      opened = now;
      const problem = await read(now, () => (pause = 0));
      if (opened !== now) continue; // the layer was changed, or the page hidden: no failure
      onGap(problem);
      pause = Math.min(MOST_PAUSE_MS, Math.max(500, pause * 2));
      await new Promise((over) => setTimeout(over, pause));
    }
  }

  /** Read frames until they end; returns the reason. */
  async function read(controller, onSuccess) {
    let timer;
    const listen = () => {
      clearTimeout(timer);
      timer = setTimeout(() => controller.abort(), SILENCE_MS);
    };
    try {
      listen();
      const response = await fetch(`live?layer=${layer}`, { headers: keyHeaders(), signal: controller.signal, cache: 'no-store' });
      if (response.status === 401) {
        clearTimeout(timer);
        await askForKey();
        return 'opening with the key';
      }
      if (!response.ok) return (await response.json())?.error?.message ?? `the service answered ${response.status}`;
      for await (const { frame, layer: shown } of events(response)) {
        listen();
        onSuccess();
        if (opened === controller) onFrame(frame, shown);
      }
      return 'the service has ended';
    } catch {
      return 'the service does not answer';
    } finally {
      clearTimeout(timer);
    }
  }

  function again() {
    const before = opened;
    opened = null;
    before?.abort();
  }

  document.addEventListener('visibilitychange', () => {
    if (document.hidden) {
      again();
      onGap('');
    }
  });
  follow();
  return (number) => {
    layer = number;
    again();
  };
}
