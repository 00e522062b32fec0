"""`relay submit`: a pipeline as a job of a Ray cluster. Wraps Ray's job API: what goes along, how the run is
named, logs as they come, and how it ended.

The job is `python -m relay_cluster run ...` in the uploaded folder, so the code that runs is the code that
was sent. Knows nothing of pipelines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from relay_cluster.access import decide, use, users_home
from relay_cluster.config import RaySettings
from transport.errors import ConfigError, RelayError

log = logging.getLogger(__name__)

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
_ENDED_S: Final = 30.0
"""From the end of the logs to the job's own end."""
_POLL_S: Final = 0.2
_ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
STOPPED: Final = 130


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run.

    Attributes:
        command: of the process, relative to `working_dir`.
        working_dir: folder that is uploaded, without what its .gitignore names.
        runtime_env: Ray's, beside the folder: pip, env_vars, excludes, ...
        submission_id: of the caller's choice; None leaves it to Ray.
    """

    command: tuple[str, ...]
    working_dir: Path
    runtime_env: Mapping[str, Any]
    submission_id: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job is, or was when we stopped looking.

    Attributes:
        status: Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED.
        message: Ray's sentence about it. exit_code: of its process; None where there is none.
    """

    submission_id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def exit_status(self) -> int:
        """For the command: the job's own; where it has none, 130 if it was stopped, else 1 if it failed."""
        if self.status == "STOPPED":
            return STOPPED
        return self.exit_code or (1 if self.status == "FAILED" else 0)


def command_line(
    working_dir: Path, pipeline: Path, cluster: Path | None, more: Sequence[str]
) -> tuple[str, ...]:
    """The run that a job makes. more: options of `relay run`.

    Raises:
        ConfigError: a file lies outside the folder that is uploaded.
    """
    named = ["--cluster", _within(working_dir, cluster)] if cluster else []
    return ("python", "-m", "relay_cluster", "run", _within(working_dir, pipeline), *named, *more)


def _within(folder: Path, file: Path) -> str:
    try:
        return str(file.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise ConfigError(
            f"{file}: lies outside {folder}, which is what the job gets. Name a folder above it with "
            "--working-dir."
        ) from None


def read_runtime_env(file: Path | None, variables: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment from a YAML or JSON file, with NAME=VALUE variables added.

    Raises:
        ConfigError: not such a file, or not NAME=VALUE.
    """
    data: Any = {}
    if file is not None:
        try:
            data = yaml.safe_load(file.read_text("utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file (--runtime-env)") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: must be a mapping such as {{pip: [...], env_vars: {{...}}}}")
    if "working_dir" in data:
        raise ConfigError(f"{file}: working_dir is given by --working-dir; remove it from the file")
    added: dict[str, str] = {}
    for text in variables:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f'--env "{text}" is not NAME=VALUE')
        added[name] = value
    if added:
        data = {**data, "env_vars": {**data.get("env_vars", {}), **added}}
    return data


def default_address(environment: Mapping[str, str]) -> str:
    """As `ray job submit` chooses it."""
    given = environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS", "")
    return given if given.startswith(("http://", "https://")) else DEFAULT_ADDRESS


class Jobs:
    """Ray's job API at one address.

    Args:
        address: URL of the dashboard.

    Raises:
        ConfigError: no URL, nobody there, or no token for it.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f'--address "{address}" is not a URL such as {DEFAULT_ADDRESS}')
        host = f"{parts.hostname}:{parts.port or 80}"
        use(decide(RaySettings(address=host), os.environ, users_home()))
        from ray.job_submission import JobSubmissionClient

        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray dashboard answers at {address}: {error}. Start the cluster with `ray.dashboard: "
                "true`, or name another one with --address."
            ) from error

    def submit(self, job: Job) -> str:
        """Upload the folder and start the job; returns its id.

        Raises:
            ConfigError: Ray refused it.
        """
        env = {**job.runtime_env, "working_dir": str(job.working_dir)}
        try:
            return self._client.submit_job(
                entrypoint=shlex.join(job.command), runtime_env=env, submission_id=job.submission_id
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"Ray did not take the job: {error}") from error

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Ended:
        """Pass on what the job prints until it has ended.

        Raises:
            RelayError: the connection to the dashboard broke.
        """
        asyncio.run(self._follow(submission_id, write))
        deadline = time.monotonic() + _ENDED_S
        while True:
            found = self.look(submission_id)
            if found.status in _ENDED or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_S)

    async def _follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        lines: AsyncIterator[str] = self._client.tail_job_logs(submission_id)
        try:
            async for text in lines:
                write(text)
        except (RuntimeError, OSError) as error:
            raise RelayError(
                f"the logs of {submission_id} broke off: {error}. The job may still run: "
                f"`ray job status {submission_id}`."
            ) from error

    def look(self, submission_id: str) -> Ended:
        """How the job is now.

        Raises:
            RelayError: the dashboard does not tell.
        """
        try:
            info = self._client.get_job_info(submission_id)
        except (RuntimeError, ConnectionError) as error:
            raise RelayError(f"job {submission_id}: {error}") from error
        code = info.driver_exit_code
        return Ended(submission_id, info.status.value, info.message or "", code)

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end the job.

        Raises:
            RelayError: it does not.
        """
        try:
            self._client.stop_job(submission_id)
        except (RuntimeError, ConnectionError) as error:
            raise RelayError(f"job {submission_id} could not be stopped: {error}") from error
