"""Runs a model on a few tokens as it will be served, before anybody relies on its answers.

A prompt goes through twice: at once and by itself, through the model's own eager attention; and
through ours in two steps, the first of them packed behind another prompt. The logits must agree.
What a family keeps outside the KV cache (recurrent state, a convolution over tokens) is lost
between steps, or runs from one prompt into the next; what it takes from a token's place in the step
instead of its position is wrong in both. Neither shows in a prompt that is computed in one piece.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import (
    AttentionBatch,
    AttentionFeatures,
    make_attention_batch,
)
from antiphon.kernels.paged_kv import PagedKV, Rotary
from antiphon.kernels.reference import prefill_attention, write_kv
from antiphon.workers.attention_interface import attending
from antiphon.workers.kv_cache import LayerLayout

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes ids and positions ``[1, T]`` and rows ``[n]``; returns their logits ``[n, vocab_size]``."""

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of a prompt whose KV is in the block of the prompt's number."""

    prompt: int
    start: int
    end: int


_WHOLE = (_Chunk(0, 0, 12),)
_STEPS = ((_Chunk(1, 0, 5), _Chunk(0, 0, 8)), (_Chunk(0, 8, 12),))


class Probe:
    """The attention of those steps, over a cache that it makes as layers ask for it.

    Args:
        vocab_size: Token ids are below it.
        device: Of the model.

    Attributes:
        layers: The KV shape of every layer that attended.
        windows: The sliding window that each of them told.
        num_q_heads: Of the layer with most.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.layers: dict[int, LayerLayout] = {}
        self.windows: dict[int, int | None] = {}
        self.num_q_heads = 0
        self.rotary: Rotary | None = None
        self.positions: Tensor
        self._batch: AttentionBatch
        self._caches: dict[int, PagedKV] = {}
        self._num_calls = 0
        self._vocab_size = vocab_size
        self._device = device

    def saw_each_of(self, num_layers: int) -> bool:
        """Whether layers 0 to ``num_layers - 1`` attended, and each once in a step."""
        num_calls = num_layers * len(_STEPS)
        return self.layers.keys() == set(range(num_layers)) and self._num_calls == num_calls

    def at_once(self, logits: Logits) -> Tensor:
        """Logits ``[tokens of the prompt, vocab_size]``, by an attention that is not this one."""
        return self._run(logits, _WHOLE)

    def in_steps(self, logits: Logits) -> Tensor:
        """As ``at_once``, through this attention."""
        with attending(self):
            return torch.cat([self._run(logits, step) for step in _STEPS])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: AttentionFeatures
    ) -> Tensor:
        """``[T, heads, head_dim]`` each; returns ``[T, num_q_heads, v_head_dim]``."""
        self._num_calls += 1
        self.num_q_heads = max(self.num_q_heads, query.shape[1])
        self.windows[layer] = features.sliding_window
        if layer not in self.layers:
            self.layers[layer] = LayerLayout(key.shape[1], key.shape[2], value.shape[2])
            blocks = (2, _BLOCK_SIZE)
            self._caches[layer] = PagedKV(
                key.new_empty(*blocks, *key.shape[1:]), value.new_empty(*blocks, *value.shape[1:])
            )
        kv = self._caches[layer]
        query = write_kv(query, key, value, kv, self._batch.slot_mapping, self.rotary)
        self.rotary = None
        return prefill_attention(query, kv, self._batch, features)

    def _run(self, logits: Logits, chunks: Sequence[_Chunk]) -> Tensor:
        """Compute a step; the logits are those of its last chunk."""
        tokens = [(chunk.prompt, i) for chunk in chunks for i in range(chunk.start, chunk.end)]
        counts = [chunk.end - chunk.start for chunk in chunks]
        ids = [(5 * prompt + 7 * i) % self._vocab_size for prompt, i in tokens]
        self.positions = torch.tensor([i for _, i in tokens], device=self._device)
        self._batch = make_attention_batch(
            [[chunk.prompt] for chunk in chunks],
            [chunk.start for chunk in chunks],
            counts,
            _BLOCK_SIZE,
            self._device,
        )
        rows = torch.arange(len(tokens) - counts[-1], len(tokens), device=self._device)
        return logits(torch.tensor([ids], device=self._device), self.positions[None], rows)
