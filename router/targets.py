"""Whether a choice strains the targets, and which other one to take if it does.

The *strain* of a choice is the larger of its two ratios, predicted over wanted: time to the first
token, time between tokens. A request leaves the choice that the policy makes without targets only
if that comes close to a target, and only for one of less strain; where both are within what
predictions can promise, only for one that is clearly quicker to the first token.
"""

from collections.abc import Iterable
from typing import NamedTuple

from antiphon.config import RouterConfig

# Shares of a target up to which nobody asks for another choice. Queues move more than steps do: a
# burst doubles what was predicted just before it, while streams come and go one by one. Both are
# low because what is not shared out in time cannot be later: streams stay where they began.
_SAFE_TTFT_SHARE = 0.3
_SAFE_ITL_SHARE = 0.5
# Strains closer than this are equal.
_CLEARLY_LESS = 0.98
# To leave without less strain, for the time to the first token alone, takes more: predictions of
# it are no more exact than a tenth.
_CLEARLY_QUICKER = 0.9


class Predicted(NamedTuple):
    """What a choice is predicted to give, seconds."""

    ttft_seconds: float
    itl_seconds: float


class Targets:
    """The configured targets; without any, nothing ever strains."""

    def __init__(self, config: RouterConfig) -> None:
        self.are_set = (config.target_ttft_seconds or config.target_itl_seconds) is not None
        # Prefill workers prepare for streams (CUDA graphs, prompts cut to what streams leave) only
        # under a target between tokens; and without one nothing here sees what streams suffer.
        self.let_prefill_generate = config.target_itl_seconds is not None
        self._ttft_seconds = config.target_ttft_seconds or float("inf")
        self._itl_seconds = config.target_itl_seconds or float("inf")

    def are_safe(self, predicted: Predicted) -> bool:
        """Whether a choice is far enough within both targets."""
        return (
            predicted.ttft_seconds <= _SAFE_TTFT_SHARE * self._ttft_seconds
            and predicted.itl_seconds <= _SAFE_ITL_SHARE * self._itl_seconds
        )

    def better(self, chosen: Predicted, others: Iterable[Predicted]) -> int | None:
        """The index of the one among ``others`` to take instead, or None to keep ``chosen``."""
        ranked = [
            (self._strain(other), other.ttft_seconds, index) for index, other in enumerate(others)
        ]
        if not ranked:
            return None
        strain, seconds, index = min(ranked)
        limit = self._strain(chosen)
        is_better = strain < _CLEARLY_LESS * limit
        is_quicker = strain <= limit and seconds < _CLEARLY_QUICKER * chosen.ttft_seconds
        return index if is_better or is_quicker else None

    def _strain(self, predicted: Predicted) -> float:
        """At least the safe share: below it, choices differ in their time to the first token."""
        ttft = predicted.ttft_seconds / self._ttft_seconds
        itl = predicted.itl_seconds / self._itl_seconds
        return max(ttft, itl, _SAFE_ITL_SHARE)
