"""A transformers causal language model whose attention reads and writes our paged KV cache.

The model is called on packed tokens, ``input_ids [1, T]``; ``attention_interface`` leads its layers
to ``PagedStep``. At load time the model is run once on a few tokens to learn each layer's KV shape,
and once more against its own eager attention: a family that does not go through the attention
interface, has recurrent state, or computes something else through it is refused by name instead of
answering wrongly.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from antiphon.errors import StepAbandonedError, UnsupportedModelError
from antiphon.kernels.attention_batch import AttentionBatch, AttentionFeatures
from antiphon.kernels.kernel_set import KernelSet
from antiphon.kernels.paged_kv import PagedKV, Rotary
from antiphon.kernels.reference import prefill_attention, write_kv
from antiphon.workers.attention_interface import ATTENTION_NAME, attending, defer_rotation
from antiphon.workers.few_rows import patch_linears
from antiphon.workers.forward_batch import ForwardBatch
from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout
from antiphon.workers.model_patches import patch_model

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 12
# fp32 attention in another order differs by about 1e-6 of the logits' size; a wrong mask by more.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# These RoPE variants change their frequencies with the longest position in the batch, so packed
# requests would disturb one another beyond the original context.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class PagedStep:
    """Attention of one step: write the new KV, then attend to the pages."""

    def __init__(
        self,
        kernels: KernelSet,
        cache: KVCache,
        batch: AttentionBatch,
        is_abandoned: Callable[[], bool],
    ) -> None:
        self._kernels = kernels
        self._cache = cache
        self._batch = batch
        self._is_abandoned = is_abandoned
        self.rotary: Rotary | None = None  # of the layer that attends next

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: AttentionFeatures
    ) -> Tensor:
        """``[T, heads, head_dim]`` each; returns ``[T, num_q_heads, v_head_dim]``.

        Raises:
            StepAbandonedError: Nobody waits for this step any more.
        """
        if self._is_abandoned():  # once a layer: a step of a long prompt may take seconds
            raise StepAbandonedError
        kv = self._cache.layers[layer]
        slots, rotary = self._batch.slot_mapping, self.rotary
        query = self._kernels.write_kv(query, key, value, kv, slots, rotary)
        self.rotary = None
        return self._kernels.paged_attention(query, kv, self._batch, features)


class _Probe:
    """Records each layer's KV shape while attending over one unpaged prompt."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerLayout] = {}
        self.num_calls = 0
        self.num_q_heads = 0
        self.rotary: Rotary | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: AttentionFeatures
    ) -> Tensor:
        self.num_calls += 1
        self.layers[layer] = LayerLayout(key.shape[1], key.shape[2], value.shape[2])
        self.num_q_heads = max(self.num_q_heads, query.shape[1])
        num_tokens = query.shape[0]
        slots = torch.arange(num_tokens, device=query.device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=query.device)
        batch = AttentionBatch(0, (0, num_tokens), (num_tokens,), table, (0,), slots)
        kv = PagedKV(torch.empty_like(key[None]), torch.empty_like(value[None]))
        query = write_kv(query, key, value, kv, slots, self.rotary)
        self.rotary = None
        return prefill_attention(query, kv, batch, features)


class PagedModel:
    """A loaded model and its KV layout.

    Args:
        model: A transformers causal language model in evaluation mode.
        kernels: The ops of its attention.

    Raises:
        UnsupportedModelError: The family cannot be served; the message names it and says why.
    """

    def __init__(self, model: Any, kernels: KernelSet) -> None:
        self.model = model
        self.kernels = kernels
        self.device: torch.device = model.device
        self.family: str = model.config.model_type
        self.config = model.config.get_text_config()
        # transformers hands a mask of four dimensions on as it is; given none, it looks for packed
        # prompts in the positions, which costs a wait for the device in every step.
        self._no_mask = torch.empty(1, 1, 1, 1, device=self.device)
        self.max_context_tokens = max_context_tokens(self.config)
        parameters = inspect.signature(model.forward).parameters
        if "logits_to_keep" not in parameters or "position_ids" not in parameters:
            raise UnsupportedModelError(
                f"model family {self.family!r}: its forward() takes no position_ids and "
                "logits_to_keep, so prompts cannot be packed"
            )
        with torch.inference_mode():
            expected = self._eager_logits()
            self.patched = patch_model(model, kernels, defer_rotation)
            if self.device.type == "cpu":
                patch_linears(model)
            self.layout = KVLayout(self._probe(expected), model.dtype, model.dtype)

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, cache: KVCache, is_abandoned: Callable[[], bool]
    ) -> Tensor:
        """Compute one step, writing KV to the cache.

        Args:
            batch: What to compute.
            cache: Read and written.
            is_abandoned: Asked once a layer; True ends the step.

        Returns:
            Logits ``[num_samples, vocab_size]``.

        Raises:
            StepAbandonedError: ``is_abandoned`` said so; KV of the step is incomplete.
        """
        with attending(PagedStep(self.kernels, cache, batch.attention, is_abandoned)):
            return self._logits(
                batch.input_ids, batch.position_ids, batch.logit_rows, self._no_mask
            )

    def _logits(
        self, input_ids: Tensor, position_ids: Tensor, rows: Tensor, mask: Tensor | None
    ) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _probe(self, expected: Tensor) -> tuple[LayerLayout, ...]:
        """Learn the KV shapes and check the answers against the model as it came."""
        probe = _Probe()
        try:
            self.model.set_attn_implementation(ATTENTION_NAME)
            with attending(probe):
                actual = self._logits(*self._probe_input(), self._no_mask)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise self._unsupported(f"it cannot use another attention: {error}") from error
        self.num_q_heads = probe.num_q_heads
        num_layers = self.config.num_hidden_layers
        if sorted(probe.layers) != list(range(num_layers)) or probe.num_calls != num_layers:
            raise self._unsupported(
                f"{len(probe.layers)} of its {num_layers} layers use transformers' attention "
                "interface; layers with recurrent state or attention of their own cannot be paged"
            )
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        if not difference <= _PROBE_TOLERANCE.get(actual.dtype, 1e-3):
            raise self._unsupported(
                f"our attention and ops give other logits than its own (by {difference:.1e})"
            )
        return tuple(probe.layers[layer] for layer in range(num_layers))

    def _probe_input(self) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(_PROBE_TOKENS, device=self.device)
        return positions[None] * 7 % self.config.vocab_size, positions[None], positions

    def _eager_logits(self) -> Tensor:
        try:
            self.model.set_attn_implementation("eager")
            return self._logits(*self._probe_input(), None)
        except Exception as error:
            raise self._unsupported(f"it cannot run on packed tokens: {error}") from error

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model family {self.family!r} cannot be served: {reason}")


def max_context_tokens(config: Any) -> int:
    """The longest prompt plus output that packed requests may have of a text configuration."""
    limit = int(getattr(config, "max_position_embeddings", None) or 2**20)
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]
    for variant in variants:
        if variant.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            original = variant.get("original_max_position_embeddings") or limit
            if original < limit:
                logger.warning(
                    "context limited to %d of %d tokens: RoPE variant %s depends on the batch",
                    original, limit, variant["rope_type"],
                )  # fmt: skip
                limit = int(original)
    return limit
