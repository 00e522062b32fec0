"""Runs a command on "host 1" of a private little network, as root:

    python -m tests.multihost pytest [ARGS]     the tests of several hosts (`make test-multihost`)
    python -m tests.multihost bench [OPTIONS]   `relay bench link` between two hosts over a shaped link

The command gets network, process, mount, IPC and host name namespaces of its own. Whatever it starts, further
hosts included, ends with it, and nothing outside is touched.
"""

from __future__ import annotations

import os
import shutil
import sys

from tests.multihost.rig import TOOLS, WORLD_ENV, world_command

FOLDER = "tests/multihost"
COMMANDS = {"pytest": ["pytest", "-m", "multihost"], "bench": ["tests.multihost.shaped"]}


def refusal() -> str:
    """Why there can be no network of our own here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian: iproute2, util-linux)" if missing else ""


def main() -> None:
    """Replace this process by the command in its new namespaces."""
    name, *rest = sys.argv[1:] or [""]
    if name not in COMMANDS:
        sys.exit(__doc__)
    if why := refusal():
        sys.exit(f"several hosts cannot be laid out here: {why}")
    if name == "pytest" and not any(FOLDER in argument for argument in rest):
        rest.append(FOLDER)
    os.environ[WORLD_ENV] = "1"
    command = world_command([sys.executable, "-m", *COMMANDS[name], *rest])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
