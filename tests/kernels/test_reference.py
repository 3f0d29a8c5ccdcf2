"""The reference ops against naive attention in float64, one query token and one head at a time."""

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from antiphon.kernels.attention_batch import (
    MAX_GROUPED_SEQ_LEN,
    AttentionFeatures,
    make_attention_batch,
)
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.reference import write_kv
from antiphon.kernels.torch_kernels import TorchKernels

NUM_BLOCKS, BLOCK_SIZE = 48, 8
K_DIM, V_DIM = 16, 12
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 11},
    "window of one": {"sliding_window": 1},
    "chunk": {"chunk": 16},
    "window in chunk": {"sliding_window": 9, "chunk": 16},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 13, "soft_cap": 3.0, "sinks": True},
}
# (tokens in the cache, new tokens) of each request: decodes first, by rising length.
BATCHES = {
    "one decode": [(20, 1)],
    "decode group": [(5, 1), (6, 1), (7, 1), (11, 1)],
    "groups and singles": [(0, 1), (1, 1), (15, 1), (16, 1), (60, 1), (63, 1), (64, 1)],
    "prefills": [(0, 17), (0, 2), (0, 33)],
    "chunks of prompts": [(16, 9), (31, 20), (7, 2)],
    "mixed": [(3, 1), (4, 1), (40, 1), (0, 12), (24, 24)],
}


@dataclass
class Case:
    """A cache that holds NaN wherever nobody wrote, and what was written, request by request."""

    heads: tuple[int, int]
    shape: list[tuple[int, int]]
    scattered: bool
    kv: PagedKV = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(len(self.shape))
        torch.manual_seed(0)
        num_kv_heads = self.heads[1]
        self.kv = PagedKV(
            torch.full((NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, K_DIM), math.nan),
            torch.full((NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, V_DIM), math.nan),
        )
        free = list(range(NUM_BLOCKS))
        if self.scattered:
            rng.shuffle(free)
        self.tables = []
        for start, count in self.shape:
            needed = -(-(start + count) // BLOCK_SIZE)
            self.tables.append([free.pop(0) for _ in range(needed)])
        lengths = [start + count for start, count in self.shape]
        self.keys = [torch.randn(n, num_kv_heads, K_DIM) for n in lengths]
        self.values = [torch.randn(n, num_kv_heads, V_DIM) for n in lengths]
        self.queries = [torch.randn(c, self.heads[0], K_DIM) for _, c in self.shape]

    def slots(self, index: int, start: int, end: int) -> Tensor:
        table = self.tables[index]
        return torch.tensor(
            [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, end)],
            dtype=torch.int64,
        )

    def run(self, features: AttentionFeatures) -> Tensor:
        batch = make_attention_batch(
            self.tables,
            [start for start, _ in self.shape],
            [count for _, count in self.shape],
            BLOCK_SIZE,
            torch.device("cpu"),
        )
        for index, (start, _) in enumerate(self.shape):  # what earlier steps wrote
            k, v = self.keys[index][:start], self.values[index][:start]
            write_kv(k, k, v, self.kv, self.slots(index, 0, start))
        new_keys = torch.cat([k[s:] for k, (s, _) in zip(self.keys, self.shape, strict=True)])
        new_values = torch.cat([v[s:] for v, (s, _) in zip(self.values, self.shape, strict=True)])
        write_kv(new_keys, new_keys, new_values, self.kv, batch.slot_mapping)
        query = torch.cat(self.queries)
        return TorchKernels().paged_attention(query, self.kv, batch, features)

    def expected(self, features: AttentionFeatures) -> Tensor:
        rows = []
        for index, (start, count) in enumerate(self.shape):
            for new in range(count):
                position = start + new
                rows.append(self._attend(index, self.queries[index][new], position, features))
        return torch.stack(rows)

    def _attend(
        self, index: int, query: Tensor, position: int, features: AttentionFeatures
    ) -> Tensor:
        """Straight from the definitions, in float64."""
        first = 0
        if features.sliding_window is not None:
            first = max(first, position - features.sliding_window + 1)
        if features.chunk is not None:
            first = max(first, position // features.chunk * features.chunk)
        out = []
        for head in range(self.heads[0]):
            kv_head = head * self.heads[1] // self.heads[0]
            keys = self.keys[index][first : position + 1, kv_head].double()
            values = self.values[index][first : position + 1, kv_head].double()
            scores = keys @ query[head].double() * features.scale
            if features.soft_cap is not None:
                scores = features.soft_cap * torch.tanh(scores / features.soft_cap)
            weights = scores.exp()
            total = weights.sum()
            if features.sinks is not None:
                total = total + features.sinks[head].double().exp()
            out.append((weights / total) @ values)
        return torch.stack(out)


def make_features(name: str, num_q_heads: int) -> AttentionFeatures:
    options = dict(FEATURES[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 2, num_q_heads)
    return AttentionFeatures(scale=0.3, **options)


@pytest.mark.parametrize("scattered", [False, True], ids=["in place", "scattered"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("features", FEATURES)
def test_paged_attention_equals_naive_attention(
    features: str, shape: list[tuple[int, int]], heads: tuple[int, int], scattered: bool
) -> None:
    case = Case(heads, shape, scattered)
    options = make_features(features, heads[0])
    actual = case.run(options)
    torch.testing.assert_close(actual, case.expected(options).float(), rtol=1e-4, atol=1e-5)


def test_long_decodes_are_attended_one_by_one() -> None:
    """Beyond the limit of a group, beside a group that ends exactly at it."""
    shape = [(MAX_GROUPED_SEQ_LEN - 2, 1), (MAX_GROUPED_SEQ_LEN - 1, 1), (MAX_GROUPED_SEQ_LEN, 1)]
    blocks = sum(-(-(start + 1) // BLOCK_SIZE) for start, _ in shape)
    batch = make_attention_batch(
        [list(range(i * 40, i * 40 + 40)) for i in range(3)],
        [start for start, _ in shape],
        [1, 1, 1],
        BLOCK_SIZE,
        torch.device("cpu"),
    )
    assert blocks > NUM_BLOCKS
    (group,) = batch.decode_groups
    assert (group.first, group.count) == (0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    decodes = sorted((rng.randrange(40), 1) for _ in range(rng.randrange(6)))
    prefills = [(rng.randrange(20), rng.randint(2, 20)) for _ in range(rng.randrange(3))]
    shape = decodes + prefills or [(0, 1)]
    case = Case((4, 2), shape, scattered=bool(seed % 2))
    options = make_features(rng.choice(list(FEATURES)), 4)
    torch.testing.assert_close(
        case.run(options), case.expected(options).float(), rtol=1e-4, atol=1e-5
    )
