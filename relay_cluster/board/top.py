"""`relay top`: what the live page shows, as tables in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from relay_cluster.board.client import BoardClient, ServiceAway

_ROWS = 12
"""Requests shown where the terminal does not say how tall it is."""
_OTHER_LINES = 20
_WIDE = 110
_AGENT = 28
"""Characters of an agent's name; its end tells more than its beginning."""
_YIELDING = ("agent", "node", "device")


def watch(
    client: BoardClient, console: Console, *, every_s: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the service until Ctrl-C; while it does not answer, the last picture stays, and says so."""
    last: dict[str, Any] | None = None
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=False) as live:
        while True:
            try:
                last, fault = client.board(), ""
            except ServiceAway as error:
                fault = str(error)
            live.update(
                show(last, fault, rows=max(4, console.height - 20), width=console.width), refresh=True
            )
            sleep(every_s)


def show(
    board: Mapping[str, Any] | None, fault: str = "", *, rows: int = _ROWS, width: int = _WIDE
) -> RenderableType:
    """Everything as one renderable.

    Args:
        board: what the service said last. fault: why it is not up to date.
        rows: requests to show. width: of the terminal, in characters.
    """
    parts: list[RenderableType] = []
    if fault:
        parts.append(Text(f"the service is away: {fault}", style="bold red"))
    if board is None:
        return Group(*parts)
    parts += [_head(board), workers_table(board), *_links(board), requests_table(board, rows, width)]
    parts += _fallbacks(board)
    return Group(*parts)


def _head(board: Mapping[str, Any]) -> Text:
    sums, service = board["totals"], board["service"]
    prompt = sums["prompt_tokens"]
    reused = sums["relayed_tokens"] + sums["prefix_tokens"]
    gain = sums["gain_p50"]
    minutes = max(1, round(sums["window_s"] / 60))
    first = [
        f"last {minutes} min: {sums['requests']} requests, {sums['per_s']:.2f}/s",
        f"{service['running']} running, {service['waiting']} waiting",
        f"{sums['fallbacks']} fallbacks, {sums['errors']} errors, {sums['cancelled']} cancelled",
    ]
    second = [
        f"TTFT p50 {_seconds(sums['ttft_p50_s'])}, p95 {_seconds(sums['ttft_p95_s'])}",
        f"{gain:.1f}x faster than full prefill (estimate)" if gain else "no estimate of full prefill yet",
        f"{reused / prompt:.0%} of {prompt:,} prompt tokens not computed" if prompt else "nothing reused yet",
    ]
    head = Text(f"{', '.join(service['models'])}\n", style="bold")
    return head.append(f"{'; '.join(first)}\n{'; '.join(second)}\n", style="not bold")


def workers_table(board: Mapping[str, Any]) -> Table:
    """One line for each worker, and how many shards answer."""
    shards = board["cluster"]["shards"]
    up = sum(s["state"] == "up" for s in shards)
    right = ["running", "segments", "leases", "arena", "spill"]
    table = _table(["worker", "state", "node", "device"], right)
    if shards:
        table.caption = f"{up} of {len(shards)} directory shards answer"
    for worker in board["cluster"]["workers"]:
        style = {"up": "green", "silent": "yellow"}.get(worker["state"], "bold red")
        tiers = worker.get("tiers", {})
        spill = [tier for name, tier in tiers.items() if name != "arena"]
        table.add_row(
            worker["worker"],
            Text(worker["state"], style=style),
            _short(worker.get("node", "-")),
            _short(worker.get("device", "-")),
            _count(worker.get("running")),
            _count(worker.get("segments")),
            _count(worker.get("leases")),
            _filled([tiers["arena"]] if "arena" in tiers else []),
            _filled(spill),
        )
    return table


def requests_table(board: Mapping[str, Any], rows: int = _ROWS, width: int = _WIDE) -> Table:
    """Running requests, then the last that ended. Ids are shown where there is room for them."""
    found = [*reversed(board["running"]), *board["requests"]][:rows]
    wide = width >= _WIDE
    left = ["at", *(["id"] if wide else []), "agent", "worker"]
    right = ["TTFT", "gain", "relayed", *(["cached"] if wide else []), "computed"]
    table = _table(left, right, last=["mostly"])
    labels = {hop["name"]: hop["label"] for hop in board["hops"]}
    for row in found:
        table.add_row(
            datetime.fromtimestamp(row["at"]).astimezone().strftime("%H:%M:%S"),
            *([row["id"]] if wide else []),
            _short((row["agent"] if wide else row["agent"].rpartition("/")[2])[-_AGENT:]),
            row["worker"] or "-",
            _seconds(row["ttft_s"]),
            f"{row['full_ttft_s'] / row['ttft_s']:.1f}x" if row["basis"] == "predicted" else "-",
            _count(row["relayed_tokens"]),
            *([_count(row["prefix_tokens"])] if wide else []),
            _count(row["computed_tokens"]),
            _said(row, labels),
        )
    if not found:
        table.caption = "no request yet: send one to /v1/chat/completions"
    return table


def _said(row: Mapping[str, Any], labels: Mapping[str, str]) -> Text:
    if row["outcome"] == "running":
        return _short(f"running, {_seconds(row['total_s'])}", "cyan")
    if row["outcome"] != "ok":
        said = " ".join(str(part) for part in (row["outcome"], row["status"], row["code"]) if part)
        return _short(said, "yellow" if row["outcome"] == "cancelled" else "bold red")
    said = _short(_largest(row["hops"], labels))
    if row["fallbacks"]:
        said.append(f", {row['fallbacks']} fallbacks", style="yellow")
    return said


def _links(board: Mapping[str, Any]) -> list[Table]:
    if not board["links"]:
        return []
    table = _table(["from", "to", "over"], ["pulls", "failed", "bytes", "p50", "p95", "rate"])
    for link in board["links"]:
        rate = link["bytes_per_s"]
        table.add_row(
            link["source"],
            link["destination"],
            "+".join(link["backends"]) or "-",
            _count(link["pulls"]),
            _count(sum(link["failed"].values())),
            _bytes(link["bytes"]),
            _seconds(link["p50_s"]),
            _seconds(link["p95_s"]),
            "-" if rate is None else f"{_bytes(rate)}/s",
        )
    return [table]


def _fallbacks(board: Mapping[str, Any]) -> list[Text]:
    return [
        Text(
            f"fallback {row['reason']}: {row['count']}, {row['tokens']:,} tokens ({row['what']})",
            style="yellow",
        )
        for row in board["fallbacks"]
    ]


def _table(left: list[str], right: list[str], last: list[str] | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), caption_justify="left"
    )
    for name in left:
        table.add_column(name, no_wrap=name not in _YIELDING)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last or []:
        table.add_column(name)
    return table


def _short(text: str, style: str = "") -> Text:
    """For a column that is made narrower before others: cut, not wrapped."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _largest(hops: Mapping[str, float], labels: Mapping[str, str]) -> str:
    if not hops:
        return "-"
    name, most = max(hops.items(), key=lambda item: item[1])
    return f"{labels.get(name, name)} {most / sum(hops.values()):.0%}"


def _filled(tiers: list[Mapping[str, Any]]) -> str:
    budget = sum(tier["budget_bytes"] for tier in tiers)
    used = sum(tier["bytes"] for tier in tiers)
    return f"{used / 1e6:,.0f} of {budget / 1e6:,.0f} MB" if budget else "-"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{value * 1e3:.0f} ms"
        if value >= 0.01
        else f"{value * 1e3:.1f} ms"
    )


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
