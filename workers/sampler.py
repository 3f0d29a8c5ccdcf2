"""Choosing the next token from logits.

Randomness is a pure function of (seed, position): one uniform number per token, by hash. So a
request that is preempted, moved to another worker or recomputed draws what it would have drawn.
Truncation follows the usual order: temperature, then top-k, then top-p.

Rows that are truncated alike are drawn together: a GPU is waited for whenever something is read
from it or copied to it, and each op of each row would be a launch. On a CPU this changes no bit,
since all ops take rows one by one; on a GPU the order of a sum may depend on how many there are.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from antiphon.messages import SamplingParams

# Most of the mass lies in few tokens: look for the nucleus there before sorting the vocabulary.
_NUCLEUS_CANDIDATES = 1024
# Below it float32 scores overflow to NaN; every draw is greedy long before that.
_MIN_TEMPERATURE = 1e-6

_Kind = tuple[int, bool]  # top_k, 0 for all; whether top_p is below 1
_Row = tuple[float, ...]  # its number, temperature, top_p, uniform number


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw one token for each row.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype.
        params: One for each row.
        positions: Index of the token to draw within its request, prompt included.

    Returns:
        ``num_rows`` token ids.
    """
    tokens = logits.argmax(dim=-1)
    alike: dict[_Kind, list[_Row]] = defaultdict(list)
    for row, (one, position) in enumerate(zip(params, positions, strict=True)):
        if one.temperature > 0:
            top_k = one.top_k if one.top_k < logits.shape[1] else 0
            temperature = max(one.temperature, _MIN_TEMPERATURE)
            draw = (row, temperature, one.top_p, uniform(one.seed, position))
            alike[top_k, one.top_p < 1].append(draw)
    for (top_k, has_top_p), draws in _pieces(alike, logits.is_cuda):
        # In one piece: every copy to a GPU waits for it.
        columns = torch.tensor(draws, dtype=torch.float64, device=logits.device)[..., None]
        rows, temperatures, top_p, uniforms = columns.unbind(1)
        where = rows[:, 0].long()
        scores = logits[where].float().div_(temperatures.float())
        tokens[where] = _draw(scores, top_k, top_p.float() if has_top_p else None, uniforms)
    drawn: list[int] = tokens.tolist()
    return drawn


def _pieces(alike: dict[_Kind, list[_Row]], is_cuda: bool) -> Iterator[tuple[_Kind, list[_Row]]]:
    """Rows to draw at once: all alike, but for a CPU's whole vocabularies, which fill its cache."""
    for kind, rows in alike.items():
        if is_cuda or kind != (0, False):
            yield kind, rows
        else:
            yield from ((kind, [row]) for row in rows)


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that belongs to a position of a seeded stream."""
    message = struct.pack("<qQ", seed, position)
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draw(scores: Tensor, top_k: int, top_p: Tensor | None, uniforms: Tensor) -> Tensor:
    """Draw ``[num_rows]`` tokens; ``top_p`` and ``uniforms`` are ``[num_rows, 1]``."""
    token_ids = None
    if top_k > 0:
        scores, token_ids = scores.topk(top_k)
    probs = scores.softmax(-1)
    if top_p is None:
        return _pick(probs, token_ids, uniforms)
    if token_ids is not None:
        return _pick_nucleus(probs, token_ids, top_p, uniforms)
    head, token_ids = probs.topk(min(_NUCLEUS_CANDIDATES, probs.shape[1]))
    tokens = _pick_nucleus(head, token_ids, top_p, uniforms)
    wide = (head.sum(-1) < top_p[:, 0]).nonzero()[:, 0]
    if len(wide):
        ordered, token_ids = probs[wide].sort(descending=True)
        tokens[wide] = _pick_nucleus(ordered, token_ids, top_p[wide], uniforms[wide])
    return tokens


def _pick_nucleus(probs: Tensor, token_ids: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from the first tokens, of falling probability, whose mass reaches ``top_p``."""
    # Keep tokens until the mass before them reaches it; the first is always kept.
    num_kept = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True).clamp(min=1)
    is_kept = torch.arange(probs.shape[1], device=probs.device) < num_kept
    return _pick(probs.where(is_kept, 0.0), token_ids, uniforms, num_kept)


def _pick(
    probs: Tensor, token_ids: Tensor | None, uniforms: Tensor, num_kept: Tensor | None = None
) -> Tensor:
    """Draw from probabilities, unnormalised, ``[num_rows, num_tokens]``."""
    cumulative = probs.double().cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # A product that is rounded up to the whole mass lies behind the last token.
    index = index.clamp(max=probs.shape[1] - 1)
    if num_kept is not None:
        index = torch.minimum(index, num_kept - 1)
    return (index if token_ids is None else token_ids.gather(-1, index))[:, 0]
