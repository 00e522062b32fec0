"""The whole error hierarchy, drawn once.

    RelayError
    |- ConfigError            what the user wrote is wrong (exit status 2)
    |  |- PipelineError       the graph, a slot or an input
    |  '- ModelError          the model cannot be loaded or is not supported
    |- PromptTooLong          longer than the model's context
    |- CacheFull / ArenaFull  no room now; CacheTooSmall: never will be
    |- TransportError         a backend cannot be had or a peer cannot be reached
    |- DirectoryUnavailable   no shard answered within its deadline
    |- DeadlineExceeded       a wait of ours ran out
    |- Cancelled              the caller gave up
    '- WorkerLost             the worker process died and retries are used up
       '- WorkerDraining      it takes no requests any more; another one, or its successor, does

Transfers do not raise: they end in a `Transfer` whose `Outcome` says what happened. Every message says
what is wrong, where, and what to do.
"""

from __future__ import annotations


class RelayError(Exception):
    """Root of everything this project raises on purpose."""


class ConfigError(RelayError):
    """A file, flag or argument that cannot be used as it is."""


class PipelineError(ConfigError):
    """A pipeline whose graph, slots or inputs do not fit together."""


class ModelError(ConfigError):
    """A model that cannot be found, loaded or relayed."""


class PromptTooLong(ConfigError):
    """A prompt plus its answer that exceeds the model's context."""


class ArenaFull(RelayError):
    """The arena has no free block within its byte budget."""


class CacheFull(RelayError):
    """The KV cache has no room now."""


class CacheTooSmall(ConfigError):
    """A request that can never fit into the KV cache."""


class TransportError(RelayError):
    """A backend that is missing, or a peer that cannot be reached."""


class DirectoryUnavailable(RelayError):
    """No directory shard answered within its deadline."""


class DeadlineExceeded(RelayError):
    """A wait ended without the thing waited for."""


class Cancelled(RelayError):
    """The caller cancelled the request."""


class WorkerLost(RelayError):
    """A worker process died and the request could not be finished elsewhere."""


class WorkerDraining(WorkerLost):
    """A worker that is about to be replaced took no more requests; this one was not begun."""
