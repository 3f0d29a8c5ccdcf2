"""How many KV blocks a worker gets."""

import os
import re
from pathlib import Path

import torch

from antiphon.config import EngineConfig
from antiphon.errors import ConfigError
from antiphon.workers.kv_cache import KVLayout

# On a CPU several workers and Ray share one memory, so a worker takes a modest part of what is
# free; on a GPU it owns the device, or its part of it, and leaves room for activations.
_CPU_SHARE = 0.05
_CPU_MAX_BYTES = 512 * 2**20
_GPU_SHARE = 0.85
_MEMINFO = Path("/proc/meminfo")


def num_kv_blocks(
    layout: KVLayout,
    engine: EngineConfig,
    device: torch.device,
    max_context_tokens: int,
    gpu_share: float = 1.0,
) -> int:
    """Divide the memory for KV, set or derived, into blocks.

    Args:
        gpu_share: Of the GPU that is this worker's; others may take theirs at the same time.

    Raises:
        ConfigError: Not even a handful of tokens fit; names what is needed.
    """
    block_bytes = layout.num_bytes_per_token * engine.block_size
    if engine.kv_cache_bytes is not None:
        total = int(engine.kv_cache_bytes)
    else:
        total = _derived_bytes(device, gpu_share)
    num_blocks = total // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"engine.kv_cache_bytes: {total} bytes hold {num_blocks} blocks of {engine.block_size} "
            f"tokens; this model needs {layout.num_bytes_per_token} bytes per token and "
            f"{layout.num_bytes_per_token * max_context_tokens} for one full context"
        )
    return num_blocks


def _derived_bytes(device: torch.device, gpu_share: float) -> int:
    if device.type == "cuda":
        # torch keeps what was freed, here the weights that merged ones have replaced: 7.5 GB of
        # Llama 3 8B, 36 GB of Qwen2.5 32B. It would count as used.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # Of a part what this worker has not used yet, whether others have taken theirs or not.
        own = total * gpu_share - torch.cuda.memory_reserved(device)
        return int(max(min(free, own), 0) * _GPU_SHARE)
    return int(min(_available_bytes() * _CPU_SHARE, _CPU_MAX_BYTES))


def _available_bytes() -> int:
    """Memory that can be had without swapping: free, or a cache of files such as the weights."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
