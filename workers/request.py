"""One request's state on one worker.

          +--------------- preempted (recompute) --------------+
          v                                                    |
add -> WAITING --admit--> RUNNING ----------------------> FINISHED
          |                  ^   |                            ^
          |            kv_arrived +--- prompt done, a --> SENDING --abort
          +--admit--> AWAITING_KV      transfer is open
"""

import enum
from dataclasses import dataclass, field

from antiphon.block_hash import BlockHash, hash_blocks
from antiphon.messages import SamplingParams
from antiphon.workers.block_pool import BlockId
from antiphon.workers.timeline import Timeline


class RequestStatus(enum.Enum):
    """Where a request stands; see the diagram above."""

    WAITING = enum.auto()  # holds no blocks
    AWAITING_KV = enum.auto()  # holds blocks for its whole prompt, which a prefill worker fills
    RUNNING = enum.auto()  # computes in every step that has budget for it
    SENDING = enum.auto()  # computes no more; its blocks are still being read by a transfer
    FINISHED = enum.auto()


class PrefillPath(enum.StrEnum):
    """Who computed the prompt."""

    LOCAL = "local"
    REMOTE = "remote"
    FALLBACK = "fallback"  # remote was tried and failed


@dataclass(slots=True, eq=False)
class Request:
    """Tokens with KV so far. Only the scheduler mutates a request.

    ``sampling`` is None for a prefill-only request: its prompt is computed and sent, never sampled.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams | None
    path: PrefillPath = PrefillPath.LOCAL
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose KV is in the cache
    num_cached_tokens: int = 0  # of those, found in the prefix cache before a preemption
    block_table: list[BlockId] = field(default_factory=list)
    num_published_blocks: int = 0
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_preemptions: int = 0
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def is_prefill_only(self) -> bool:
        """Whether the request is here for its KV alone."""
        return self.sampling is None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 in steady decode."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether one more token completes what is known, so that the step samples."""
        return self.sampling is not None and self.num_remaining_tokens == 1

    @property
    def finish_reason(self) -> str | None:
        """Why the output ends with its last token, or None if it goes on."""
        if self.sampling is None or not self.output_token_ids:
            return None
        if self.output_token_ids[-1] in self.sampling.stop_token_ids:
            return "stop"
        if len(self.output_token_ids) >= self.sampling.max_tokens:
            return "length"
        return None

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions ``[start, end)`` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        head = self.prompt_token_ids[start:] if start < num_prompt else []
        return head + self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt]

    def extend_hashes(self, num_blocks: int, block_size: int) -> None:
        """Hash blocks up to ``num_blocks``, continuing the chain."""
        have = len(self.block_hashes)
        if num_blocks > have:
            parent = self.block_hashes[-1] if have else b""
            tokens = self.tokens(have * block_size, num_blocks * block_size)
            self.block_hashes += hash_blocks(tokens, block_size, parent)
