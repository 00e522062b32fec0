// The other parts of the page: sums, requests, links, memory, fallbacks, shards, gates.

import { h, hopColour } from "./dom.js";
import { ago, bytes, clock, count, many, percent, rate, seconds, times } from "./format.js";

const col = (text, right, more) => h("th", { scope: "col", class: right ? "num" : null, ...more }, text);

export function tiles(sums, service) {
  const reused = sums.relayed_tokens + sums.prefix_tokens;
  const bad = sums.errors + sums.fallbacks;
  const all = [
    ["Time to first token, p50", seconds(sums.ttft_p50_s), `p95 ${seconds(sums.ttft_p95_s)}, p99 ${seconds(sums.ttft_p99_s)}`],
    ["Faster than full prefill", sums.gain_p50 === null ? "\u2013" : times(sums.gain_p50), sums.gain_p50 === null ? "no estimate yet" : `estimate; median of ${many(sums.gains, "request")}`],
    ["Prompt tokens not computed", sums.prompt_tokens ? percent(reused / sums.prompt_tokens) : "\u2013", `${count(sums.relayed_tokens)} relayed, ${count(sums.prefix_tokens)} cached`],
    ["Requests", `${sums.per_s < 1 ? (sums.per_s * 60).toFixed(sums.per_s * 60 < 10 ? 1 : 0) : sums.per_s.toFixed(1)}`, `per ${sums.per_s < 1 ? "minute" : "second"}; ${count(sums.requests)} in ${ago(sums.window_s)}`],
    ["Now", count(service.running), `running, ${count(service.waiting)} waiting${service.draining ? ", shutting down" : ""}`],
    ["Fallbacks and errors", count(bad), `${many(sums.fallbacks, "fallback")}, ${many(sums.errors, "error")}, ${count(sums.cancelled)} cancelled`, bad > 0],
  ];
  return all.map(([name, value, more, warn]) => h("div", { class: warn ? "tile warn" : "tile" }, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", {}, more))));
}

export function hopLegend(hops, groups) {
  return Object.entries(groups).map(([group, label]) => h("li", {}, h("b", {}, label),
    hops.filter((hop) => hop.group === group).map((hop) => h("span", { class: "key", title: hop.what }, h("i", { class: "swatch", css: { background: hopColour(hop.name) } }), hop.label))));
}

export function requestTable(rows, hops, selected, onPick) {
  const most = Math.max(1e-9, ...rows.map((r) => r.ttft_s ?? 0));
  const labels = new Map(hops.map((hop) => [hop.name, hop.label]));
  return [
    h("caption", { class: "hidden" }, "Recent requests; choose one to see why it took as long as it did"),
    h("thead", {}, h("tr", {}, col("request"), col("agent"), col("first token after", false, { class: "wide" }), col("TTFT", true), col("full prefill", true, { class: "num extra", title: "what full prefill would have taken, over what it took" }), col("relayed", true, { class: "num extra", title: "prompt tokens whose KV was relayed" }), col("computed", true, { class: "num extra", title: "prompt tokens that were computed" }), col("worker", false, { class: "extra" }))),
    h("tbody", {}, rows.map((r) => requestRow(r, most, labels, r.id === selected, onPick))),
  ];
}

function requestRow(r, most, labels, selected, onPick) {
  const parts = Object.entries(r.hops);
  const text = parts.filter(([, sec]) => sec > 0.05 * (r.ttft_s ?? 1)).map(([name, sec]) => `${labels.get(name) ?? name} ${seconds(sec)}`).join(", ");
  const gain = r.basis === "predicted" ? times(r.full_ttft_s / r.ttft_s) : r.basis === "measured" ? "1\u00d7" : "\u2013";
  const who = r.pipeline ? r.agent.slice(r.pipeline.length + 1) : r.agent;
  return h("tr", { class: selected ? "selected" : null, "data-id": r.id, on: { click: () => onPick(r.id) } },
    h("td", {}, h("button", { type: "button", class: "link", "data-key": r.id, "aria-label": `Request ${r.id} at ${clock(r.at)}`, "aria-pressed": String(selected) }, clock(r.at)), marks(r)),
    h("td", { class: "who", title: r.agent }, who || "\u2013"),
    h("td", { class: "wide" }, h("span", { class: "stack", title: text, role: "img", "aria-label": text || r.outcome, css: { width: `${(100 * (r.ttft_s ?? 0)) / most}%` } },
      parts.map(([name, sec]) => h("i", { css: { "flex-grow": String(sec), background: hopColour(name) } })))),
    h("td", { class: "num" }, r.ttft_s === null ? (r.outcome === "running" ? `${seconds(r.total_s)}\u2026` : "\u2013") : seconds(r.ttft_s)),
    h("td", { class: "num extra", title: r.basis === "measured" ? "this was a full prefill" : r.full_ttft_s === null ? "too little was measured" : `about ${seconds(r.full_ttft_s)}` }, gain),
    h("td", { class: "num extra" }, count(r.prompt_tokens ? r.relayed_tokens : null)),
    h("td", { class: "num extra" }, count(r.prompt_tokens ? r.computed_tokens : null)),
    h("td", { class: "extra" }, r.worker || "\u2013"));
}

function marks(r) {
  const badge = (tone, text, title) => h("span", { class: `badge ${tone}`, title }, text);
  return [
    r.outcome === "running" && badge("info", "running"),
    r.outcome === "error" && badge("bad", String(r.status || "error"), r.code),
    r.outcome === "cancelled" && badge("warn", "left", "the client went away"),
    r.fallbacks > 0 && badge("warn", `${r.fallbacks} fallback${r.fallbacks > 1 ? "s" : ""}`),
    r.retries > 0 && badge("warn", "again", "started again, because its worker was lost"),
  ];
}

export function linkTable(links) {
  if (!links.length) return [];
  return [
    h("caption", { class: "hidden" }, "Pulls between workers in the last 15 minutes"),
    h("thead", {}, h("tr", {}, col("from"), col("to"), col("over", false, { class: "extra" }), col("pulls", true), col("failed", true), col("bytes", true), col("p50", true, { class: "num extra" }), col("p95", true), col("median rate", true, { class: "num extra" }))),
    h("tbody", {}, links.map((l) => {
      const failed = Object.entries(l.failed).map(([why, n]) => `${n} ${why.replaceAll("_", " ")}`).join(", ");
      return h("tr", {}, h("th", { scope: "row", title: l.source_node }, l.source), h("th", { scope: "row", title: l.destination_node }, l.destination),
        h("td", { class: "extra" }, Object.entries(l.backends).map(([name, n]) => (Object.keys(l.backends).length > 1 ? `${name} (${n})` : name)).join(", ") || "\u2013"),
        h("td", { class: "num" }, count(l.pulls)), h("td", { class: failed ? "num bad" : "num quiet", title: failed }, failed || "0"),
        h("td", { class: "num" }, bytes(l.bytes)), h("td", { class: "num extra" }, seconds(l.p50_s)), h("td", { class: "num" }, seconds(l.p95_s)), h("td", { class: "num extra" }, rate(l.bytes_per_s)));
    })),
  ];
}

const TIERS = { arena: "arena", host: "spill, host", queued: "spill, being written", disk: "spill, disk" };

export function memory(workers) {
  if (!workers.length) return h("p", { class: "empty" }, "No worker has been asked yet.");
  return workers.map((w) => h("div", { class: "store" },
    h("h3", {}, w.worker, h("span", { class: "quiet" }, w.state === "up" ? ` ${w.node}, ${w.device}` : ` ${w.state === "silent" ? "does not answer; last known figures" : "is down"}`)),
    w.tiers && Object.entries(w.tiers).map(([name, tier]) => meter(TIERS[name] ?? name, tier.bytes, tier.budget_bytes, many(tier.segments, "segment"))),
    w.cache_blocks && blocks(w),
    w.tiers && h("p", { class: "quiet small" }, footnote(w))));
}

function footnote(w) {
  const gone = Object.entries(w.evictions ?? {}).map(([why, n]) => `${count(n)} ${why.replaceAll("_", " ")}`).join(", ");
  return [`prefix cache ${bytes(w.prefix_cache_bytes)}`, many(w.leases, "lease"), many(w.pins, "pin"), w.quarantined_blocks && `${w.quarantined_blocks} blocks in quarantine`, gone && `evicted: ${gone}`].filter(Boolean).join("; ");
}

function blocks(w) {
  const used = w.cache_blocks - w.free_cache_blocks;
  return bar("KV cache of running requests", used / w.cache_blocks, `${count(used)} of ${count(w.cache_blocks)} blocks`);
}

const meter = (name, used, budget, more) => bar(name, budget ? used / budget : 0, `${bytes(used)} of ${bytes(budget)}, ${more}`);

function bar(name, share, text) {
  return h("div", { class: "meter" }, h("span", {}, name), h("span", { class: "num quiet" }, text),
    h("span", { class: "track", role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share), "aria-valuetext": text },
      h("span", { class: share > 0.9 ? "fill full" : "fill", css: { width: `${Math.min(100, 100 * share)}%` } })));
}

export function fallbacks(rows, onPick) {
  if (!rows.length) return h("p", { class: "empty" }, "None: everything that should have been relayed was.");
  const most = Math.max(...rows.map((r) => r.count));
  return h("ul", { class: "reasons" }, rows.map((r) => h("li", {},
    h("div", { class: "reason" }, h("b", {}, r.reason.replaceAll("_", " ")), h("span", { class: "num" }, `${count(r.count)}\u00d7, ${many(r.tokens, "token")}`)),
    h("span", { class: "track", "aria-hidden": "true" }, h("span", { class: "fill warn", css: { width: `${(100 * r.count) / most}%` } })),
    h("p", { class: "quiet small" }, r.what && `${r.what}. `, h("button", { type: "button", class: "link", "data-key": `why-${r.reason}`, on: { click: () => onPick(r.latest) } }, `latest, ${clock(r.at)}`)))));
}

export function shardTable(shards) {
  if (!shards.length) return [h("tbody", {}, h("tr", {}, h("td", { class: "quiet" }, "No shard has been asked yet.")))];
  return [
    h("thead", {}, h("tr", {}, col("shard"), col("state"), col("segments", true), col("leases", true), col("pins", true), col("expired", true))),
    h("tbody", {}, shards.map((x) => h("tr", {}, h("th", { scope: "row", title: x.shard }, x.shard.replace(/^relay-directory-/, "")),
      h("td", {}, h("span", { class: x.state === "up" ? "badge good" : "badge bad" }, x.state)),
      h("td", { class: "num" }, count(x.segments)), h("td", { class: "num" }, count(x.leases)), h("td", { class: "num" }, count(x.pins)), h("td", { class: "num" }, count(x.expired_leases))))),
  ];
}

export function gates(rows) {
  if (!rows.length) return h("p", { class: "empty" }, "No edge is watched. Pipelines with a quality section are, when they run on this cluster.");
  return h("ul", { class: "reasons" }, rows.map((g) => h("li", {},
    h("div", { class: "reason" }, h("b", {}, g.edge), h("span", { class: g.rung ? "badge warn" : "badge good" }, g.method)),
    h("p", { class: "quiet small" }, `${g.pipeline}: ${many(g.checks, "check")}, ${many(g.falls, "demotion")}, ${many(g.recoveries, "recovery", "recoveries")}${g.reason ? `; ${g.reason}` : ""}`))));
}
