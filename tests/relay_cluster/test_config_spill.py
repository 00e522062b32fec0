"""The spill's settings in a cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay_cluster import ClusterConfig
from transport.errors import ConfigError
from transport.settings import SpillSettings


def load(folder: Path, spill: str) -> SpillSettings:
    path = folder / "cluster.yaml"
    path.write_text(f"name: c\ntransport:\n  arena_bytes: 64MiB\n  spill: {spill}\n")
    return ClusterConfig.load(path).transport.spill


def test_spill_is_off_unless_told(tmp_path: Path) -> None:
    assert load(tmp_path, "{}") == SpillSettings()
    assert (SpillSettings().host_bytes, SpillSettings().disk_bytes) == (0, 0)


def test_sizes_are_written_with_units(tmp_path: Path) -> None:
    spill = load(tmp_path, "{host_bytes: 1.5GiB, disk_bytes: 20GiB, disk_dir: spill/kv}")
    assert (spill.host_bytes, spill.disk_bytes, spill.disk_dir) == (3 << 29, 20 << 30, "spill/kv")


def test_faults_are_told_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml:4 transport\.spill\.disk_byte.*disk_bytes"):
        load(tmp_path, "{disk_byte: 1}")
    with pytest.raises(ConfigError, match=r"cluster\.yaml:4 transport\.spill\.host_bytes"):
        load(tmp_path, "{host_bytes: -1}")
