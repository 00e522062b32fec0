// Time to first token of each request, and what full prefill would have taken. uPlot has the axes and the
// cursor; the marks are painted here.

import { h } from "./dom.js";
import { clock, seconds, times } from "./format.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const NEAR_PX = 24;

export class TtftChart {
  constructor(box, onPick) {
    this.box = box;
    this.onPick = onPick;
    this.rows = [];
    this.range = [0, 1];
    this.selected = null;
    this.tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true });
    new ResizeObserver(() => this.resize()).observe(box);
  }

  show(rows, range, selected) {
    this.rows = rows.filter((r) => r.ttft_s !== null).sort((a, b) => a.at - b.at);
    this.range = range;
    this.selected = selected;
    if (!this.plot) this.build();
    this.plot.setData([this.rows.map((r) => r.at), this.rows.map((r) => r.ttft_s)]);
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (this.rows.length) this.show(this.rows, this.range, this.selected);
  }

  resize() {
    if (this.plot && this.box.clientWidth) this.plot.setSize(this.size());
  }

  size() {
    return { width: this.box.clientWidth, height: this.box.clientWidth < 480 ? 200 : 260 };
  }

  build() {
    const axis = { stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    this.plot = new uPlot({
      ...this.size(),
      padding: [12, 28, 0, 0],
      legend: { show: false },
      cursor: { points: { show: false }, drag: { x: false, y: false }, y: false, x: false },
      scales: {
        x: { time: true, range: () => this.range },
        y: { range: () => [0, this.top()] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 32, space: 80, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((t) => (t === 0 ? "0" : seconds(t))) },
      ],
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: {
        draw: [(u) => this.paint(u)],
        setCursor: [(u) => this.hover(u)],
      },
    }, [[], []], this.box);
    this.plot.over.append(this.tip);
    this.plot.over.addEventListener("click", () => { if (this.near) this.onPick(this.near.id); });
    this.plot.over.addEventListener("mouseleave", () => { this.tip.hidden = true; });
  }

  top() {
    const shown = this.rows.filter((r) => r.at >= this.range[0]);
    const most = Math.max(0.05, ...shown.map((r) => Math.max(r.ttft_s, r.full_ttft_s ?? 0)));
    return most * 1.08;
  }

  paint(u) {
    const c = u.ctx;
    const px = devicePixelRatio || 1;
    c.save();
    c.beginPath();
    c.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height + 4 * px);
    c.clip();
    for (const r of this.rows) {
      const x = u.valToPos(r.at, "x", true);
      const y = u.valToPos(r.ttft_s, "y", true);
      if (r.basis === "predicted") {
        const full = u.valToPos(r.full_ttft_s, "y", true);
        c.strokeStyle = css(r.full_ttft_s > r.ttft_s ? "--gain" : "--bad");
        c.lineWidth = 1.5 * px;
        line(c, x, y, x, full);
        c.strokeStyle = css("--quiet");
        diamond(c, x, full, 4 * px);
      }
    }
    for (const r of this.rows) {
      const x = u.valToPos(r.at, "x", true);
      const y = u.valToPos(r.ttft_s, "y", true);
      c.fillStyle = css(r.outcome === "ok" ? "--accent" : "--bad");
      disc(c, x, y, 4 * px);
      c.fill();
      if (r.fallbacks) { c.strokeStyle = css("--warn"); c.lineWidth = 2 * px; disc(c, x, y, 6.5 * px); c.stroke(); }
      if (r.id === this.selected) { c.strokeStyle = css("--text"); c.lineWidth = 2 * px; disc(c, x, y, 9 * px); c.stroke(); }
    }
    c.restore();
  }

  hover(u) {
    const { left, top } = u.cursor;
    this.near = null;
    let best = NEAR_PX;
    for (const r of this.rows) {
      const x = u.valToPos(r.at, "x");
      const away = Math.hypot(x - left, u.valToPos(r.ttft_s, "y") - top);
      if (away < best) { best = away; this.near = r; }
    }
    u.over.style.cursor = this.near ? "pointer" : "default";
    this.tip.hidden = !this.near;
    if (!this.near) return;
    const r = this.near;
    const gain = r.basis === "predicted" ? `full prefill about ${seconds(r.full_ttft_s)} (${times(r.full_ttft_s / r.ttft_s)})` : r.basis === "measured" ? "full prefill" : "";
    this.tip.replaceChildren(h("strong", {}, `${r.agent}: ${seconds(r.ttft_s)}`), h("span", {}, gain), h("span", {}, `${clock(r.at)}, ${r.worker || r.outcome}`));
    const x = u.valToPos(r.at, "x");
    this.tip.style.left = `${Math.max(0, Math.min(x - 90, u.over.clientWidth - 190))}px`;
    const y = u.valToPos(r.ttft_s, "y");
    this.tip.style.top = `${y > 90 ? y - 84 : y + 14}px`;
  }
}

function line(c, x1, y1, x2, y2) { c.beginPath(); c.moveTo(x1, y1); c.lineTo(x2, y2); c.stroke(); }
function disc(c, x, y, r) { c.beginPath(); c.arc(x, y, r, 0, 2 * Math.PI); }
function diamond(c, x, y, r) { c.beginPath(); c.moveTo(x, y - r); c.lineTo(x + r, y); c.lineTo(x, y + r); c.lineTo(x - r, y); c.closePath(); c.stroke(); }
