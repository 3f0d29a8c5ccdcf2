"""An engine step against a bare transformers forward on the same batch, one thread, in turn."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.messages import SamplingParams
from antiphon.workers.block_pool import BlockPool
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.scheduler import Scheduler, SchedulerConfig

CONTEXT = 512
BLOCK_SIZE = 16
SEED = 0


def step_ratios(folder: str, pairs: int) -> dict[str, dict[str, float]]:
    """Time prefill of 512 tokens and decode at batch 1, 8 and 32; seconds and their ratio."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    ours = PagedModel(_load(folder), TorchKernels())
    bare = _load(folder)
    bare.set_attn_implementation("sdpa")
    results = {"prefill_512": _compare(_engine_prefill(ours), _bare_prefill(bare), pairs)}
    for batch_size in (1, 8, 32):
        engine, forward = _engine_decode(ours, batch_size), _bare_decode(bare, batch_size)
        results[f"decode_{batch_size}"] = _compare(engine, forward, pairs)
    return results


def decode_stepper(folder: str, batch_size: int) -> Callable[[], object]:
    """A function that takes one decode step at context 512, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    return _engine_decode(PagedModel(_load(folder), TorchKernels()), batch_size)


def _load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _compare(
    engine: Callable[[], object], forward: Callable[[], object], pairs: int
) -> dict[str, float]:
    """Run both in turn, so that whatever else the machine does hits both; medians."""
    times: dict[str, list[float]] = {"engine": [], "transformers": []}
    for index in range(pairs + 1):
        for name, function in (("engine", engine), ("transformers", forward)):
            started = time.perf_counter()
            function()
            if index:  # the first pair warms up
                times[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["engine"], times["transformers"], strict=True)]
    return {
        "engine_seconds": statistics.median(times["engine"]),
        "transformers_seconds": statistics.median(times["transformers"]),
        "ratio": statistics.median(ratios),
    }


def _engine_prefill(model: PagedModel) -> Callable[[], object]:
    cache = KVCache(
        model.layout, 4 * CONTEXT // BLOCK_SIZE, BLOCK_SIZE, model.device, model.kernels
    )
    pool = BlockPool(cache.num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(SchedulerConfig(prefix_cache=False), pool)
    runner = ModelRunner(model, cache)

    def run() -> None:
        scheduler.add(Request("p", _prompt(CONTEXT), SamplingParams(max_tokens=1, temperature=0)))
        _step(scheduler, runner)
        assert len(scheduler.queues) == 0

    return run


def _bare_prefill(model: Any) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> None:
        model(torch.tensor([_prompt(CONTEXT)]), use_cache=True, logits_to_keep=1)

    return run


def _engine_decode(model: PagedModel, batch_size: int) -> Callable[[], object]:
    num_blocks = batch_size * 2 * CONTEXT // BLOCK_SIZE
    cache = KVCache(model.layout, num_blocks, BLOCK_SIZE, model.device, model.kernels)
    for tensor in (t for kv in cache.layers for t in (kv.keys, kv.values)):
        tensor.normal_(0, 0.1)
    config = SchedulerConfig(prefix_cache=False, max_awaiting_kv=batch_size)
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK_SIZE))
    for index in range(batch_size):
        sampling = SamplingParams(max_tokens=CONTEXT // 2, temperature=0)
        prompt = _prompt(CONTEXT + 1)
        scheduler.add(Request(f"r{index}", prompt, sampling, PrefillPath.REMOTE))
    scheduler.schedule()
    for request in scheduler.take_reserved():
        scheduler.kv_arrived(request.request_id, CONTEXT, PrefillPath.REMOTE, 0.0)
    runner = ModelRunner(model, cache)
    return lambda: _step(scheduler, runner)


def _bare_decode(model: Any, batch_size: int) -> Callable[[], object]:
    config = model.config
    shape = (batch_size, config.num_key_value_heads, CONTEXT, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape) * 0.1, torch.randn(shape) * 0.1, layer)
    input_ids = torch.tensor([[_prompt(1)[0]]]).expand(batch_size, 1)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids, past_key_values=cache, use_cache=True)

    return run


def _step(scheduler: Scheduler, runner: ModelRunner) -> None:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.complete(batch, runner.run(batch), time.monotonic())


def _prompt(num_tokens: int) -> list[int]:
    return [(index * 37 + 11) % 40_000 for index in range(num_tokens)]
