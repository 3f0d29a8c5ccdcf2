"""What steps take on this worker, learned from its steps, and how much prompt they may hold.

    without prompt tokens   seconds = base + slope x streams
    with prompt tokens      seconds = base + slope x (streams + prompt tokens)

Each is a regression, weighted towards the newest steps and drawn to a prior slope until batches of
different sizes were seen. A step that takes much longer than predicted counts as twice the
prediction: machines pause, and one pause of a second would be believed for a hundred steps.

A limit on the prompt part of a step keeps running streams within their target (Sarathi-Serve,
arXiv:2403.02310, with the budget derived from measurements). Without a target nothing is limited.

Pure: time is an argument.
"""

import math

_NEWEST_WEIGHT = 0.05  # of a step in a regression: it forgets in a few dozen
_MAX_SURPRISE = 2.0
# Slope of decode steps until measured, as a share of the base: 0.12 up to 8 streams and 0.09 up to
# 32 for 30 layers of 576 on a CPU core. It weighs as much as a variance of one stream squared.
_PRIOR_SLOPE = 0.1
_PRIOR_VARIANCE = 1.0
# Steps with prompt tokens differ by dozens of tokens, and cost a CPU half a decode step to begin.
_PRIOR_PROMPT_SLOPE = 0.02
_PRIOR_PROMPT_VARIANCE = 64.0
# A step aims below the target, because what it takes varies by about as much.
_TARGET_SHARE = 0.9
# Below this a prompt would hardly move on, and the fixed cost of its step is most of the work: on
# one CPU core 70 ms, as much as 25 tokens.
_MIN_PROMPT_TOKENS = 32
_RECENT_SECONDS = 5.0


class _Line:
    """Seconds as a linear function of a size, by decayed least squares."""

    def __init__(self, prior_slope: float, prior_variance: float) -> None:
        self._prior_slope = prior_slope  # as a share of the base
        self._prior_variance = prior_variance
        self._num_samples = 0
        self._mean_size = 0.0
        self._mean_seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    @property
    def is_known(self) -> bool:
        return self._num_samples > 0

    @property
    def slope(self) -> float:
        prior = self._prior_slope * self._mean_seconds / (1 + self._prior_slope * self._mean_size)
        covariance = self._covariance + self._prior_variance * prior
        slope = covariance / (self._variance + self._prior_variance)
        return min(max(slope, 0.0), self._mean_seconds / max(self._mean_size, 1.0))

    @property
    def base(self) -> float:
        return self._mean_seconds - self.slope * self._mean_size

    def at(self, size: float) -> float:
        return self._mean_seconds + self.slope * (size - self._mean_size)

    def learn(self, size: float, seconds: float) -> None:
        if self._num_samples:
            seconds = min(seconds, _MAX_SURPRISE * self.at(size))
        self._num_samples += 1
        weight = max(1 / self._num_samples, _NEWEST_WEIGHT)
        size_off, seconds_off = size - self._mean_size, seconds - self._mean_seconds
        self._variance = (1 - weight) * (self._variance + weight * size_off**2)
        self._covariance = (1 - weight) * (self._covariance + weight * size_off * seconds_off)
        self._mean_size += weight * size_off
        self._mean_seconds += weight * seconds_off


class StepTimes:
    """Learns from ``record``; one engine's, on its thread.

    Args:
        target_seconds: Between two tokens of a stream; None limits nothing.
        max_batch_tokens: Of a step.
    """

    def __init__(self, target_seconds: float | None = None, max_batch_tokens: int = 512) -> None:
        self._target_seconds = target_seconds
        self._max_batch_tokens = max_batch_tokens
        self._decode = _Line(_PRIOR_SLOPE, _PRIOR_VARIANCE)
        self._mixed = _Line(_PRIOR_PROMPT_SLOPE, _PRIOR_PROMPT_VARIANCE)
        self._share = 0.0
        self._share_at = 0.0

    @property
    def stream_seconds(self) -> float:
        """What each stream adds to a decode step; 0 before the first one."""
        return self._decode.slope

    @property
    def base_seconds(self) -> float:
        """A decode step's part that does not depend on its streams; 0 before the first one."""
        return self._decode.base

    def decode_seconds(self, num_streams: int) -> float:
        """Predict a step without prompt tokens; 0 before the first one."""
        return self._decode.at(num_streams)

    def record(self, num_streams: int, num_prompt_tokens: int, seconds: float, now: float) -> None:
        """Learn from a step that ended ``now``."""
        prompt_seconds = 0.0
        if num_prompt_tokens == 0:
            self._decode.learn(num_streams, seconds)
        else:
            if num_streams and self._mixed.is_known and not self._decode.is_known:
                # A worker that never runs out of prompts: a first guess.
                self._decode.learn(num_streams, min(self._mixed.at(num_streams), 0.9 * seconds))
            self._mixed.learn(num_streams + num_prompt_tokens, seconds)
            decode = self.decode_seconds(num_streams) if num_streams else 0.0
            prompt_seconds = max(seconds - decode, 0.0)
        self._decay_share(now - seconds)
        kept = math.exp(-seconds / _RECENT_SECONDS)
        self._share = kept * self._share + (1 - kept) * min(prompt_seconds / seconds, 1.0)
        self._share_at = now

    def prompt_limit(self, num_streams: int) -> int | None:
        """Prompt tokens that a step beside ``num_streams`` may have; None: as many as it likes."""
        is_known = self._decode.is_known and self._mixed.is_known
        if self._target_seconds is None or not num_streams or not is_known:
            return None
        room = _TARGET_SHARE * self._target_seconds - self._mixed.at(num_streams)
        return max(int(room / max(self._mixed.slope, 1e-9)), _MIN_PROMPT_TOKENS)

    def prompt_step(self, num_streams: int) -> tuple[int, float]:
        """Prompt tokens that fit beside ``num_streams``, and the seconds of such a step.

        Without streams, what one would leave. Both are 0 before there was anything to predict from.
        """
        if not self._decode.is_known or not self._mixed.is_known:
            return 0, 0.0
        num_streams = max(num_streams, 1)
        limit = self.prompt_limit(num_streams)
        budget = max(self._max_batch_tokens - num_streams, 1)
        tokens = budget if limit is None else min(budget, limit)
        seconds = self._mixed.at(num_streams + tokens)
        return tokens, max(seconds, self.decode_seconds(num_streams))

    def prompt_share(self, now: float) -> float:
        """Share of the last seconds that went to prompt tokens, between 0 and 1."""
        self._decay_share(now)
        return self._share

    def _decay_share(self, now: float) -> None:
        if now > self._share_at:
            self._share *= math.exp((self._share_at - now) / _RECENT_SECONDS)
            self._share_at = now
