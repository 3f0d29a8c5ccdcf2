"""When a request passed its stations on this worker, and what its first token waited for.

    submitted -> reserved -> prefill began -> prompt done -> step began -> first token

Readings of ``time.monotonic``, 0 where a station was not passed; only durations leave the worker.
A station that was skipped, as by a prompt that was cached whole, lies where the next one does, so
that the parts always add up to the whole.
"""

from dataclasses import dataclass

from antiphon.request_timing import FailedPrefill, RemotePrefill, RequestTiming


@dataclass(frozen=True, slots=True)
class Handoff:
    """How the KV of a request was got from prefill workers, or was not."""

    remote: RemotePrefill | None = None  # None: none of them delivered
    transfer_seconds: float = 0.0  # from the end of the computing to all KV being here
    failed: tuple[FailedPrefill, ...] = ()


NO_HANDOFF = Handoff()


@dataclass(slots=True)
class Timeline:
    """One request's stations; written on the engine's thread, but for ``submitted_at``."""

    submitted_at: float = 0.0
    reserved_at: float = 0.0
    prefill_began_at: float = 0.0
    prompt_done_at: float = 0.0
    handoff: Handoff = NO_HANDOFF

    def restart(self) -> None:
        """The KV is lost, by preemption, and will be computed here."""
        self.prefill_began_at = self.prompt_done_at = 0.0
        self.handoff = Handoff(failed=self.handoff.failed)

    def computed(self, now: float) -> tuple[float, float]:
        """Seconds in the queue and of computing, of a prompt that is done ``now``."""
        began_at = self.prefill_began_at or now
        return began_at - self.submitted_at, now - began_at

    def timing(self, path: str, step: tuple[float, float], computes_prompt: bool) -> RequestTiming:
        """Account for a first token.

        Args:
            path: Who computed the prompt.
            step: When the step that gave the token began and ended.
            computes_prompt: Whether that step also computed the end of the prompt.
        """
        step_began_at, now = step
        reserved_at = self.reserved_at or self.submitted_at
        done_at = now if computes_prompt else self.prompt_done_at or reserved_at
        transfer = prefill = 0.0
        if (remote := self.handoff.remote) is not None:
            transfer, prefill = self.handoff.transfer_seconds, remote.compute
        elif self.prefill_began_at:
            prefill = done_at - self.prefill_began_at
        return RequestTiming(
            prefill_path=path,
            queue=reserved_at - self.submitted_at,
            prefill_queue=done_at - reserved_at - prefill - transfer,
            prefill=prefill,
            transfer=transfer,
            decode_queue=0.0 if computes_prompt else step_began_at - done_at,
            first_step=0.0 if computes_prompt else now - step_began_at,
            remote=remote,
            failed=self.handoff.failed,
        )
