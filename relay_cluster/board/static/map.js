// Workers as boxes, pulls between them as arrows: wider for more bytes, with the 95th percentile of a pull.
// In a row where there is room, else in a column.

import { h, s } from "./dom.js";
import { bytes, many, percent, seconds } from "./format.js";

const MOST = 12;

export function clusterMap(box, workers, links) {
  if (!workers.length) {
    return h("p", { class: "empty" }, "No worker is known yet. They appear as soon as the service has asked them.");
  }
  const shown = busiest(workers, links);
  const names = new Set(shown.map((w) => w.worker));
  const inside = links.filter((l) => names.has(l.source) && names.has(l.destination));
  const wide = box.clientWidth >= 640;
  const left = workers.length - shown.length;
  return [
    wide ? row(shown, inside, box.clientWidth) : column(shown, inside, box.clientWidth),
    left > 0 && h("p", { class: "quiet" }, `${left} more workers, with fewer bytes moved, are in the tables.`),
  ];
}

function busiest(workers, links) {
  if (workers.length <= MOST) return workers;
  const moved = new Map();
  for (const l of links) for (const end of [l.source, l.destination]) moved.set(end, (moved.get(end) ?? 0) + l.bytes);
  const top = [...workers].sort((a, b) => (moved.get(b.worker) ?? 0) - (moved.get(a.worker) ?? 0)).slice(0, MOST);
  return workers.filter((w) => top.includes(w));
}

const stroke = (link, most) => 1.5 + 4.5 * Math.sqrt(link.bytes / Math.max(1, most));
const words = (l) => `${l.source} to ${l.destination}: ${many(l.pulls, "pull")}, ${bytes(l.bytes)}, p50 ${seconds(l.p50_s)}, p95 ${seconds(l.p95_s)}`;

function frame(width, height, workers, links, parts) {
  const label = `Workers ${workers.map((w) => `${w.worker} (${w.state})`).join(", ")}. ${links.map(words).join(". ")}`;
  const arrow = s("marker", { id: "tip", viewBox: "0 0 8 8", refX: 6.5, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" }, s("path", { d: "M0 0L8 4L0 8z", class: "arrow-tip" }));
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, s("defs", {}, arrow), parts);
}

function row(workers, links, width) {
  const n = workers.length;
  const gap = n > 6 ? 16 : Math.min(120, Math.max(40, (width - n * 190) / (n + 1)));
  const w = Math.min(210, (width - gap * (n + 1)) / n);
  const hgt = 112;
  const start = (width - n * w - (n - 1) * gap) / 2;
  const index = new Map(workers.map((x, i) => [x.worker, i]));
  const reach = (up) => Math.max(0, ...links.map((l) => index.get(l.destination) - index.get(l.source)).filter((d) => (up ? d > 0 : d < 0)).map(Math.abs));
  const rise = (d) => (d ? 14 + 46 * d : 0);
  const above = 0.75 * rise(reach(true));
  const below = 0.75 * rise(reach(false));
  const y = above + 16;
  const most = Math.max(1, ...links.map((l) => l.bytes));
  const arcs = links.map((l) => {
    const a = index.get(l.source), b = index.get(l.destination);
    const ahead = b > a;
    const side = ahead ? 1 : -1;
    // Long arrows leave and arrive further out, so that they go around the short ones.
    const inset = Math.min(0.5, 0.16 + 0.2 * (Math.abs(b - a) - 1));
    const x1 = start + a * (w + gap) + w * (ahead ? 1 - inset : inset);
    const x2 = start + b * (w + gap) + w * (ahead ? inset : 1 - inset);
    const edge = ahead ? y : y + hgt;
    const lift = 0.75 * rise(Math.abs(b - a)) * side;
    const d = `M${x1} ${edge}C${x1} ${edge - lift * 1.3} ${x2} ${edge - lift * 1.3} ${x2} ${edge - 3 * side}`;
    return arc(l, d, (x1 + x2) / 2, edge - 0.975 * lift, most, true);
  });
  const boxes = workers.map((x, i) => box(x, start + i * (w + gap), y, w, hgt));
  return frame(width, y + hgt + below + 12, workers, links, [arcs.map((one) => one.path), boxes, arcs.map((one) => one.label)]);
}

function column(workers, links, width) {
  const w = Math.min(190, width - 130);
  const hgt = 112, gap = 28;
  const x = (width - w) / 2;
  const index = new Map(workers.map((one, i) => [one.worker, i]));
  const most = Math.max(1, ...links.map((l) => l.bytes));
  const arcs = links.map((l) => {
    const a = index.get(l.source), b = index.get(l.destination);
    const down = b > a;
    const side = down ? 1 : -1;
    const far = Math.abs(b - a);
    const y1 = a * (hgt + gap) + 8 + hgt * (down ? 0.7 : 0.3);
    const y2 = b * (hgt + gap) + 8 + hgt * (down ? 0.3 : 0.7);
    const edge = down ? x + w : x;
    const bulge = Math.min(width / 2 - w / 2 - 4, 26 + 20 * far) * side;
    const d = `M${edge} ${y1}C${edge + bulge * 1.25} ${y1} ${edge + bulge * 1.25} ${y2} ${edge + 3 * side} ${y2}`;
    return arc(l, d, edge + bulge * 0.6, (y1 + y2) / 2, most, false);
  });
  const boxes = workers.map((one, i) => box(one, x, 8 + i * (hgt + gap), w, hgt));
  return frame(width, workers.length * (hgt + gap) + 8, workers, links, [arcs.map((one) => one.path), boxes, arcs.map((one) => one.label)]);
}

function arc(link, d, x, y, most, roomy) {
  const failed = Object.values(link.failed).reduce((a, b) => a + b, 0);
  const text = roomy ? `p95 ${seconds(link.p95_s)}, ${bytes(link.bytes)}` : seconds(link.p95_s);
  const said = text + (failed && roomy ? `, ${failed} failed` : "");
  const half = 3.4 * said.length + 7;
  const kind = failed ? "flow failed" : "flow";
  const title = () => s("title", {}, words(link) + (failed ? `, ${failed} failed` : ""));
  return {
    path: s("g", { class: kind }, title(), s("path", { d, "stroke-width": stroke(link, most).toFixed(1), "marker-end": "url(#tip)" })),
    label: s("g", { class: kind }, title(), s("rect", { x: x - half, y: y - 10, width: 2 * half, height: 20, rx: 4 }), s("text", { x, y, "text-anchor": "middle", dy: "0.35em" }, said)),
  };
}

function box(worker, x, y, w, hgt) {
  const arena = worker.tiers?.arena;
  const full = arena ? arena.bytes / Math.max(1, arena.budget_bytes) : 0;
  const cache = worker.cache_blocks ? 1 - worker.free_cache_blocks / worker.cache_blocks : 0;
  const inner = w - 24;
  const meter = (dy, share, label) => [
    s("text", { x: x + 12, y: y + dy, class: "small" }, label),
    s("text", { x: x + w - 12, y: y + dy, class: "small", "text-anchor": "end" }, percent(share)),
    s("rect", { x: x + 12, y: y + dy + 5, width: inner, height: 5, rx: 2.5, class: "track" }),
    share > 0 && s("rect", { x: x + 12, y: y + dy + 5, width: Math.max(2, inner * Math.min(1, share)), height: 5, rx: 2.5, class: share > 0.9 ? "fill full" : "fill" }),
  ];
  return s("g", { class: `worker ${worker.state}` },
    s("title", {}, `${worker.worker} on ${worker.node ?? "?"}, ${worker.device ?? "?"}, pid ${worker.pid ?? "?"}, incarnation ${worker.incarnation ?? "?"}`),
    s("rect", { x, y, width: w, height: hgt, rx: 8, class: "body" }),
    s("circle", { cx: x + 17, cy: y + 20, r: 5, class: "lamp" }),
    s("text", { x: x + 28, y: y + 24, class: "name" }, worker.worker),
    s("text", { x: x + w - 12, y: y + 24, class: "small", "text-anchor": "end" }, worker.state === "up" ? worker.device ?? "" : worker.state),
    s("text", { x: x + 12, y: y + 44, class: "small" }, worker.state === "down" ? "does not run" : `${worker.running ?? 0} running, ${many(worker.segments ?? 0, "segment")}`),
    arena && meter(62, full, "arena"),
    worker.cache_blocks && meter(86, cache, "KV cache"));
}
