"""`relay bench link` between two hosts over a shaped link: `python -m tests.multihost bench [OPTIONS]`.

--rate 1gbit      what every host receives at most (tc tbf)
other options     as of `relay bench link`
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.multihost.rig import ENVIRONMENT, ROOT, Lan, RayOnHosts

TWO_NODES = ROOT / "configs" / "clusters" / "two_nodes.yaml"
BENCH_S = 1200.0


def main() -> None:
    """Lay the hosts out, measure, and end with the command's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--cluster", type=Path, default=TWO_NODES)
    known, rest = parser.parse_known_args()
    os.environ.update(ENVIRONMENT)
    with Lan(2) as lan, RayOnHosts(lan):
        # Starting is not what is measured: the link gets narrow once both nodes are up.
        lan.shape(known.rate)
        command = [
            sys.executable,
            "-m",
            "relay_cluster",
            "bench",
            "link",
            "--cluster",
            str(known.cluster),
            *rest,
        ]
        status = subprocess.run(command, timeout=BENCH_S, check=False).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
