"""What a worker checks of a request before its engine sees it.

The requests of a step share their fate: one token id outside the vocabulary would fail the step of
all others. An ingress checks the same for the sake of its clients; a worker relies on no client.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.messages import SamplingParams

_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds of one worker and its model."""

    max_context_tokens: int
    vocab_size: int

    def explain_prompt(self, token_ids: Sequence[int]) -> str | None:
        """Say why a prompt cannot be computed here; None if it can."""
        if len(token_ids) > self.max_context_tokens:
            return (
                f"{len(token_ids)} prompt tokens exceed this worker's context of "
                f"{self.max_context_tokens}"
            )
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            return f"a token id of the prompt is outside the vocabulary of {self.vocab_size}"
        return None

    def explain_generation(self, token_ids: Sequence[int], sampling: SamplingParams) -> str | None:
        """Say why a request cannot be generated from here; None if it can."""
        num_prompt, max_tokens = len(token_ids), sampling.max_tokens
        if num_prompt < 1 or max_tokens < 1:
            return (
                f"a request needs a prompt and max_tokens >= 1, got {num_prompt} and {max_tokens}"
            )
        if num_prompt + max_tokens > self.max_context_tokens:
            return (
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed "
                f"this worker's context of {self.max_context_tokens}"
            )
        return self.explain_prompt(token_ids) or _explain_sampling(sampling)


def _explain_sampling(sampling: SamplingParams) -> str | None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        return f"temperature: must be at least 0, got {sampling.temperature}"
    if not 0 <= sampling.top_p <= 1:
        return f"top_p: must be between 0 and 1, got {sampling.top_p}"
    if not -_SEED_LIMIT <= sampling.seed < _SEED_LIMIT:
        return f"seed: must fit 64 bits, got {sampling.seed}"
    return None
