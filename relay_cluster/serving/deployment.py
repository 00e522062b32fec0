"""The same app as a Ray Serve deployment.

One replica holds the cluster's workers and the memory of what was said, which is why there is one: a second
one would not know the answers of the first. Ray Serve gives it the HTTP proxies of every node, restarts and
health checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve

from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.serving.app import make_app, start_workers
from relay_cluster.serving.tenants import load_tenants
from transport.errors import ConfigError

APP_NAME = "relay"
_MORE = 64
"""Requests that Ray Serve lets through beside ours that run and wait: /healthz, and those that get a 429."""


def deployment(config: ClusterConfig, host: str) -> Any:
    """The application, for `serve.run`.

    Args:
        host: on which the proxies listen.

    Raises:
        ConfigError: no keys where they are needed.
    """
    tenants = load_tenants(config.serve, host)
    workers = config.serve.workers if config.workers == "auto" else config.workers

    def build() -> Any:
        cluster = Cluster(config, attach=True)
        cluster.start()
        start_workers(cluster)
        return make_app(cluster, tenants, cluster.stop)

    limit = config.worker.max_sequences * workers + config.serve.max_waiting + _MORE
    options = serve.deployment(
        name="service",
        num_replicas=1,
        max_ongoing_requests=limit,
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s + 10,
        ray_actor_options={"num_cpus": 0},
        health_check_timeout_s=60,
    )
    return options(serve.ingress(build)()).bind()


def build(args: Mapping[str, str]) -> Any:
    """The application as `serve deploy`, `serve run` and KubeRay's RayService build it, from the
    `import_path` and the `args` of a configuration.

    Args:
        args: "cluster": path of the cluster file; "host": on which the proxies listen (default: loopback).

    Raises:
        ConfigError: another argument, the file, or no keys where they are needed.
    """
    unknown = args.keys() - {"cluster", "host"}
    if unknown or "cluster" not in args:
        raise ConfigError(
            f"args of the Serve application: {', '.join(sorted(args)) or 'none'} given; cluster (a file) is "
            "needed, and host may be given."
        )
    return deployment(ClusterConfig.load(args["cluster"]), args.get("host", "127.0.0.1"))


def run_serve(
    config: ClusterConfig,
    *,
    host: str,
    port: int,
    wait: Callable[[], None],
    on_event: Callable[..., None] | None = None,
) -> None:
    """Serve through Ray Serve until `wait` returns or raises.

    Raises:
        ConfigError: no keys where they are needed.
    """
    application = deployment(config, host)
    # Not started but joined: Cluster starts or joins Ray as its file says, and ends it.
    with Cluster(config, attach=True, on_event=on_event):
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config={"encoding": "TEXT", "log_level": logging.getLevelName(logging.WARNING)},
            )
            serve.run(application, name=APP_NAME, route_prefix="/")
            if on_event is not None:
                on_event("cluster", f"serving on http://{host}:{port}/v1")
            wait()
        finally:
            serve.shutdown()
