// One request: why it took so long, in words, as a waterfall, and span by span.

import { h, hopColour } from "./dom.js";
import { bytes, clock, count, many, percent, rate, seconds } from "./format.js";

const HOWS = {
  relayed: ["relayed", "good", "Its KV was made elsewhere and used here."],
  fallback: ["fallback", "warn", "It should have been relayed, and was computed."],
  cheaper: ["computed", "", "Computing it was predicted to be faster than a pull."],
  prefix: ["not pulled", "", "The worker's own prefix cache has it, or it is too short to be worth a pull."],
  new: ["new", "", "Seen for the first time: remembered for later requests."],
};

export function detail(found, hops) {
  const labels = new Map(hops.map((hop) => [hop.name, hop]));
  return [
    head(found),
    h("ul", { class: "why" }, found.why.map((line) => h("li", {}, line))),
    found.bars.length > 0 && waterfall(found, labels),
    found.full_ttft_s !== null && found.basis === "predicted" && beside(found),
    found.outcome === "ok" && spans(found),
    facts(found),
  ];
}

function head(r) {
  const who = r.pipeline ? r.agent.slice(r.pipeline.length + 1) : r.agent;
  return h("div", { class: "detail-head" },
    h("p", { class: "big" }, h("strong", {}, r.ttft_s === null ? seconds(r.total_s) : seconds(r.ttft_s)), " ",
      h("span", { class: "quiet" }, r.ttft_s === null ? "until it ended" : "to the first token")),
    h("p", { class: "quiet" }, h("b", {}, who), r.pipeline && ` in ${r.pipeline}`, r.worker && ` on ${r.worker}`, `, ${clock(r.at)}, `, h("code", {}, r.id)));
}

function waterfall(r, labels) {
  const all = r.bars.reduce((sum, bar) => sum + bar.seconds, 0);
  const compared = r.bars.some((bar) => bar.usual_s !== null);
  const shown = r.bars.filter((bar) => bar.seconds >= 5e-5 || (bar.usual_s ?? 0) >= 5e-5);
  const rows = shown.map((bar) => {
    const hop = labels.get(bar.name) ?? { label: bar.name, what: "" };
    const much = bar.usual_s !== null && bar.seconds > 1.5 * bar.usual_s && bar.seconds - bar.usual_s > 0.1 * all;
    return h("tr", { title: hop.what, "data-hop": bar.name },
      h("th", { scope: "row" }, h("i", { class: "swatch", css: { background: hopColour(bar.name) } }), hop.label),
      h("td", { class: "lane", "aria-hidden": "true" }, h("div", {}, h("span", { class: "bar", css: {
        left: `${(100 * bar.start_s) / all}%`, width: `max(2px, ${(100 * bar.seconds) / all}%)`, background: hopColour(bar.name) } }))),
      h("td", { class: "num", "data-seconds": bar.seconds }, seconds(bar.seconds)),
      h("td", { class: "num quiet share" }, percent(bar.seconds / all)),
      compared && h("td", { class: much ? "num much" : "num quiet" }, seconds(bar.usual_s), much && h("span", { class: "hidden" }, " (much more than usual)")));
  });
  return h("table", { class: "waterfall" },
    h("caption", { class: "hidden" }, "Parts of the time to first token, in order"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "part"), h("th", { class: "lane", "aria-hidden": "true" }), h("th", { scope: "col", class: "num" }, "took"), h("th", { scope: "col", class: "num share" }, "share"), compared && h("th", { scope: "col", class: "num", title: "median of this agent's other requests" }, "usual"))),
    h("tbody", {}, rows),
    h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "first token after"), h("td", { class: "lane" }), h("td", { class: "num", id: "bars-sum", "data-seconds": all }, seconds(all)), h("td", { class: "share" }), compared && h("td", {}))));
}

function beside(r) {
  const most = Math.max(r.ttft_s, r.full_ttft_s);
  const bar = (name, value, kind) => h("div", { class: "versus-row" }, h("span", {}, name),
    h("span", { class: "lane" }, h("span", { class: `bar ${kind}`, css: { width: `${(100 * value) / most}%` } })), h("span", { class: "num" }, seconds(value)));
  return h("div", { class: "versus", role: "group", "aria-label": "Beside full prefill" },
    bar("this request", r.ttft_s, "ttft"), bar("full prefill, estimate", r.full_ttft_s, "full"));
}

function spans(r) {
  const pulls = new Map();
  for (const p of r.pulls) pulls.set(p.slot, [...(pulls.get(p.slot) ?? []), p]);
  if (!r.spans.length) return h("p", { class: "empty" }, "No span: the prompt contained no remembered text, and nothing worth remembering.");
  const rows = r.spans.map((span) => {
    const [label, tone, what] = HOWS[span.how] ?? [span.how, "", ""];
    const moved = pulls.get(span.slot) ?? [];
    return h("tr", {},
      h("th", { scope: "row", title: span.id || "not remembered yet" }, span.slot),
      h("td", {}, span.kind === "response" ? "answer" : "input"),
      h("td", { class: "num" }, count(span.tokens)),
      h("td", {}, h("span", { class: `badge ${tone}`, title: span.detail || what }, span.reason ? `${label}: ${span.reason.replaceAll("_", " ")}` : label)),
      h("td", {}, moved.length ? moved.map((p) => h("div", {}, transfer(p))) : h("span", { class: "quiet" }, span.how === "relayed" ? "no pull: this worker had it" : "\u2013")));
  });
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Spans of the prompt" }, h("table", { class: "spans" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "span"), h("th", { scope: "col" }, "is an"), h("th", { scope: "col", class: "num" }, "tokens"), h("th", { scope: "col" }, "was"), h("th", { scope: "col" }, "pull"))),
    h("tbody", {}, rows)));
}

function transfer(p) {
  if (p.source === p.destination) return `held by ${p.destination} itself`;
  if (p.outcome !== "pulled") return `${p.source} \u2192 ${p.destination}, ${p.backend}: ${p.outcome.replaceAll("_", " ")} after ${seconds(p.seconds)}${p.detail ? ` (${p.detail})` : ""}`;
  return `${p.source} \u2192 ${p.destination}, ${bytes(p.bytes)} in ${seconds(p.seconds)} (${rate(p.seconds > 0 ? p.bytes / p.seconds : null)}, ${p.backend})`;
}

function facts(r) {
  const decode = r.decode_s > 0 && r.answer_tokens > 1 ? `, ${((r.answer_tokens - 1) / r.decode_s).toFixed(1)} tokens/s` : "";
  const rows = [
    ["Prompt", r.prompt_tokens ? `${many(r.prompt_tokens, "token")}: ${count(r.relayed_tokens)} relayed, ${count(r.prefix_tokens)} from the prefix cache, ${count(r.computed_tokens)} computed` : null],
    ["Answer", r.answer_tokens ? `${many(r.answer_tokens, "token")}${decode}${r.finish_reason ? `, ended by ${r.finish_reason}` : ""}` : null],
    ["Pull behind computing", r.pull_hidden_s > 0 ? `${seconds(r.pull_hidden_s)}, not part of the time above` : null],
    ["Work", r.flop_ratio === null ? null : `${percent(r.flop_ratio)} of full prefill's${r.reuse === null ? "" : `; ${percent(r.reuse)} of relayed entries kept`}`],
    ["Ended", r.outcome === "ok" ? `after ${seconds(r.total_s)}` : `${r.outcome}${r.status ? ` ${r.status} (${r.code})` : ""} after ${seconds(r.total_s)}`],
    ["Started again", r.retries ? many(r.retries, "time") : null],
    ["Method", r.method || null],
    ["Worker", r.worker ? `${r.worker} on ${r.node}` : null],
    ["In the logs", r.log_id || null],
    ["Notes", r.notes.length ? r.notes.join("; ") : null],
  ];
  return h("dl", { class: "facts" }, rows.filter(([, value]) => value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
