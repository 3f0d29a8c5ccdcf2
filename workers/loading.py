"""Loads a model and makes its KV cache as large as the configuration, or the device, allows."""

import logging
import time
from dataclasses import dataclass, replace

import torch

from antiphon.config import EngineConfig, HandoffConfig, ModelConfig
from antiphon.errors import ConfigError
from antiphon.kernels.selection import select_kernels
from antiphon.messages import Role
from antiphon.workers.checkpoint import load_model
from antiphon.workers.decode_graphs import cuda_graph_capture, graph_buckets
from antiphon.workers.kv_cache import KVCache, KVLayout
from antiphon.workers.memory_plan import num_kv_blocks
from antiphon.workers.model_files import fingerprint
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.worker_settings import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what it may hold."""

    runner: ModelRunner
    fingerprint: str
    max_context_tokens: int


def load(settings: WorkerSettings) -> Loaded:
    """Load weights, check the family, and allocate the KV cache; takes seconds, blocks."""
    started_at = time.monotonic()
    engine = settings.engine
    torch.set_num_threads(engine.num_threads)
    device = torch.device(_device_name(engine, settings.num_gpus))
    kernels = select_kernels(device, settings.role.value)
    model = load_model(settings.model_folder, _dtype(settings.model, device), device, kernels)
    limit = _context_limit(settings.model, model)
    layout = cache_layout(model.layout, engine, settings.handoff)
    num_blocks = num_kv_blocks(layout, engine, device, limit, min(1.0, settings.num_gpus))
    # A request must always fit alone, or it could never finish.
    max_context_tokens = min(limit, num_blocks * engine.block_size)
    if max_context_tokens < limit:
        logger.warning(
            "context is %d of %d tokens: engine.kv_cache_bytes holds no more",
            max_context_tokens, limit,
        )  # fmt: skip
    cache = KVCache(layout, num_blocks, engine.block_size, device, kernels)
    runner = ModelRunner(model, cache)
    if device.type == "cuda":
        runner.warm_up()
    generates = settings.role is not Role.PREFILL or settings.target_itl_seconds is not None
    if kernels.captures_graphs and engine.cuda_graphs and generates:
        _capture_graphs(runner, engine)
    logger.info("loaded %s in %.1f s", settings.model_folder, time.monotonic() - started_at)
    return Loaded(runner, fingerprint(settings.model_folder), max_context_tokens)


def _context_limit(config: ModelConfig, model: PagedModel) -> int:
    limit = config.max_context_tokens or model.max_context_tokens
    if limit > model.max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens: got {limit}; the model's own limit is "
            f"{model.max_context_tokens}, from max_position_embeddings and RoPE in its config.json"
        )
    return limit


def _capture_graphs(runner: ModelRunner, engine: EngineConfig) -> None:
    """Capture decode steps; a model that cannot be captured decodes eagerly, which is slower."""
    started_at = time.monotonic()
    buckets = graph_buckets(engine.max_num_requests)
    try:
        runner.capture_graphs(buckets, cuda_graph_capture())
    except torch.OutOfMemoryError as error:
        logger.warning(
            "the GPU has too little memory left to capture decode steps as CUDA graphs, and they "
            "run eagerly (antiphon_graph_steps_total stays 0): lower engine.kv_cache_bytes or "
            "engine.max_num_requests: %s", error,
        )  # fmt: skip
    except RuntimeError as error:
        logger.warning(
            "decode steps of this model cannot be captured as CUDA graphs and run eagerly "
            "(antiphon_graph_steps_total stays 0): %s", error,
        )  # fmt: skip
    else:
        seconds = time.monotonic() - started_at
        logger.info("captured decode steps of %d batch sizes in %.1f s", len(buckets), seconds)


def cache_layout(layout: KVLayout, engine: EngineConfig, handoff: HandoffConfig) -> KVLayout:
    """The model's KV in the dtypes that are configured for the cache and the wire."""
    return replace(
        layout,
        dtype=_kv_dtype(engine.kv_cache_dtype, layout.dtype),
        wire_dtype=_kv_dtype(handoff.wire_dtype, layout.dtype),
    )


def _device_name(engine: EngineConfig, num_gpus: float) -> str:
    """A worker computes on the GPU that is reserved for it, or on none.

    Ray shows a process that reserves no GPU all of them: each such worker would take the first one.
    """
    if engine.device == "cpu":
        return "cpu"
    if not num_gpus and engine.device == "cuda":
        raise ConfigError("engine.device: got 'cuda', but no GPU is reserved; set num_gpus: 1")
    if not num_gpus:
        if torch.cuda.is_available():
            logger.warning("computes on the CPU: there are GPUs, but num_gpus reserves none")
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"num_gpus: {num_gpus:g} is reserved, but torch sees no GPU here; antiphon doctor says "
            "why, and engine.device: cpu does without"
        )
    return "cuda"


def _kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    dtype: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    return dtype


def _dtype(model: ModelConfig, device: torch.device) -> torch.dtype | None:
    if model.dtype == "auto":
        # Without AVX-512 or AMX, half precision matrix products are ten times slower on a CPU.
        return torch.float32 if device.type == "cpu" else None
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype
