"""A transformers causal language model whose attention reads and writes our paged KV cache.

The model is called on packed tokens, ``input_ids [1, T]``; ``attention_interface`` leads its layers
to ``PagedStep``. At load time it is run on a few tokens (``model_probe``), which yields the KV
shape of each layer and compares its logits with those of its own eager attention: a family that
does not go through the attention interface, has recurrent state, or computes something else through
it is refused by name instead of answering wrongly.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from antiphon.errors import StepAbandonedError, UnsupportedModelError
from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.kernel_set import KernelSet
from antiphon.kernels.paged_kv import Rotary
from antiphon.workers.attention_interface import ATTENTION_NAME, attending, defer_rotation
from antiphon.workers.few_rows import patch_linears
from antiphon.workers.forward_batch import ForwardBatch
from antiphon.workers.kv_cache import KVCache, KVLayout
from antiphon.workers.model_patches import patch_model
from antiphon.workers.model_probe import Probe

logger = logging.getLogger(__name__)

# fp32 attention in another order differs by about 1e-6 of the logits' size; a wrong mask by more.
# In 16 bits rounding hides much: with tiny weights Falcon-H1's lost state is 0.17. So what
# transformers and the configuration say of a family is asked too (refuse_state, and below it).
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# These RoPE variants change their frequencies with the longest position in the batch, so packed
# requests would disturb one another beyond the original context.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_WINDOW_MASK = "create_sliding_window_causal_mask"  # of transformers, for models to import


class PagedStep:
    """Attention of one step: write the new KV, then attend to the pages."""

    def __init__(
        self,
        kernels: KernelSet,
        cache: KVCache,
        batch: ForwardBatch,
        is_abandoned: Callable[[], bool],
    ) -> None:
        self._kernels = kernels
        self._cache = cache
        self._batch = batch.attention
        self._is_abandoned = is_abandoned
        self.rotary: Rotary | None = None  # of the layer that attends next
        self.positions = batch.position_ids[0]

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
        refuse_state(model)
        probe = Probe(self.config.vocab_size, self.device)
        with torch.inference_mode():
            expected = self._eager_logits(probe)
            self.patched = patch_model(model, kernels, defer_rotation)
            if self.device.type == "cpu":
                patch_linears(model)
            self._check(probe, expected)
        self.num_q_heads = probe.num_q_heads
        layers = tuple(layout for _, layout in sorted(probe.layers.items()))
        self.layout = KVLayout(layers, model.dtype, model.dtype)

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
        with attending(PagedStep(self.kernels, cache, batch, is_abandoned)):
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

    def _eager_logits(self, probe: Probe) -> Tensor:
        try:
            self.model.set_attn_implementation("eager")
            return probe.at_once(partial(self._logits, mask=None))
        except Exception as error:
            raise self._unsupported(f"it cannot run on packed tokens: {error}") from error

    def _check(self, probe: Probe, expected: Tensor) -> None:
        """Run the probe, and hold its answers against those of the model as it came."""
        try:
            self.model.set_attn_implementation(ATTENTION_NAME)
            actual = probe.in_steps(partial(self._logits, mask=self._no_mask))
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise self._unsupported(f"it cannot use another attention: {error}") from error
        num_layers = self.config.num_hidden_layers
        if not probe.saw_each_of(num_layers):
            raise self._unsupported(
                f"{len(probe.layers)} of its {num_layers} layers use transformers' attention "
                "interface; layers with recurrent state or attention of their own cannot be paged"
            )
        refuse_untold_windows(self.model, probe.windows)
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        if not difference <= _PROBE_TOLERANCE.get(actual.dtype, 1e-3):
            raise self._unsupported(
                "a prompt that our attention and ops compute in two steps, one beside another "
                f"prompt, gets other logits than its own at once (by {difference:.1e})"
            )

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model family {self.family!r} cannot be served: {reason}")


def refuse_state(model: Any) -> None:
    """Raise ``UnsupportedModelError`` where transformers itself says that a family keeps state."""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"model family {model.config.model_type!r} cannot be served: it keeps recurrent state, "
            "which is neither paged nor handed over"
        )


def refuse_untold_windows(model: Any, told: Mapping[int, int | None]) -> None:
    """Raise ``UnsupportedModelError`` where layers have a sliding window by their mask alone.

    We read no masks, and a probe's prompt is too short to show what lies outside a window.

    Args:
        model: Of transformers.
        told: The window that each layer hands to its attention.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    masks = _WINDOW_MASK in vars(sys.modules[type(model).__module__])
    if not masks or not window or window >= max_context_tokens(config):
        return
    types = getattr(config, "layer_types", None)  # where there are none, all layers are alike
    slides = [layer for layer in told if not types or types[layer] == "sliding_attention"]
    if any(told[layer] is None for layer in slides):
        raise UnsupportedModelError(
            f"model family {model.config.model_type!r} cannot be served with a sliding window of "
            f"{window} tokens: it tells the window by a mask alone, and masks are not read"
        )


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
