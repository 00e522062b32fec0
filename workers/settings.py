"""Knobs of the workers room. Defaults live here and nowhere else. Imports are cheap on purpose (no torch,
ray or transformers), so that `relay check` can validate a file on any laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from transport.settings import MIB

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker: a model on a device, its KV cache and its step scheduler.

    Attributes:
        device: "auto" takes cuda where there is one.
        gpu_share: of one GPU, for each worker: 1 gives every worker a GPU of its own, 0.5 lets two share one.
        profile: file of the model's profile, as `relay profile --out` writes it, on every node; None: the one
            that ships with the project, or else the generic one.
        dtype: "auto" is float32 on CPU and the checkpoint's own dtype on CUDA.
        threads: CPU threads for torch; 0 means the cores of the machine, shared in equal parts with those
            workers on it that compute at the same moment.
        cache_tokens: size of the KV cache, in tokens over all requests of the worker.
        max_rows_per_step: cap on the rows (tokens x sequences) of one step, so that a long prefill does not
            hold up the decode of other requests. A step may have more: decode rows are never held back,
            prefill gets at least 16 rows, and the rows of a relayed span whose other entries follow its
            probes (`drift` of context_mass) are never cut, however many they are.
        max_sequences: requests computed at once; more of them wait in the queue.
        prefix_cache_bytes: budget of the exact local prefix cache.
        anchor_bytes: budget of the anchors of `kvcomm`; 0 turns them off, and it then computes every span.
        min_segment_tokens: a slot shorter than this is neither published nor looked up.
        break_even: compute a span where a pull is predicted to take longer, from what pulls and prefills of
            this worker took so far; false relays whatever can be relayed.
        request_timeout_s: deadline of one request, queueing included.
        ahead_share: by how much of their time decode steps of other requests may grow, on average, for work
            that can wait (prefill ahead, then heal=idle), as measured; 0: it takes only steps that nobody
            else wants.
        heal_finish_rows: with heal=always, an answer that ends with at most so many stale cache entries is
            kept until they are healed, so that its KV is published as exact; the tokens are out by then, only
            the reply waits. With more of them left it is published as what it is, rectified. 0: never wait.
        shadow_bytes: most memory for evidence that waits for the quality gate's shadow checks.
        stream_interval: so many tokens of an answer are sent together. The first one is sent at once, and
            what waits for the sender goes together in any case. More than 1 costs clients that stream some
            smoothness, and saves both ends most of a millisecond per token.
    """

    device: Device = "auto"
    gpu_share: Annotated[float, Gt(0), Le(1)] = 1.0
    profile: str | None = None
    dtype: DType = "auto"
    threads: Annotated[int, Ge(0)] = 0
    cache_tokens: Annotated[int, Ge(64)] = 16_384
    max_rows_per_step: Annotated[int, Ge(16)] = 1024
    max_sequences: Annotated[int, Ge(1)] = 16
    prefix_cache_bytes: Annotated[int, Ge(0)] = 256 * MIB
    anchor_bytes: Annotated[int, Ge(0)] = 512 * MIB
    min_segment_tokens: Annotated[int, Ge(1)] = 16
    break_even: bool = True
    request_timeout_s: Annotated[float, Gt(0)] = 600.0
    ahead_share: Annotated[float, Ge(0), Le(1)] = 0.1
    heal_finish_rows: Annotated[int, Ge(0)] = 512
    shadow_bytes: Annotated[int, Ge(0)] = 64 * MIB
    stream_interval: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn. temperature 0 is greedy.

    Attributes:
        max_new_tokens: answer length limit.
        min_new_tokens: until so many tokens are drawn, none is that ends or structures an answer (stop and
            special tokens); for answers of a given length.
        temperature: 0 for greedy, else the softmax temperature.
        top_p: nucleus mass kept when sampling.
        seed: of the request's own generator; the same seed gives the same tokens.
        stop: the answer ends before the first of these texts.
        logprobs: tell the log-probability of every token, and of so many most likely ones; None tells none.
    """

    max_new_tokens: Annotated[int, Ge(1)] = 256
    min_new_tokens: Annotated[int, Ge(0)] = 0
    temperature: Annotated[float, Ge(0)] = 0.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    seed: Annotated[int, Ge(0)] = 0
    stop: tuple[str, ...] = ()
    logprobs: Annotated[int, Ge(0)] | None = None
