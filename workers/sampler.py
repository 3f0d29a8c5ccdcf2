"""Choosing the next token from logits.

Randomness is a pure function of (seed, position): one uniform number per token, by hash. So a
request that is preempted, moved to another worker or recomputed draws what it would have drawn.
Truncation follows the usual order: temperature, then top-k, then top-p.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from antiphon.messages import SamplingParams

# Most of the mass lies in few tokens: look for the nucleus there before sorting the vocabulary.
_NUCLEUS_CANDIDATES = 1024
# Below it float32 scores overflow to NaN; every draw is greedy long before that.
_MIN_TEMPERATURE = 1e-6


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw one token for each row.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype.
        params: One for each row.
        positions: Index of the token to draw within its request, prompt included.

    Returns:
        ``num_rows`` token ids.
    """
    greedy = logits.argmax(dim=-1).tolist()
    return [
        token if one.temperature == 0 else _draw(row, one, uniform(one.seed, position))
        for token, row, one, position in zip(greedy, logits, params, positions, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that belongs to a position of a seeded stream."""
    message = struct.pack("<qQ", seed, position)
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draw(logits: Tensor, params: SamplingParams, u: float) -> int:
    scores = logits.float() / max(params.temperature, _MIN_TEMPERATURE)
    probs, token_ids = _truncate(scores, params)
    cumulative = probs.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    index = min(index, len(probs) - 1)
    return int(token_ids[index]) if token_ids is not None else index


def _truncate(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Return the kept tokens' probabilities (unnormalised), and their ids if not all are kept."""
    vocab_size = scores.shape[0]
    token_ids = None
    if 0 < params.top_k < vocab_size:
        scores, token_ids = scores.topk(params.top_k)
    probs = scores.softmax(0)
    if params.top_p >= 1:
        return probs, token_ids
    if token_ids is None:
        head, token_ids = probs.topk(min(_NUCLEUS_CANDIDATES, vocab_size))
        if head.sum() < params.top_p:
            head, token_ids = probs.sort(descending=True)
        probs = head
    # Keep tokens until the mass before them reaches top_p; the first is always kept.
    keep = int((probs.cumsum(0) - probs < params.top_p).sum())
    return probs[: max(keep, 1)], token_ids[: max(keep, 1)]
