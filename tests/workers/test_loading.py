"""Which device a worker computes on, its part of a GPU's memory, and what is said of graphs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from antiphon.config import EngineConfig, ModelConfig
from antiphon.errors import ConfigError
from antiphon.workers import loading
from antiphon.workers.kv_cache import KVLayout, LayerLayout
from antiphon.workers.loading import _device_name
from antiphon.workers.memory_plan import num_kv_blocks


@pytest.mark.parametrize(
    ("device", "num_gpus", "chosen"),
    [("auto", 0.0, "cpu"), ("auto", 1.0, "cuda"), ("auto", 0.5, "cuda"), ("cuda", 1.0, "cuda"),
     ("cpu", 1.0, "cpu"), ("cpu", 0.0, "cpu")],
)  # fmt: skip
def test_a_worker_takes_a_gpu_that_is_reserved_for_it_and_no_other(
    device: str,
    num_gpus: float,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ray lets a worker that reserves none see all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device_name(EngineConfig(device=device), num_gpus) == chosen  # type: ignore[arg-type]
    is_left_out = device == "auto" and chosen == "cpu"
    assert ("num_gpus reserves none" in caplog.text) == is_left_out


def test_a_gpu_that_was_not_reserved_or_cannot_be_used_is_no_matter_of_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="no GPU is reserved; set num_gpus: 1"):
        _device_name(EngineConfig(device="cuda"), 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="num_gpus: 1 is reserved, but torch sees no GPU"):
        _device_name(EngineConfig(), 1.0)


def test_a_context_beyond_the_models_own_names_what_limits_it() -> None:
    """Whoever adds YaRN to config.json has to raise max_position_embeddings too."""
    model: Any = SimpleNamespace(max_context_tokens=32768)
    assert loading._context_limit(ModelConfig(), model) == 32768
    with pytest.raises(ConfigError, match=r"got 131072; .* 32768, from max_position_embeddings"):
        loading._context_limit(ModelConfig(max_context_tokens=131072), model)


def test_workers_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout((LayerLayout(2, 64, 64),), torch.bfloat16, torch.bfloat16)
    block_bytes = 16 * layout.num_bytes_per_token
    free, weights = 0, 100 * block_bytes

    def num_blocks(share: float) -> int:
        return num_kv_blocks(layout, EngineConfig(), torch.device("cuda"), 1024, share)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1001 * block_bytes))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: weights)
    free = 901 * block_bytes
    assert num_blocks(1.0) == 765
    assert num_blocks(0.5) == 340
    free -= weights + 340 * block_bytes  # the other half is taken
    assert num_blocks(0.5) == 340


def test_what_torch_keeps_of_replaced_weights_goes_to_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = KVLayout((LayerLayout(2, 64, 64),), torch.bfloat16, torch.bfloat16)
    block_bytes = 16 * layout.num_bytes_per_token
    free, reserved = 401 * block_bytes, 600 * block_bytes

    def empty_cache() -> None:
        nonlocal free, reserved
        free, reserved = free + 500 * block_bytes, reserved - 500 * block_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1001 * block_bytes))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert num_kv_blocks(layout, EngineConfig(), torch.device("cuda"), 1024) == 765


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "too little memory left"),
        (RuntimeError("operation not permitted"), "steps of this model cannot be captured"),
    ],
)
def test_a_gpu_that_is_full_is_not_taken_for_a_model_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: RuntimeError,
    words: str,
) -> None:
    def capture_graphs(buckets: Any, capture: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "cuda_graph_capture", lambda: None)
    runner: Any = SimpleNamespace(capture_graphs=capture_graphs)
    loading._capture_graphs(runner, EngineConfig())
    (record,) = caplog.records
    assert words in record.getMessage()
    assert str(error) in record.getMessage()
