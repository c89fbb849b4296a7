// Numbers as people read them. Pure.

const grouped = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });

/** A count: 1,234; or 1.23M from a million on. */
export function count(value) {
  if (Math.abs(value) >= 1e9) return `${(value / 1e9).toFixed(2)}G`;
  if (Math.abs(value) >= 1e6) return `${(value / 1e6).toFixed(2)}M`;
  return grouped.format(value);
}

/** A speed, with one decimal while it is small. */
export function speed(value) {
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

/** A share of 1 in percent; 100 % only if it is all. */
export function percent(share) {
  const shown = (share * 100).toFixed(1);
  return shown === '100.0' && share < 1 ? '99.9' : shown;
}

/** Seconds as milliseconds, with no more digits than matter. */
export function milliseconds(seconds) {
  const ms = seconds * 1e3;
  return ms >= 100 ? grouped.format(ms) : ms.toPrecision(ms >= 1 ? 3 : 2).replace(/\.?0+$/, '');
}

/** Bytes in binary units. */
export function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}
