"""relay_cluster: agents on a cluster relay the KV cache that they made while decoding.

    from relay_cluster import Agent, Cluster, Pipeline

Importing this package is cheap: `Cluster` brings Ray and torch with it, so it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError, PipelineError, RelayError

if TYPE_CHECKING:
    from relay_cluster.cluster import Cluster
    from relay_cluster.config import ClusterConfig, PipelineConfig
    from relay_cluster.report import RunReport

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "Cluster",
    "ClusterConfig",
    "ConfigError",
    "Pipeline",
    "PipelineConfig",
    "PipelineError",
    "RelayError",
    "RunReport",
    "__version__",
]

_LAZY = {
    "Cluster": "relay_cluster.cluster",
    "ClusterConfig": "relay_cluster.config",
    "PipelineConfig": "relay_cluster.config",
    "RunReport": "relay_cluster.report",
}


def __getattr__(name: str) -> Any:
    """Load what is not cheap when it is first asked for (PEP 562)."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
