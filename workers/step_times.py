"""What steps take on this worker, learned from its steps, and how much prompt fits beside streams.

    seconds = base + per stream x streams + per prompt token x prompt tokens

The first two terms are a regression over steps without prompt tokens, weighted towards the newest
and drawn to a fixed slope until batches of different sizes were seen. The third is what a prompt
token adds to a step with streams: more than in a large chunk, where weights are read once for many.

A limit on the prompt part of a step keeps running streams within their target (Sarathi-Serve,
arXiv:2403.02310, with the budget derived from measurements). Without a target nothing is limited.

Pure: time is an argument.
"""

import math

_NEWEST_WEIGHT = 0.05  # of a step in the regression: it forgets in a few dozen
_PROMPT_WEIGHT = 0.2
# Slope that stands until measured, as a share of the base: 0.12 up to 8 streams and 0.09 up to 32
# for 30 layers of 576 on a CPU core. It weighs as much as a variance of one stream squared.
_PRIOR_SLOPE = 0.1
_PRIOR_WEIGHT = 1.0
# A step aims below the target, because what it takes varies by about as much.
_TARGET_SHARE = 0.9
# Below this a prompt would hardly move on, and the fixed cost of its attention is the whole step.
_MIN_PROMPT_TOKENS = 16
_RECENT_SECONDS = 5.0


class StepTimes:
    """Learns from ``record``; one engine's, on its thread.

    Args:
        target_seconds: Between two tokens of a stream; None limits nothing.
    """

    def __init__(self, target_seconds: float | None = None) -> None:
        self._target_seconds = target_seconds
        self._mean_streams = 0.0
        self._mean_seconds = 0.0  # 0: no step without prompt tokens yet
        self._variance = 0.0
        self._covariance = 0.0
        self._prompt_token_seconds = 0.0  # 0: not measured yet
        self._is_marginal = False  # measured beside streams, not in a step of its own
        self._share = 0.0
        self._share_at = 0.0

    @property
    def stream_seconds(self) -> float:
        """What each stream adds to a decode step; 0 before the first one."""
        prior = _PRIOR_SLOPE * self._mean_seconds / (1 + _PRIOR_SLOPE * self._mean_streams)
        covariance = self._covariance + _PRIOR_WEIGHT * prior
        slope = covariance / (self._variance + _PRIOR_WEIGHT)
        return min(max(slope, 0.0), self._mean_seconds / max(self._mean_streams, 1.0))

    @property
    def base_seconds(self) -> float:
        """A decode step's part that does not depend on its streams; 0 before the first one."""
        return self._mean_seconds - self.stream_seconds * self._mean_streams

    def decode_seconds(self, num_streams: int) -> float:
        """Predict a step without prompt tokens; 0 before the first one."""
        return self.base_seconds + self.stream_seconds * num_streams

    def record(self, num_streams: int, num_prompt_tokens: int, seconds: float, now: float) -> None:
        """Learn from a step that ended ``now``."""
        prompt_seconds = 0.0
        if num_prompt_tokens == 0:
            self._regress(num_streams, seconds)
        elif num_streams and not self._mean_seconds and self._prompt_token_seconds:
            # A worker that never runs out of prompts: what they leave of the step is a first guess.
            prompt_seconds = min(num_prompt_tokens * self._prompt_token_seconds, 0.9 * seconds)
            self._regress(num_streams, seconds - prompt_seconds)
        else:
            decode = self.decode_seconds(num_streams) if num_streams else 0.0
            prompt_seconds = max(seconds - decode, 0.0)
            self._record_prompt(num_streams, prompt_seconds / num_prompt_tokens)
        self._decay_share(now - seconds)
        kept = math.exp(-seconds / _RECENT_SECONDS)
        self._share = kept * self._share + (1 - kept) * min(prompt_seconds / seconds, 1.0)
        self._share_at = now

    def prompt_limit(self, num_streams: int) -> int | None:
        """Prompt tokens that a step beside ``num_streams`` may have; None: as many as it likes."""
        is_known = self._mean_seconds and self._prompt_token_seconds
        if self._target_seconds is None or not num_streams or not is_known:
            return None
        room = _TARGET_SHARE * self._target_seconds - self.decode_seconds(num_streams)
        return max(int(room / self._prompt_token_seconds), _MIN_PROMPT_TOKENS)

    def prompt_step(self, num_streams: int, max_batch_tokens: int) -> tuple[int, float]:
        """Prompt tokens that fit beside ``num_streams``, and the seconds of such a step.

        Without streams, what one would leave. Both are 0 before there was anything to predict from.
        """
        if not self._mean_seconds or not self._prompt_token_seconds:
            return 0, 0.0
        num_streams = max(num_streams, 1)
        limit = self.prompt_limit(num_streams)
        budget = max(max_batch_tokens - num_streams, 1)
        tokens = budget if limit is None else min(budget, limit)
        return tokens, self.decode_seconds(num_streams) + tokens * self._prompt_token_seconds

    def prompt_share(self, now: float) -> float:
        """Share of the last seconds that went to prompt tokens, between 0 and 1."""
        self._decay_share(now)
        return self._share

    def _regress(self, num_streams: int, seconds: float) -> None:
        if not self._mean_seconds:
            self._mean_streams, self._mean_seconds = float(num_streams), seconds
            return
        streams_off = num_streams - self._mean_streams
        seconds_off = seconds - self._mean_seconds
        weight = _NEWEST_WEIGHT
        self._variance = (1 - weight) * (self._variance + weight * streams_off**2)
        self._covariance = (1 - weight) * (self._covariance + weight * streams_off * seconds_off)
        self._mean_streams += weight * streams_off
        self._mean_seconds += weight * seconds_off

    def _record_prompt(self, num_streams: int, token_seconds: float) -> None:
        """Keep what was measured beside streams over what was measured without."""
        if num_streams == 0 and self._is_marginal:
            return
        is_first = self._prompt_token_seconds == 0 or (num_streams and not self._is_marginal)
        weight = 1.0 if is_first else _PROMPT_WEIGHT
        self._prompt_token_seconds += weight * (token_seconds - self._prompt_token_seconds)
        self._is_marginal = num_streams > 0

    def _decay_share(self, now: float) -> None:
        if now > self._share_at:
            self._share *= math.exp((self._share_at - now) / _RECENT_SECONDS)
            self._share_at = now
