// Asks the service every second, keeps what it says, and paints what has changed.

import { TtftChart } from "./chart.js";
import { detail } from "./detail.js";
import { $, h, paint } from "./dom.js";
import { ago, clock } from "./format.js";
import { clusterMap } from "./map.js";
import { fallbacks, gates, hopLegend, linkTable, memory, requestTable, shardTable, tiles } from "./tables.js";

const EVERY_MS = 1000;
const AWAY_EVERY_MS = 2000;
const TIMEOUT_MS = 8000;
const PAGE_ROWS = 15;
const RANGES = [["5 min", 300], ["15 min", 900], ["all", Infinity]];
const DATA = "../relay/v1/";

const state = {
  boot: null,
  seq: 0,
  requests: [],
  board: null,
  selected: location.hash.startsWith("#r=") ? location.hash.slice(3) : null,
  chosen: null,
  range: 900,
  rows: PAGE_ROWS,
  heard: null,
  key: sessionStorage.getItem("relay-key") ?? "",
};

class Refused extends Error {}

async function ask(path) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  const answer = await fetch(DATA + path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  const body = await answer.json().catch(() => null);
  if (answer.ok && body) return body;
  const error = new Refused(body?.error?.message ?? `status ${answer.status}`);
  error.status = answer.status;
  error.code = body?.error?.code;
  throw error;
}

// -- asking -----------------------------------------------------------------------------------------------

async function look() {
  try {
    const board = await ask(`board?since=${state.seq}`);
    if (board.boot !== state.boot) {
      if (state.boot !== null && state.seq) {
        // Another service: its numbers begin anew.
        state.seq = 0;
        state.requests = [];
        state.boot = board.boot;
        return look();
      }
      state.boot = board.boot;
    }
    take(board);
    tell("live", "live");
    return EVERY_MS;
  } catch (error) {
    return trouble(error);
  }
}

function take(board) {
  state.board = board;
  state.heard = Date.now();
  state.requests = [...board.requests, ...state.requests].slice(0, board.service.kept);
  state.seq = state.requests.length ? state.requests[0].seq : 0;
  $("key-form").hidden = true;
  render();
  follow();
}

function trouble(error) {
  if (error.status === 401) {
    const form = $("key-form");
    if (form.hidden) { form.hidden = false; $("key").focus(); }
    tell("away", state.key ? "the key is not known" : "a key is needed");
    $("banner").hidden = true;
    return 10 * AWAY_EVERY_MS;
  }
  // A clock time, not a count of seconds: screen readers would read every change of it.
  const since = state.heard ? ` since ${clock(state.heard / 1000)}` : "";
  const why = error instanceof Refused ? error.message : error.name === "TimeoutError" ? `no answer within ${TIMEOUT_MS / 1000} s.` : "nothing answers at this address.";
  const kept = state.board ? " What you see is what it said last." : "";
  tell("away", "service away", `The service is away${since}: ${why}${kept} It is asked again every ${AWAY_EVERY_MS / 1000} s.`);
  return AWAY_EVERY_MS;
}

function tell(kind, text, banner) {
  const line = $("state");
  if (line.dataset.kind !== kind || $("state-text").textContent !== text) {
    line.dataset.kind = kind;
    $("state-text").textContent = text;
  }
  $("banner").hidden = !banner;
  if (banner && $("banner").textContent !== banner) $("banner").textContent = banner;
  document.body.classList.toggle("stale", kind === "away" && state.board !== null);
}

let timer = 0;
let asking = false;

async function loop() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  const pause = await look();
  asking = false;
  if (!document.hidden) timer = setTimeout(loop, pause);
}

// -- painting ---------------------------------------------------------------------------------------------

const chart = new TtftChart($("ttft"), pick);

function render() {
  const { board } = state;
  if (!board) return;
  const every = [...[...board.running].reverse(), ...state.requests];
  const { service, totals, cluster } = board;
  paint($("models"), service.models, () => service.models.join(", "));
  $("kept").textContent = service.kept;
  paint($("tiles"), [totals, service.running, service.waiting, service.draining], () => tiles(totals, service));
  paint($("hop-legend"), board.hops, () => hopLegend(board.hops, board.groups));
  renderChart(board);
  renderRequests(every, board.hops);
  const map = $("map");
  paint(map, [cluster.workers, board.links, map.clientWidth], () => clusterMap(map, cluster.workers, board.links));
  paint($("link-table"), board.links, () => linkTable(board.links));
  $("links-empty").hidden = board.links.length > 0;
  const old = cluster.age_s === null ? "the workers have not been asked yet" : cluster.age_s > 5 ? `workers last heard ${ago(cluster.age_s)} ago` : "";
  paint($("picture-age"), old, () => old);
  paint($("memory"), cluster.workers, () => memory(cluster.workers));
  paint($("fallbacks"), board.fallbacks, () => fallbacks(board.fallbacks, pick));
  paint($("shard-table"), cluster.shards, () => shardTable(cluster.shards));
  paint($("gates"), cluster.gates, () => gates(cluster.gates));
}

function renderChart(board) {
  const from = state.range === Infinity ? Math.min(board.now - 60, ...state.requests.map((r) => r.at)) - 5 : board.now - state.range;
  const shown = state.requests.filter((r) => r.at >= from && r.ttft_s !== null);
  const first = shown.length ? Math.min(...shown.map((r) => r.at)) : from;
  // A service that has just begun should not squeeze its first points into a corner.
  const start = Math.max(from, Math.min(first - 5, board.now - 60));
  $("ttft").hidden = shown.length === 0;
  const empty = $("ttft-empty");
  empty.hidden = shown.length > 0;
  empty.textContent = state.requests.length ? "No request in this range: choose a longer one." : "No request yet. Send one to /v1/chat/completions on this service, and it appears here within a second.";
  if (shown.length) chart.show(shown, [start, board.now + 2], state.selected);
}

function renderRequests(every, hops) {
  const kinds = { all: () => true, fallback: (r) => r.fallbacks > 0 || r.retries > 0, bad: (r) => r.outcome === "error" || r.outcome === "cancelled", full: (r) => r.outcome === "ok" && !r.relayed_tokens && !r.prefix_tokens };
  let rows = every.filter(kinds[$("filter").value]);
  if ($("order").value === "slow") rows = [...rows].sort((a, b) => (b.ttft_s ?? 0) - (a.ttft_s ?? 0));
  const shown = rows.slice(0, state.rows);
  paint($("request-table"), [shown, state.selected], () => (shown.length ? requestTable(shown, hops, state.selected, pick) : []));
  const empty = $("requests-empty");
  empty.hidden = shown.length > 0;
  empty.textContent = every.length ? "No request of this kind." : "No request yet.";
  $("more").hidden = rows.length <= state.rows;
  $("more").textContent = `Show more (${rows.length - state.rows})`;
}

// -- one request ------------------------------------------------------------------------------------------

async function pick(id) {
  state.selected = id;
  state.chosen = null;
  history.replaceState(null, "", `#r=${id}`);
  render();
  await follow();
  if (matchMedia("(max-width: 1099px)").matches) {
    $("detail").scrollIntoView({ block: "start" });
    $("detail").focus({ preventScroll: true });
  }
}

async function follow() {
  const id = state.selected;
  if (!id || (state.chosen?.id === id && state.chosen.outcome !== "running")) return;
  try {
    const found = await ask(`requests/${encodeURIComponent(id)}`);
    if (id !== state.selected) return;
    state.chosen = found;
    paint($("detail-body"), found, () => detail(found, state.board.hops));
  } catch (error) {
    if (id !== state.selected || error.status === 401) return;
    const gone = error.status === 404;
    if (gone) state.selected = null;
    const text = gone ? "This request is no longer kept. Choose another one." : "This request could not be read: the service is away.";
    paint($("detail-body"), [id, text], () => h("p", { class: "empty" }, text));
  }
}

function pickBy(better) {
  const rows = state.requests.filter((r) => r.outcome === "ok");
  if (rows.length) pick(rows.reduce((a, b) => (better(b, a) ? b : a)).id);
}

// -- controls ---------------------------------------------------------------------------------------------

function ranges() {
  $("ranges").replaceChildren(...RANGES.map(([label, range]) => h("button", { type: "button", class: "chip", "aria-pressed": String(range === state.range), on: { click: () => { state.range = range; ranges(); render(); } } }, label)));
}

const THEMES = ["auto", "light", "dark"];

function theme(change) {
  const root = document.documentElement;
  const now = root.dataset.theme ?? "auto";
  const next = change ? THEMES[(THEMES.indexOf(now) + 1) % THEMES.length] : now;
  if (next === "auto") delete root.dataset.theme;
  else root.dataset.theme = next;
  if (change) { try { localStorage.setItem("relay-theme", next); } catch { /* no storage: until the page is closed */ } }
  $("theme-name").textContent = next;
  $("theme").setAttribute("aria-label", `Theme: ${next}. Change it`);
  chart.rebuild();
}

$("theme").addEventListener("click", () => theme(true));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart.rebuild());
for (const id of ["order", "filter"]) $(id).addEventListener("change", () => { state.rows = PAGE_ROWS; render(); });
$("more").addEventListener("click", () => { state.rows += 4 * PAGE_ROWS; render(); });
$("slowest").addEventListener("click", () => pickBy((a, b) => a.ttft_s > b.ttft_s));
$("latest").addEventListener("click", () => pickBy((a, b) => a.seq > b.seq));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  sessionStorage.setItem("relay-key", state.key);
  $("key").value = "";
  loop();
});
addEventListener("hashchange", () => { if (location.hash.startsWith("#r=") && location.hash.slice(3) !== state.selected) pick(location.hash.slice(3)); });
addEventListener("resize", () => render());
document.addEventListener("visibilitychange", () => { if (!document.hidden) loop(); });

ranges();
theme(false);
loop();
