"""Random paged attention problems, and their answers straight from the definitions in float64."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from antiphon.kernels import reference
from antiphon.kernels.attention_batch import (
    AttentionBatch,
    AttentionFeatures,
    DecodePlan,
    KernelPlan,
    PrefillPlan,
)
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV

# Largest error of an answer by the dtype of queries and products; values are standard normal. What
# the cache's own format costs is not in it: expected answers start from what the cache holds.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class AttentionCase:
    """Requests with random K, V and queries in a cache that holds garbage everywhere else.

    Args:
        requests: ``(tokens in the cache, new tokens)`` of each, decode requests first.
        heads: Query and KV heads.
        dims: Widths of K and V.
        block_size: Tokens per block.
        dtype: Of queries.
        cache_dtype: Of the cache.
        device: Of everything.
        shared: Leading tokens, whole blocks, that requests have in common.
        num_alone: How many requests, the last ones, have nothing in common with others.
        seed: Of everything.
    """

    requests: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shared: int = 0
    num_alone: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        torch.manual_seed(self.seed)
        num_kv_heads = self.heads[1]
        self.seq_lens = [start + new for start, new in self.requests]
        self.tables = self._tables(rng)
        self.kv = self._cache()
        self.queries = [
            torch.randn(new, self.heads[0], self.dims[0]).to(self.dtype) for _, new in self.requests
        ]
        self.keys = [torch.randn(n, num_kv_heads, self.dims[0]) for n in self.seq_lens]
        self.values = [torch.randn(n, num_kv_heads, self.dims[1]) for n in self.seq_lens]
        sharing = len(self.requests) - self.num_alone
        for keys, values in zip(self.keys[:sharing], self.values[:sharing], strict=True):
            keys[: self.shared] = self.keys[0][: self.shared]
            values[: self.shared] = self.values[0][: self.shared]
        for index, table in enumerate(self.tables):
            slots = [self._slot(table, p) for p in range(self.seq_lens[index])]
            self._fill(index, torch.tensor(slots, dtype=torch.int64, device=self.device))

    def batch(
        self, prefill: PrefillPlan | None = None, decode: DecodePlan | None = None
    ) -> AttentionBatch:
        """The batch as the kernels see it; the tuples that they must not read are empty."""
        new = [count for _, count in self.requests]
        width = max(1, *map(len, self.tables))
        rows = [[*table, *[0] * (width - len(table))] for table in self.tables]
        plan = KernelPlan(
            seq_lens=self._int32(self.seq_lens),
            cu_seqlens_q=self._int32(list(accumulate(new, initial=0))),
            prefill=prefill,
            decode=decode,
        )
        return AttentionBatch(
            num_decode_requests=self.num_decode,
            cu_seqlens_q=(),
            seq_lens=(),
            block_tables=self._int32(rows),
            first_slots=(),
            slot_mapping=torch.empty(0, dtype=torch.int64),
            plan=plan,
        )

    @property
    def num_decode(self) -> int:
        """Leading requests with at most one new token."""
        return next((i for i, (_, n) in enumerate(self.requests) if n > 1), len(self.requests))

    def move_far(self) -> None:
        """Put the first block of the first request behind 2**31 elements, few of them touched."""
        block = self.tables[0][0]
        num_blocks = 2**31 // self.kv.keys[0].numel() + 2
        keys, values = (
            torch.empty((num_blocks, *x.shape[1:]), dtype=torch.float16, device=self.device)
            for x in (self.kv.keys, self.kv.values)
        )
        old = self.kv.keys.shape[0]
        for far, near in ((keys, self.kv.keys), (values, self.kv.values)):
            far[:old], far[-1] = near.half(), near[block].half()
            far[block] = float("nan")
        self.kv = PagedKV(keys, values)
        self.tables[0][0] = num_blocks - 1
        self.keys, self.values = (
            [x.half().float() for x in each] for each in (self.keys, self.values)
        )

    def query(self, first: int, stop: int) -> Tensor:
        """Packed queries of requests ``[first, stop)``."""
        return torch.cat(self.queries[first:stop]).to(self.device)

    def expected(self, features: AttentionFeatures, first: int, stop: int) -> Tensor:
        """``[tokens, num_q_heads, v_dim]`` in float64, on the CPU."""
        rows = [
            self._attend(index, new, features)
            for index in range(first, stop)
            for new in range(len(self.queries[index]))
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.heads[0], self.dims[1])

    def bound(self) -> float:
        """How far an answer may be off."""
        return BOUNDS[self.dtype]

    def _fill(self, index: int, slots: Tensor) -> None:
        keys, values = (x[index].to(self.device) for x in (self.keys, self.values))
        reference.write_kv(keys, keys, values, self.kv, slots)
        self.keys[index] = _read(self.kv.keys, self.kv.key_scales, slots)
        self.values[index] = _read(self.kv.values, self.kv.value_scales, slots)

    def _attend(self, index: int, new: int, features: AttentionFeatures) -> Tensor:
        position = self.requests[index][0] + new
        seen = slice(features.first_visible(position), position + 1)
        group = self.heads[0] // self.heads[1]
        keys = self.keys[index][seen].double().repeat_interleave(group, 1)
        values = self.values[index][seen].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,nhd->hn", self.queries[index][new].double(), keys)
        scores = scores * features.scale
        if features.soft_cap is not None:
            scores = features.soft_cap * torch.tanh(scores / features.soft_cap)
        if features.sinks is not None:
            scores = torch.cat([scores, features.sinks.double().cpu()[:, None]], 1)
        weights = scores.softmax(-1)[:, : len(keys)]
        return torch.einsum("hn,nhd->hd", weights, values)

    def _tables(self, rng: random.Random) -> list[list[int]]:
        needed = [-(-n // self.block_size) for n in self.seq_lens]
        free = list(range(sum(needed) + 3))
        rng.shuffle(free)
        shared = [free.pop() for _ in range(self.shared // self.block_size)]
        sharing = len(needed) - self.num_alone
        prefixes = [shared] * sharing + [[]] * self.num_alone
        return [
            prefix + [free.pop() for _ in range(n - len(prefix))]
            for prefix, n in zip(prefixes, needed, strict=True)
        ]

    def _cache(self) -> PagedKV:
        num_blocks = sum(map(len, self.tables)) + 3
        shape = (num_blocks, self.block_size, self.heads[1])
        nan = float("nan")
        keys, values = (
            torch.full((*shape, dim), nan, device=self.device).to(self.cache_dtype)
            for dim in self.dims
        )
        if self.cache_dtype not in QUANTISED_LIMITS:
            return PagedKV(keys, values)
        scale_shape = (num_blocks, self.heads[1], self.block_size)
        scales = [torch.full(scale_shape, nan, device=self.device) for _ in range(2)]
        return PagedKV(keys, values, *scales)

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _int32(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _read(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    elements = cache.float().view(-1, *cache.shape[2:])[slots]
    if scales is not None:
        elements *= scales.transpose(1, 2).reshape(-1, cache.shape[2])[slots][..., None]
    return elements.cpu()


def all_features(num_q_heads: int, device: torch.device, window: int = 21) -> AttentionFeatures:
    """Every feature at once; the chunk is wider than the window, so both cut."""
    sinks = torch.linspace(-1, 2, num_q_heads, device=device)
    return AttentionFeatures(0.125, window, 32, 5.0, sinks)
