"""What the attention ops know about a packed batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from antiphon.kernels.scratch import Scratch
from antiphon.kernels.shared_prefixes import SharedPrefix, find_shared_prefixes

# Up to this context, a call for every request costs more than gathering a padded group: at 32
# requests of 64 tokens 2.6 against 0.9 ms a layer, at 512 tokens 7.0 against 9.8 (one EPYC core).
MAX_GROUPED_SEQ_LEN = 256
MAX_GROUP_PADDING = 1.25
# A prefix is shared if that saves reading so many tokens: 8 requests with 512 tokens in common win
# little, with 2,048 they take less than half the time.
SHARED_PREFIX_MIN_TOKENS = 512
SHARED_PREFIX_MIN_SAVED = 4096


@dataclass(frozen=True, slots=True)
class AttentionFeatures:
    """How one layer attends, beyond plain causal attention.

    Attributes:
        scale: Factor on the scores, usually ``head_dim ** -0.5``.
        sliding_window: A token sees itself and ``sliding_window - 1`` tokens before it.
        chunk: A token sees only tokens of its own aligned chunk of this many positions (Llama 4).
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)`` (Gemma 2).
        sinks: ``[num_q_heads]``, a logit per head that takes part in the softmax only (GPT-OSS).
    """

    scale: float
    sliding_window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_limited(self) -> bool:
        """Whether a token may not see all before it."""
        return self.sliding_window is not None or self.chunk is not None

    def first_visible(self, position: int) -> int:
        """The oldest position that the token at ``position`` sees."""
        first = 0
        if self.sliding_window is not None:
            first = max(first, position - self.sliding_window + 1)
        if self.chunk is not None:
            first = max(first, position - position % self.chunk)
        return first


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Neighbouring decode requests with short contexts of similar length, attended in one call.

    Attributes:
        first: Index of the first request.
        count: How many requests.
        slots: ``[count * longest]`` int64, the cache slots of each context. A shorter one is padded
            with its own first slot, which the mask hides: a slot that nobody wrote may hold NaN,
            and no mask hides that.
        last_positions: ``[count, 1]`` int64, position of each request's new token.
    """

    first: int
    count: int
    slots: Tensor
    last_positions: Tensor


def group_decodes(
    seq_lens: Sequence[int], block_tables: Tensor, block_size: int
) -> tuple[DecodeGroup, ...]:
    """Group requests, sorted by rising length, while padding stays small."""
    groups = []
    first = 0
    while first < len(seq_lens) and seq_lens[first] <= MAX_GROUPED_SEQ_LEN:
        limit = min(seq_lens[first] * MAX_GROUP_PADDING + block_size, MAX_GROUPED_SEQ_LEN)
        stop = first + 1
        while stop < len(seq_lens) and seq_lens[stop] <= limit:
            stop += 1
        if stop - first > 1:
            positions = torch.arange(seq_lens[stop - 1], device=block_tables.device)
            slots = [
                _slots(block_tables[i], positions * (positions < seq_lens[i]), block_size)
                for i in range(first, stop)
            ]
            last = torch.tensor(seq_lens[first:stop], device=positions.device)[:, None] - 1
            groups.append(DecodeGroup(first, stop - first, torch.cat(slots), last))
        first = stop
    return tuple(groups)


def _slots(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    return table[positions // block_size].long() * block_size + positions % block_size


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Which query rows the programs of a prefill launch compute.

    Attributes:
        tiles: ``[num_tiles, 2]`` int32: the request's index in the batch, and the first of its new
            tokens that the tile computes; longest context first.
        block_m: Query rows of a tile.
    """

    tiles: Tensor
    block_m: int


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the contexts of a decode step are split over programs.

    Request ``r`` is computed in parts, whose partial results are rows ``part_offsets[r]`` to
    ``part_offsets[r + 1]`` of a workspace: first its parts of the shared prefix, then its own. A
    part is a position in the work, not a token range: each layer divides the tokens that it sees.
    All sizes follow from the batch size and the capacity alone, so a captured graph can be fed
    anew.

    Attributes:
        items: ``[num_items, 4]`` int32: request (-1: nothing to do), part, number of parts of its
            own, row of the workspace.
        shared_items: ``[num_shared_items, 5]`` int32: first and last + 1 index into ``members``
            (equal: nothing to do), part, number of parts of the prefix, prefix length in tokens.
        members: ``[num_decode_requests]`` int32, requests ordered by group.
        prefix_lens: ``[num_decode_requests]`` int32, leading tokens that the shared items cover.
        part_offsets: ``[num_decode_requests + 1]`` int32.
        num_rows: Rows of the workspace.
        members_per_item: Most members of one shared item.
    """

    items: Tensor
    shared_items: Tensor
    members: Tensor
    prefix_lens: Tensor
    part_offsets: Tensor
    num_rows: int
    members_per_item: int


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """What the Triton kernels read of a batch, on the device.

    Attributes:
        seq_lens: ``[num_requests]`` int32; 0 for a request that only fills a captured graph.
        cu_seqlens_q: ``[num_requests + 1]`` int32.
        prefill: None if every request decodes.
        decode: None if no request decodes.
    """

    seq_lens: Tensor
    cu_seqlens_q: Tensor
    prefill: PrefillPlan | None
    decode: DecodePlan | None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in an order that is the same for plans of the same kind."""
        yield from (self.seq_lens, self.cu_seqlens_q)
        if self.prefill is not None:
            yield self.prefill.tiles
        if self.decode is not None:
            decode = self.decode
            yield from (decode.items, decode.shared_items, decode.members)
            yield from (decode.prefix_lens, decode.part_offsets)


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """A packed batch: requests with one new token first, by rising length, then those with more.

    Attributes:
        num_decode_requests: How many requests, from the front, have exactly one new token.
        cu_seqlens_q: ``num_requests + 1`` offsets into the packed tokens.
        seq_lens: Tokens in the context of each request, the new ones included.
        block_tables: ``[num_requests, max_blocks]`` int32; a row's entries beyond
            ``ceil(seq_len / block_size)`` are 0.
        first_slots: Slot of the first token where a request's blocks follow one another in the
            cache, so that its context is one slice; None where they are scattered.
        slot_mapping: ``[num_tokens]`` int64, the cache slot of each new token; -1: none.
        decode_groups: From ``group_decodes``; disjoint, in order.
        shared_prefixes: Of decode requests, disjoint; for the torch ops, as the groups are.
        plan: For the Triton kernels, which read it and ``block_tables`` instead of the tuples;
            None where the torch ops run.
        scratch: Of the torch ops, one layer after the other.
    """

    num_decode_requests: int
    cu_seqlens_q: tuple[int, ...]
    seq_lens: tuple[int, ...]
    block_tables: Tensor
    first_slots: tuple[int | None, ...]
    slot_mapping: Tensor
    decode_groups: tuple[DecodeGroup, ...] = ()
    shared_prefixes: tuple[SharedPrefix, ...] = ()
    plan: KernelPlan | None = None
    scratch: Scratch = field(default_factory=Scratch)


def pack_batch(
    tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    counts: Sequence[int],
    block_size: int,
    device: torch.device,
) -> AttentionBatch:
    """Lay out a packed batch; what only one set of ops reads is for that set to add.

    Args:
        tables: Block ids of each request, enough for its old and new tokens.
        starts: Tokens already in the cache, per request; rising among those with one new token,
            which come first. -1 for a request without context, whose token gets no slot: it fills
            the batch of a captured graph.
        counts: New tokens per request.
        block_size: Tokens per block.
        device: Where the cache lives.
    """
    seq_lens = [start + count for start, count in zip(starts, counts, strict=True)]
    slots = [
        -1 if start < 0 else table[position // block_size] * block_size + position % block_size
        for table, start, end in zip(tables, starts, seq_lens, strict=True)
        for position in range(start, end)
    ]
    width = max(1, *map(len, tables))
    rows = [[*table, *[0] * (width - len(table))] for table in tables]
    return AttentionBatch(
        num_decode_requests=next((i for i, n in enumerate(counts) if n != 1), len(counts)),
        cu_seqlens_q=tuple(accumulate(counts, initial=0)),
        seq_lens=tuple(seq_lens),
        block_tables=torch.tensor(rows, dtype=torch.int32, device=device),
        first_slots=(None,) * len(counts),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
    )


def make_attention_batch(
    tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    counts: Sequence[int],
    block_size: int,
    device: torch.device,
) -> AttentionBatch:
    """Lay out a packed batch for the torch ops; arguments as of ``pack_batch``."""
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    used = [table[: -(-end // block_size)] for table, end in zip(tables, ends, strict=True)]
    batch = pack_batch(used, starts, counts, block_size, device)
    decoding = ends[: batch.num_decode_requests]
    prefixes = find_shared_prefixes(
        decoding, tables[: len(decoding)], block_size, SHARED_PREFIX_MIN_TOKENS
    )
    return replace(
        batch,
        first_slots=tuple(t[0] * block_size if _is_run(t) else None for t in used),
        decode_groups=group_decodes(decoding, batch.block_tables, block_size),
        shared_prefixes=tuple(
            prefix
            for prefix in prefixes
            if (len(prefix.members) - 1) * prefix.num_tokens >= SHARED_PREFIX_MIN_SAVED
        ),
        scratch=Scratch(device),
    )


def _is_run(blocks: Sequence[int]) -> bool:
    return list(blocks) == list(range(blocks[0], blocks[0] + len(blocks)))
