"""Predictions where there are targets: how prompts and running streams slow each other down.

An engine with a target between tokens gives prompts what its streams leave of a step. So a prompt
beside streams takes longer than its tokens alone would, and while it lasts the streams get their
tokens as late as the target allows. Workers report both: a step full of prompt, and its tokens.

    prompt     tokens x seconds of a full step / prompt tokens of a full step
    stream     step / (1 - recent share of prompts), drawn to a full step by prompts in the queue

A full step is the longest, where prompts may wait. On a prefill worker they may not: the prompts
that it computes are for streams elsewhere.
"""

import math

from antiphon.messages import Load, Role, WorkerCard
from antiphon.router.cost_model import CostModel, CostParameters

# A prompt that takes as long beside streams counts as if it lasted: it is most of what an output of
# a few dozen tokens meets. Shorter ones count in proportion.
_LASTING_SECONDS = 3.0
# From KV in place to the first token: half of the step in progress, and one of its own.
_FIRST_STEPS = 1.5
_MAX_PROMPT_SHARE = 0.99
# Where a full step is below this share of the target, prompts cannot break it (an engine that cuts
# them to fit aims for 0.9), and only have to be shared out by the time to the first token.
_HARMLESS_SHARE = 0.95


class TargetCostModel(CostModel):
    """The terms of a prediction, with what targets change about them.

    Args:
        parameters: Constants.
        target_itl_seconds: Between the tokens of a stream, if there is such a target.
    """

    def __init__(self, parameters: CostParameters, target_itl_seconds: float | None = None) -> None:
        super().__init__(parameters)
        self._harmless_seconds = _HARMLESS_SHARE * (target_itl_seconds or math.inf)

    def prefill_seconds(self, load: Load, num_queued_tokens: int, num_tokens: int) -> float:
        """See ``CostModel``; longer beside streams."""
        if not load.num_decoding or not load.prompt_gap_tokens:
            return super().prefill_seconds(load, num_queued_tokens, num_tokens)
        num_steps = (num_queued_tokens + num_tokens) / load.prompt_gap_tokens
        return num_steps * load.prompt_gap_seconds

    def wait_seconds(self, load: Load, num_streams: int) -> float:
        """See ``CostModel``; steps are as long as prompts make them."""
        gap = self._recent_gap_seconds(load, max(load.num_decoding, 1))
        return gap * (_FIRST_STEPS + load.num_waiting)

    def stall_seconds(self, load: Load, num_tokens: int) -> float:
        """Nothing: what streams pay is held against their target instead."""
        return 0.0

    def step_seconds(self, load: Load, num_streams: int) -> float:
        """Predict a step without prompt tokens."""
        if load.decode_base_seconds:
            return load.decode_base_seconds + load.decode_stream_seconds * num_streams
        step = load.decode_step_seconds or self.parameters.default_decode_step_seconds
        return step * (1 + self.parameters.stream_slowdown * num_streams)

    def at_stake_seconds(
        self, card: WorkerCard, load: Load, num_streams: int, num_prompt_tokens: int
    ) -> float:
        """The time between tokens to hold against the target; see ``intertoken_seconds``.

        A worker that generates for others keeps prompts within the target as far as it can.
        """
        step = self.step_seconds(load, num_streams)
        is_known = card.role is not Role.PREFILL and load.prompt_gap_seconds > 0
        if is_known and max(step, load.prompt_gap_seconds) <= self._harmless_seconds:
            return step
        return self.intertoken_seconds(card, load, num_streams, num_prompt_tokens)

    def intertoken_seconds(
        self, card: WorkerCard, load: Load, num_streams: int, num_prompt_tokens: int
    ) -> float:
        """Predict the time between tokens on a worker with ``num_streams`` on it.

        Args:
            card: Of the worker.
            load: Its last.
            num_streams: Those that it has and will have then.
            num_prompt_tokens: That it will compute beside them, its queue included.
        """
        if card.role is Role.PREFILL:
            return self._busy_gap_seconds(load, num_streams)
        gap = self._recent_gap_seconds(load, num_streams)
        if num_streams <= 1 or not num_prompt_tokens:
            return gap  # nobody is there to be held up, or nothing holds up
        lasting = self.prefill_seconds(load, 0, num_prompt_tokens) / _LASTING_SECONDS
        return gap + min(lasting, 1.0) * max(load.prompt_gap_seconds - gap, 0.0)

    def _recent_gap_seconds(self, load: Load, num_streams: int) -> float:
        """The time between tokens if prompts go on as of late; never beyond a full step."""
        longest = max(load.prompt_gap_seconds, self.step_seconds(load, num_streams))
        return min(self._busy_gap_seconds(load, num_streams), longest)

    def _busy_gap_seconds(self, load: Load, num_streams: int) -> float:
        share = min(load.prompt_share, _MAX_PROMPT_SHARE)
        return self.step_seconds(load, num_streams) / (1 - share)
