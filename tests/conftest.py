"""Environment of every test, and visible skips for what this machine does not have."""

from __future__ import annotations

import os
from importlib import util

import pytest
from hypothesis import HealthCheck, settings

# How fast examples come depends on what else the machine does: no reason to fail.
settings.register_profile(
    "relay", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.load_profile("relay")

# Set before anything imports Ray: it reads them once.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if not _has_cuda():
    # Without a device Triton's kernels are interpreted. Triton decides that when it is first imported, which
    # transformers does on the way to some models: too late for the kernels' own tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")


_NEEDS = {
    "gpu": (_has_cuda, "no CUDA device"),
    "ray": (lambda: util.find_spec("ray") is not None, "ray is not installed"),
    "nixl": (
        lambda: any(util.find_spec(n) for n in ("nixl_cu12", "nixl_cu13", "nixl")),
        "NIXL is not installed",
    ),
    "ucx": (lambda: util.find_spec("ucxx") is not None, "ucxx is not installed"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason."""
    wanted = {name for item in items for name in _NEEDS if item.get_closest_marker(name)}
    reasons = {name: reason for name, (has, reason) in _NEEDS.items() if name in wanted and not has()}
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
