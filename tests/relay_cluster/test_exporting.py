"""A run's metrics on a port and in a file."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay_cluster.exporting import RunMetrics
from relay_cluster.telemetry import TelemetrySettings
from transport.errors import ConfigError

OFF = TelemetrySettings()


def test_a_port_on_loopback() -> None:
    with RunMetrics(["m"], OFF, port=0) as metrics:
        assert metrics.url is not None
        assert metrics.url.startswith("http://127.0.0.1:")
        metrics.recorder.counter("relay_answer_tokens_total", "m").inc(3)
        answer = httpx.get(metrics.url)
        assert answer.headers["content-type"].startswith("text/plain")
        families = {f.name: f for f in text_string_to_metric_families(answer.text)}
        assert [s.value for s in families["relay_answer_tokens"].samples] == [3.0]
        assert httpx.get(metrics.url.replace("/metrics", "/else")).status_code == 404
        url = metrics.url
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port}: cannot listen"):
            RunMetrics([], OFF, port=port)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "relay.prom"
    with RunMetrics(["m"], OFF, file=file) as metrics:
        assert metrics.url is None
        metrics.write()
        metrics.recorder.counter("relay_answer_tokens_total", "m").inc(5)
        metrics.write()
    assert 'relay_answer_tokens_total{model="m"} 5.0' in file.read_text("utf-8").splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["relay.prom"]


def test_a_file_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunMetrics(["m"], OFF, file=tmp_path / "gone" / "relay.prom") as metrics:
        metrics.write()
    assert "were not written" in caplog.text
