"""What transformers' layers say of their attention, and who hears it."""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.paged_kv import Rotary
from antiphon.workers.attention_interface import ATTENTION_NAME, attending, defer_rotation

FORWARD: Any = AttentionInterface()[ATTENTION_NAME]


class Listener:
    """Notes what it is given, and answers with the values."""

    def __init__(self) -> None:
        self.rotary: Rotary | None = None
        self.positions = torch.empty(0)
        self.heard: list[tuple[int, torch.Size, AttentionFeatures]] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: AttentionFeatures
    ) -> Tensor:
        assert query.is_contiguous()
        assert key.is_contiguous()
        self.heard.append((layer, query.shape, features))
        return value


def layer(index: int, **config: Any) -> Any:
    return SimpleNamespace(layer_idx=index, config=SimpleNamespace(**config))


def test_heads_and_tokens_change_places_and_features_are_named() -> None:
    q, k, v = torch.rand(1, 4, 5, 16), torch.rand(1, 2, 5, 16), torch.rand(1, 2, 5, 8)
    listener = Listener()
    with attending(listener):
        output, weights = FORWARD(layer(3), q, k, v, None, sliding_window=7, softcap=50.0)
        FORWARD(layer(4), q, k, v, None, scaling=0.5)
    assert weights is None
    assert torch.equal(output, v.transpose(1, 2))
    (first, shape, features), (_, _, scaled) = listener.heard
    assert (first, tuple(shape)) == (3, (5, 4, 16))
    assert (features.scale, features.sliding_window, features.soft_cap) == (0.25, 7, 50.0)
    assert features.chunk is None
    assert scaled.scale == 0.5


def test_chunked_layers_are_known_by_the_configuration() -> None:
    config = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64}
    x = torch.rand(1, 2, 3, 8)
    listener = Listener()
    with attending(listener):
        for index in (0, 1):
            FORWARD(layer(index, **config), x, x, x, None)
    assert [features.chunk for _, _, features in listener.heard] == [64, None]


def test_only_who_attends_is_told_and_the_one_before_comes_back() -> None:
    cos, sin = torch.rand(1, 3, 8), torch.rand(1, 3, 8)
    outer, inner = Listener(), Listener()
    assert not defer_rotation(cos, sin)
    with attending(outer):
        with contextlib.suppress(RuntimeError), attending(inner):
            assert defer_rotation(cos, sin)
            raise RuntimeError("the step failed")
        assert outer.rotary is None
        assert defer_rotation(cos, sin)
    for listener in (outer, inner):
        assert listener.rotary is not None
        assert torch.equal(listener.rotary.cos, cos[0])
    assert not defer_rotation(cos, sin)
