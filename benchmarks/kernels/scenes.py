"""Batches on a GPU as the engine makes them, for timing."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV
from antiphon.kernels.triton_kernels import TritonKernels, make_triton_kernels
from antiphon.kernels.tuning import Role

Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
FEATURES = AttentionFeatures(HEAD_DIM**-0.5)


@dataclass(frozen=True, slots=True)
class Scene:
    """One layer's attention for one batch.

    Attributes:
        kernels: Of the pool.
        query: ``[num_tokens, num_q_heads, head_dim]`` bf16.
        kv: The cache; scattered blocks.
        batch: With its plan.
        tables: Block ids of each request.
        seq_lens: Tokens of each context.
    """

    kernels: TritonKernels
    query: Tensor
    kv: PagedKV
    batch: AttentionBatch
    tables: list[list[int]]
    seq_lens: list[int]

    def attend(self) -> Tensor:
        """Run our kernels."""
        return self.kernels.paged_attention(self.query, self.kv, self.batch, FEATURES)

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """K and V ``[num_requests, num_kv_heads, tokens, head_dim]`` bf16; equal lengths only."""
        tokens = self.seq_lens[0]
        key, value = (
            torch.stack([x[table].flatten(0, 1)[:tokens] for table in self.tables])
            .to(torch.bfloat16)
            .transpose(1, 2)
            .contiguous()
            for x in (self.kv.keys, self.kv.values)
        )
        return key, value

    @property
    def num_kv_bytes(self) -> int:
        """What one pass over every context reads."""
        size = HEAD_DIM * self.kv.keys.element_size()
        if self.kv.key_scales is not None:
            size += self.kv.key_scales.element_size()
        return 2 * sum(self.seq_lens) * KV_HEADS * size


def make_scene(
    requests: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    role: Role,
    shared_tokens: int = 0,
) -> Scene:
    """Build a batch of ``(tokens in the cache, new tokens)``.

    Args:
        requests: Decode requests first.
        dtype: Of the cache.
        device: A GPU.
        role: Whose configurations.
        shared_tokens: Leading tokens that all requests have in common, whole blocks.
    """
    kernels = make_triton_kernels(device, role)
    shape = AttentionShape(KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM, torch.bfloat16, dtype)
    kernels.prepare(shape)
    seq_lens = [start + new for start, new in requests]
    shared = shared_tokens // BLOCK_SIZE
    num_blocks = shared + sum(-(-n // BLOCK_SIZE) - shared for n in seq_lens)
    free = list(range(num_blocks))
    random.Random(0).shuffle(free)
    prefix = [free.pop() for _ in range(shared)]
    tables = [prefix + [free.pop() for _ in range(-(-n // BLOCK_SIZE) - shared)] for n in seq_lens]
    new_tokens = [new for _, new in requests]
    batch = kernels.make_batch(
        tables, [start for start, _ in requests], new_tokens, BLOCK_SIZE, device
    )
    query = torch.randn(sum(new_tokens), Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    return Scene(kernels, query, make_cache(num_blocks, dtype, device), batch, tables, seq_lens)


def without_sharing(scene: Scene) -> Scene:
    """The same batch, every request reading its own copy of what it shares."""
    num_blocks = sum(map(len, scene.tables))
    free = iter(range(num_blocks))
    tables = [[next(free) for _ in table] for table in scene.tables]
    starts, new = [n - 1 for n in scene.seq_lens], [1] * len(tables)
    device = scene.query.device
    batch = scene.kernels.make_batch(tables, starts, new, BLOCK_SIZE, device)
    cache = make_cache(num_blocks, scene.kv.keys.dtype, device)
    return replace(scene, kv=cache, batch=batch, tables=tables)


def make_cache(num_blocks: int, dtype: torch.dtype, device: torch.device) -> PagedKV:
    """Random K and V of one layer."""
    shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if dtype not in QUANTISED_LIMITS:
        return PagedKV(keys, values)
    scales = [torch.rand(num_blocks, KV_HEADS, BLOCK_SIZE, device=device) for _ in range(2)]
    return PagedKV(keys, values, *scales)
