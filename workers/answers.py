"""From a sequence that runs to the reply of its request: events, text, stop texts, publishing, facts.

Nothing here decides what is computed. It knows nothing of prompts, admission or loading.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable, Iterable, Iterator

from transport.errors import DeadlineExceeded, RelayError
from transport.types import NodeId, WorkerId
from workers.break_even import Speeds
from workers.messages import Reply, Token, TokenScore
from workers.model import LoadedModel
from workers.publishing import Publishing
from workers.scheduler import Event, FailedEvent, FinishedEvent, Sequence, TokenEvent
from workers.segment import splice
from workers.shadow import EvidenceBox
from workers.stopping import StopText, tokens_before
from workers.tokens import TokenStream
from workers.turn import Turn, build_reply

OnToken = Callable[[Token], None]

_SETTLE_S = 1.0


class Answers:
    """The answers of one worker.

    Args:
        publishing: takes what an answer leaves behind.
        evidence: takes what a shadow check needs; keep_evidence_s: for so long.
        speeds: of the worker, for predictions in replies.
        stop_ids, special_ids: of the model's vocabulary.
    """

    def __init__(
        self,
        worker: WorkerId,
        node: NodeId,
        loaded: LoadedModel,
        publishing: Publishing,
        evidence: EvidenceBox,
        speeds: Speeds,
        *,
        stop_ids: frozenset[int],
        special_ids: frozenset[int],
        keep_evidence_s: float,
    ) -> None:
        self._worker = worker
        self._node = node
        self._loaded = loaded
        self._publishing = publishing
        self._evidence = evidence
        self._speeds = speeds
        self._stop_ids = stop_ids
        self._special_ids = special_ids
        self._keep_evidence_s = keep_evidence_s

    def _events(self, turn: Turn, sequence: Sequence) -> Iterator[Event]:
        """The sequence's events; a failure is raised here, in the caller's thread."""
        while True:
            try:
                # The loop ends the sequence at its deadline, after the step that runs then.
                event = sequence.events.get(timeout=turn.remaining_s + 60)
            except queue.Empty:
                raise DeadlineExceeded(
                    f"request {turn.request.id}: the engine has been silent since its deadline."
                ) from None
            if isinstance(event, FailedEvent):
                if isinstance(event.error, RelayError):
                    raise event.error
                what = f"request {turn.request.id} failed in a step: {event.error!r}"
                raise RelayError(what) from event.error
            yield event
            if isinstance(event, FinishedEvent):
                return

    def answer(self, turn: Turn, sequence: Sequence, on_token: OnToken | None) -> Reply:
        """Follow a turn that decodes to its reply."""
        text, reason = self._decode(turn, sequence, on_token)
        return self.reply(turn, sequence, text, reason)

    def reply(self, turn: Turn, sequence: Sequence, text: str, reason: str) -> Reply:
        """The facts of a sequence that has ended, once its answer is published."""
        # The last pull may have yet to say how it ended: its bytes came before the first token.
        turn.acquired.settle(timeout_s=_SETTLE_S)
        output = splice(
            tuple(sequence.tokens),
            stop_ids=self._stop_ids,
            special_ids=self._special_ids,
            tokenizer=self._loaded.tokenizer,
            finish_reason=reason,
        )
        if turn.request.publish:
            self._publishing.answer(turn, output)
        if sequence.evidence is not None:
            self._evidence.put(
                turn.request.id,
                sequence.evidence,
                now=time.monotonic(),
                keep_s=self._keep_evidence_s,
            )
        return build_reply(
            turn,
            worker=self._worker,
            node=self._node,
            model=self._loaded.name,
            text=text,
            reason=reason,
            output=output,
            output_text=self._spelt(output.token_ids or ()),
            kv_text=self._spelt((output.token_ids or ())[: output.kv_tokens]),
            speeds=self._speeds,
        )

    def _spelt(self, ids: Iterable[int]) -> str:
        return self._loaded.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def wait(self, turn: Turn, sequence: Sequence) -> None:
        """Until the sequence has ended."""
        for event in self._events(turn, sequence):
            if isinstance(event, FinishedEvent):
                return

    def _decode(self, turn: Turn, sequence: Sequence, on_token: OnToken | None) -> tuple[str, str]:
        stream = TokenStream(self._loaded.tokenizer)
        answer = StopText(turn.request.sampling.stop)
        kept = 0
        reason = ""
        for event in self._events(turn, sequence):
            if isinstance(event, FinishedEvent):
                reason = event.reason
                break
            assert isinstance(event, TokenEvent)  # failures are raised in _events
            if answer.found:
                continue  # drawn before the engine knew
            piece = answer.push("" if event.token in self._stop_ids else stream.push(event.token))
            if on_token is not None:
                on_token(self._token(event, piece))
            turn.clock.last_token = event.at
            kept += 1
            if answer.found:
                sequence.enough.set()
            self._publishing.grew(turn, kept)
            if event.first:
                turn.clock.first_token = event.at
                self._publishing.open(turn)
                if turn.request.publish:
                    self._publishing.remember(turn)
        if not answer.found:
            answer.push(stream.finish())
        if answer.found:  # only what comes before the stop text is the answer, and is published
            decode = functools.partial(
                self._loaded.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            del sequence.tokens[tokens_before(sequence.tokens, answer.text, decode, kept - 1) :]
            reason = "stop"
        return answer.text, reason

    def _token(self, event: TokenEvent, piece: str) -> Token:
        if event.scores is None:
            return Token(event.token, piece)
        own, best = event.scores
        alone = self._loaded.tokenizer.decode
        top = tuple(TokenScore(alone([i]), logprob) for i, logprob in best)
        return Token(event.token, piece, TokenScore(alone([event.token]), own), top)
