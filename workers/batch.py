"""What one engine step computes."""

from dataclasses import dataclass

from antiphon.workers.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of one request, computed in one step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # the chunk ends at the last known token, so a next one is drawn


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: decode steps first, then prompt chunks."""

    chunks: tuple[Chunk, ...]
