"""What an engine has counted and measured since its start."""

from dataclasses import dataclass, field

from antiphon.metrics import Buckets
from antiphon.workers.batch import Batch

_RATE_SMOOTHING = 0.2  # weight of the newest step in the measured rates
_MIN_RATED_TOKENS = 32  # the fixed cost of a step hides the rate of smaller ones


@dataclass(slots=True)
class EngineStats:
    """Written on the engine's thread; read from any."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed here
    num_cached_tokens: int = 0  # of prompts, found in the prefix cache
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    step_failures: int = 0
    step_failures_in_a_row: int = 0
    num_graph_steps: int = 0  # replayed from a captured graph
    step_seconds: Buckets = field(default_factory=Buckets)  # by kind: decode, mixed, prefill
    prefill_tokens_per_second: float = 0.0  # smoothed
    decode_step_seconds: float = 0.0  # smoothed

    def record(self, batch: Batch, seconds: float) -> tuple[int, int]:
        """Count a step that succeeded.

        Returns:
            Its decode steps, and its prompt tokens.
        """
        num_sampled = sum(chunk.samples for chunk in batch.chunks)
        num_decoding = sum(chunk.samples and chunk.num_tokens == 1 for chunk in batch.chunks)
        num_prompt = sum(chunk.num_tokens for chunk in batch.chunks) - num_decoding
        self.num_steps += 1
        self.step_failures_in_a_row = 0
        self.num_generated_tokens += num_sampled
        self.num_prompt_tokens += num_prompt
        kind = ("mixed" if num_decoding else "prefill") if num_prompt else "decode"
        self.step_seconds.observe(seconds, kind)
        if num_prompt == 0:
            self.decode_step_seconds = _smoothed(self.decode_step_seconds, seconds)
        elif num_prompt >= max(_MIN_RATED_TOKENS, 8 * num_sampled):
            rate = num_prompt / seconds
            self.prefill_tokens_per_second = _smoothed(self.prefill_tokens_per_second, rate)
        return num_decoding, num_prompt

    def fail(self) -> None:
        """Count a step that failed."""
        self.step_failures += 1
        self.step_failures_in_a_row += 1


def _smoothed(old: float, new: float) -> float:
    return new if old == 0 else old + _RATE_SMOOTHING * (new - old)
