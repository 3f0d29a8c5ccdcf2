"""One request across the workers that it may need: what it has so far, and where it may go next.

    choose -> attempt -> outputs ... finish
      ^         | busy      another worker, three in all; an answer that has begun waits for room
      |         | draining  another worker
      +---------| lost      another worker, with prompt + tokens so far     (a replay)
                | moved     the same, but nobody failed: it does not count against max_replays

Each worker is asked once until the first token, of this choice or of another one of its request:
the answer has begun. From then on it may return to one that was busy or lost, so three bounds end
it: losses are counted, a worker that stops is asked once, and a third refusal is the last one when
the client has waited for ``replay_wait_seconds``.

A replay continues exactly: a token depends on the tokens before it and, if sampled, on a hash of
the seed and its position, and the ingress fixes the seed before the first attempt. Where a wire or
a cache rounds KV, that of the output is rounded otherwise from then on, and close calls may fall
otherwise too. The client sees a pause. What it is told of the request (cached tokens, time to the
first token) stays what the first worker said; the usage counts the prompt that the client sent.

Nothing here waits or knows workers: the backend asks ``may_wait`` and passes the time.
"""

import math
from dataclasses import dataclass, field

from msgspec.structs import replace

from antiphon.config import RouterConfig
from antiphon.deployment.backend import REST_OF_CONTEXT
from antiphon.deployment.shared_answer import SharedAnswer
from antiphon.errors import (
    AntiphonError,
    CapacityError,
    RequestError,
    WorkerDrainingError,
    WorkerLostError,
    WorkerMovedError,
)
from antiphon.messages import RequestOutput, SamplingParams

MAX_REFUSALS = 3  # workers that say busy, before the client is told so
# A stream may return to a worker whose session broke, if that worker lives: it may be the only one.
LOST_SECONDS = 1.0


@dataclass(slots=True)
class Replay:
    """The state of one choice in the ingress; to the workers it is a request.

    Args:
        original_prompt: As the client sent it.
        original_sampling: With a fixed seed; ``REST_OF_CONTEXT`` is replaced by ``fit``.
        config: Its bounds.
        answer: That it is a part of.
    """

    original_prompt: list[int]
    original_sampling: SamplingParams
    config: RouterConfig
    answer: SharedAnswer = field(default_factory=SharedAnswer)
    output_token_ids: list[int] = field(default_factory=list)
    num_replays: int = 0
    _num_refusals: int = 0
    _num_failures: int = 0
    _num_cached_tokens: int = 0
    _excluded: dict[str, float] = field(default_factory=dict)  # by incarnation, until when
    _last_error: AntiphonError | None = None
    _paused_at: float | None = None
    _losses: list[str] = field(default_factory=list)
    _may_fill_context: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note whether the client left open how long the answer may get."""
        self._may_fill_context = self.original_sampling.max_tokens == REST_OF_CONTEXT

    @property
    def has_begun(self) -> bool:
        """Whether it has tokens already."""
        return bool(self.output_token_ids)

    @property
    def prompt_token_ids(self) -> list[int]:
        """What the next worker has to continue; the client's own list before the first token."""
        if not self.has_begun:
            return self.original_prompt
        return self.original_prompt + self.output_token_ids

    @property
    def sampling(self) -> SamplingParams:
        """How it has to continue it."""
        num_left = self.original_sampling.max_tokens - len(self.output_token_ids)
        return replace(self.original_sampling, max_tokens=num_left)

    @property
    def finish_reason(self) -> str | None:
        """Why nothing is left to do, though no worker lived to say so."""
        if not self.output_token_ids:
            return None
        if self.output_token_ids[-1] in self.original_sampling.stop_token_ids:
            return "stop"
        has_all = len(self.output_token_ids) >= self.original_sampling.max_tokens
        return "length" if has_all else None

    @property
    def was_turned_away(self) -> bool:
        """Whether the last worker is stopping, and gave the request back."""
        return isinstance(self._last_error, (WorkerDrainingError, WorkerMovedError))

    def fit(self, max_context_tokens: int) -> None:
        """Let an answer without a limit fill this context; once it has begun its limit stays."""
        if self._may_fill_context and not self.has_begun:
            # A prompt without room is the worker's to refuse.
            room = max(1, max_context_tokens - len(self.original_prompt))
            self.original_sampling = replace(self.original_sampling, max_tokens=room)

    def excluded(self, now: float) -> set[str]:
        """Incarnations that must not be asked now."""
        if not self.answer.has_begun:
            return set(self._excluded)
        return {incarnation for incarnation, until in self._excluded.items() if now < until}

    def take(self, output: RequestOutput) -> RequestOutput:
        """Record an output; return it as the client should see it."""
        if not self.has_begun:
            self._num_cached_tokens = output.num_cached_tokens
        else:
            output = replace(output, num_cached_tokens=self._num_cached_tokens, timing=None)
        self.output_token_ids += output.token_ids
        self.answer.has_begun = True
        self._paused_at = None
        self._num_refusals = 0
        return output

    def failed(self, incarnation: str, error: AntiphonError, now: float) -> None:
        """Record that an attempt ended with an error.

        Raises:
            AntiphonError: The same error, if it is the client's to see.
        """
        self._num_failures += 1
        if isinstance(error, RequestError) and self._num_failures == 1:
            raise error  # later, it may be that a worker with a smaller context was asked
        self._last_error = error
        self._excluded[incarnation] = math.inf
        was_queued = isinstance(error, WorkerLostError) and not self.has_begun  # perhaps for long
        if self.answer.has_begun and (self._paused_at is None or was_queued):
            self._paused_at = now
        if isinstance(error, WorkerLostError):
            self._losses.append(replay_reason(error))
            if not isinstance(error, WorkerMovedError):
                self._count_loss(incarnation, error, now)
        elif isinstance(error, CapacityError) and not isinstance(error, WorkerDrainingError):
            self._count_refusal(incarnation, error, now)

    def settle(self) -> list[str]:
        """Return what befell its workers since the last call; each is to be counted once."""
        losses, self._losses = self._losses, []
        return losses

    def wait_or_raise(self, error: CapacityError, now: float) -> None:
        """Return if the request may wait for a worker, of which there is none now.

        Raises:
            AntiphonError: It may not, or waited long enough; what the client should be told.
        """
        if self.answer.has_begun and self._paused_at is None:  # its turn has come, and no worker
            self._paused_at = now
        if self._may_pause(now):
            return
        if isinstance(self._last_error, CapacityError):
            raise self._last_error
        raise error  # whatever it lost, it may go on: it found no place

    def _count_loss(self, incarnation: str, error: WorkerLostError, now: float) -> None:
        self._excluded[incarnation] = now + LOST_SECONDS
        self.num_replays += 1
        if self.num_replays > self.config.max_replays:
            raise error

    def _count_refusal(self, incarnation: str, error: CapacityError, now: float) -> None:
        self._excluded[incarnation] = now + error.retry_after_seconds
        self._num_refusals += 1
        # ``wait_or_raise`` alone is no bound: where a refusal takes longer than the exclusion that
        # follows it, there is always another worker to ask.
        if self._num_refusals >= MAX_REFUSALS and not self._may_pause(now):
            raise error

    def _may_pause(self, now: float) -> bool:
        """Whether its answer has begun, and the client can be kept waiting."""
        paused_at = self._paused_at
        return paused_at is not None and now - paused_at < self.config.replay_wait_seconds


def replay_reason(error: AntiphonError) -> str:
    """Name what happened to a request's worker; a metric's label."""
    if isinstance(error, WorkerMovedError):
        return "moved"
    if isinstance(error, WorkerLostError):
        return "lost"
    if isinstance(error, WorkerDrainingError):
        return "draining"
    return "busy" if isinstance(error, CapacityError) else "invalid"
