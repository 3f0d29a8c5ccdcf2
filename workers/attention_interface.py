"""Brings transformers' layers to an attention of ours, whatever the family.

A model whose attention implementation is ``ATTENTION_NAME`` calls ``_attention_forward`` in every
layer. What to do there is an ``Attender``, which a context variable holds for the length of one
forward pass: transformers hands nothing of ours through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.paged_kv import Rotary

ATTENTION_NAME = "antiphon_paged"


class Attender(Protocol):
    """The attention of every layer in one forward pass."""

    rotary: Rotary | None  # that the next layer's queries and keys are still to be turned by
    positions: Tensor  # [T], of the step's tokens in their prompts

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: AttentionFeatures
    ) -> Tensor:
        """``[T, heads, head_dim]`` each; returns ``[T, num_q_heads, v_head_dim]``."""


_attender: ContextVar[Attender] = ContextVar("antiphon_attender")


@contextmanager
def attending(attender: Attender) -> Iterator[None]:
    """Let models of this thread, or task, attend by it."""
    token = _attender.set(attender)
    try:
        yield
    finally:
        _attender.reset(token)


def defer_rotation(cos: Tensor, sin: Tensor) -> bool:
    """Keep a layer's rotation for its attention; False where nobody of ours attends."""
    attender = _attender.get(None)
    if attender is None:
        return False
    attender.rotary = Rotary(cos[0], sin[0])
    return True


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [1, num_q_heads, T, k_head_dim]
    key: Tensor,  # [1, num_kv_heads, T, k_head_dim]
    value: Tensor,  # [1, num_kv_heads, T, v_head_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx  # type: ignore[assignment]
    features = AttentionFeatures(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        chunk=_attention_chunk(module, layer),
        soft_cap=softcap,
        sinks=s_aux,
    )
    attender = _attender.get()
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
        query = _tuned_by_position(module, query, attender.positions)
    return attender.attend(layer, query, key, value, features)[None], None


def _tuned_by_position(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Llama 4 takes a token's place in the step for its position where it scales these queries."""

    def scale(position: Tensor) -> Tensor:
        steps = torch.floor((position.float() + 1.0) / module.floor_scale)
        scales: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
        return scales

    place = torch.arange(len(positions), device=positions.device)
    ratio = scale(positions) / scale(place)
    return (query * ratio[:, None, None]).to(query.dtype)


def _attention_chunk(module: torch.nn.Module, layer: int) -> int | None:
    """Llama 4 tells its chunked layers through the mask alone; read it from the configuration."""
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
