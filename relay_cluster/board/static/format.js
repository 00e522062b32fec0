// Numbers for people: three digits or so, always with a unit.

export function seconds(value) {
  if (value === null || value === undefined) return "\u2013";
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 10) return `${value.toFixed(1)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 0.01) return `${(value * 1e3).toFixed(0)} ms`;
  return `${(value * 1e3).toFixed(1)} ms`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "\u2013";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value / size >= 100 ? 0 : 1)} ${unit}`;
  }
  return `${Math.round(value)} B`;
}

export const rate = (value) => (value === null || value === undefined ? "\u2013" : `${bytes(value)}/s`);

export const count = (value) => (value === null || value === undefined ? "\u2013" : value.toLocaleString("en-US"));

export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
}

export const many = (n, one, more = `${one}s`) => `${count(n)} ${n === 1 ? one : more}`;

export const times = (ratio) => `${ratio.toFixed(ratio >= 10 ? 0 : 1)}\u00d7`;

export const clock = (unix) => new Date(unix * 1e3).toLocaleTimeString([], { hour12: false });

export function ago(s) {
  if (s < 90) return `${Math.round(s)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`;
}
