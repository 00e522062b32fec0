"""Log handlers. Libraries only make loggers; entry points (the CLI, a Ray worker's start) call this module.

Prompt text is never logged. Ids of requests, workers and segments travel in `extra` and end up in brackets.
"""

from __future__ import annotations

import logging
import os
import sys

LEVEL_VARIABLE = "RELAY_LOG_LEVEL"

_ROOTS = ("relay_cluster", "workers", "transport")
_IDS = ("request", "worker", "agent", "segment", "peer", "trace")


class _Formatter(logging.Formatter):
    """One line per record, with the ids that its `extra` carries."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        ids = [f"{name}={getattr(record, name)}" for name in _IDS if hasattr(record, name)]
        return f"{line} [{' '.join(ids)}]" if ids else line


def level_from_environment(default: str = "WARNING") -> str:
    """RELAY_LOG_LEVEL where it is a level, else the default."""
    level = os.environ.get(LEVEL_VARIABLE, default).upper()
    return level if level in logging.getLevelNamesMapping() else default


def set_up_logging(level: str | None = None) -> None:
    """Attach one handler (standard error) to our own loggers; calling it again changes only the level."""
    for name in _ROOTS:
        logger = logging.getLogger(name)
        logger.setLevel(level or level_from_environment())
        if not any(isinstance(handler.formatter, _Formatter) for handler in logger.handlers):
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False


def set_up_worker_logging() -> None:
    """For Ray's `worker_process_setup_hook`: its processes inherit the level by the environment."""
    set_up_logging()
