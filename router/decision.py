"""What the policy decided for one attempt at a prompt, and why."""

from dataclasses import dataclass, field
from enum import StrEnum

from antiphon.messages import WorkerCard
from antiphon.router.prompt import HashedPrompt


class Reason(StrEnum):
    """Why a prompt is computed where it is; fit for a metric's label."""

    REMOTE = "remote"  # on the prefill worker
    SHORT = "short"  # on the decode worker, which lacks few tokens
    COLOCATED = "colocated"
    NO_PREFILL = "no_prefill"  # on the decode worker, for want of a prefill worker
    DECODE_ALONE = "decode_alone"  # on the decode worker, because a target would be missed
    PREFILL_ALONE = "prefill_alone"  # as is the output, because a target would be missed


@dataclass(frozen=True, slots=True)
class Decision:
    """The workers chosen for one attempt at a prompt."""

    decision_id: int
    decode: WorkerCard
    prefill: WorkerCard | None  # None: the decode worker computes the prompt
    predicted_ttft_seconds: float
    num_cached_tokens_decode: int
    num_cached_tokens_prefill: int
    reason: Reason
    decided_at: float
    prompt: HashedPrompt = field(repr=False)
    alternates: tuple[WorkerCard, ...] = ()  # for ``prefill``, should it fail; best first
