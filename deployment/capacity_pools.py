"""The two pools and the links between them, each sized by ``GpuModel`` for one demand.

Waits are the 90th percentile of a queue with random arrivals and equal service times (M/D/1): the
share of requests that wait longer than t is about ``load * exp(-2 * (1 - load) * t / service)``.
Each worker is taken as a queue of its own; the router does better, because it sees the queues.
All requests have the mean length, and no prefix is found in a cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from antiphon.deployment.capacity_model import GpuModel, Memory, kv_bytes_per_token
from antiphon.errors import ConfigError

_MISSED_SHARE = 0.1  # of requests that may wait longer than planned


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for."""

    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float
    prompt_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output, for which a request holds KV at its end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def mean_context_tokens(self) -> float:
        """Of a request while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True)
class DecodePool:
    """The decode workers.

    Attributes:
        floor_seconds: A step with one request: no TPOT below it.
        num_fitting_requests: For which one worker's cache has room.
        max_batch: The largest that fits and whose step stays inside the TPOT.
        max_batch_seconds: Its step.
        num_workers: Of the pool.
        num_workers_for_links: That links alone would want.
        batch: Requests that run on each at the asked rate.
        step_seconds: Their step, which is the TPOT.
    """

    floor_seconds: float
    num_fitting_requests: int
    max_batch: int
    max_batch_seconds: float
    num_workers: int
    num_workers_for_links: int
    batch: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class PrefillPool:
    """The prefill workers; ``load`` is the share of its time that each computes."""

    prompt_seconds: float
    num_workers: int
    num_workers_for_links: int
    load: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Links:
    """KV between the pools.

    Attributes:
        bytes_per_request: Sent for one prompt.
        total_bytes_per_second: Of all requests.
        wait_seconds: For earlier prompts' KV, at the busier end.
        exposed_seconds: Of one transfer, after the prompt is computed.
        least_bytes_per_second: With which every latency would just be met, without waits for links.
    """

    bytes_per_request: int
    total_bytes_per_second: float
    wait_seconds: float
    exposed_seconds: float
    least_bytes_per_second: float


def tail_wait_seconds(load: float, service_seconds: float) -> float:
    """The wait that nine of ten requests do not exceed, at a load below 1."""
    if load <= _MISSED_SHARE:
        return 0.0
    return service_seconds * math.log(load / _MISSED_SHARE) / (2 * (1 - load))


def decode_pool(model: GpuModel, demand: Demand, memory: Memory) -> DecodePool:
    """Size the decode pool.

    Raises:
        ConfigError: No step is short enough, or no request fits; says what to change.
    """
    context = demand.mean_context_tokens

    def step(batch: int) -> float:
        return model.decode_step_seconds(batch, context)

    if step(1) > demand.tpot_seconds:
        read = model.decode_step_bytes(1, context) / 1e9
        raise ConfigError(
            f"--tpot: {milliseconds(demand.tpot_seconds)} is below what {model.gpu.name} can do: "
            f"one request alone takes {milliseconds(step(1))} a step, to read {read:.1f} GB. "
            "Choose a GPU with more bandwidth, a smaller model or --dtype, or a longer time"
        )
    fitting = memory.kv_tokens // demand.num_tokens
    if fitting < 1:
        raise ConfigError(
            f"no request fits: {demand.num_tokens} tokens of KV take "
            f"{demand.num_tokens * memory.kv_per_token / 1e9:.1f} GB, and the cache has "
            f"{memory.kv_cache / 1e9:.1f} GB. Choose a GPU with more memory, --kv-cache-dtype "
            "int8, or shorter requests"
        )
    largest = _last(lambda batch: step(batch) <= demand.tpot_seconds, fitting)
    needed = demand.requests_per_second * demand.output_tokens
    planned = model.assumptions.utilisation * largest / step(largest)
    for_links = _num_for_links(model, demand)
    num_workers = max(math.ceil(needed / planned), for_links)
    pool = DecodePool(
        step(1), fitting, largest, step(largest), num_workers, for_links, 0, 0.0
    )  # fmt: skip
    return with_batch(model, demand, pool)


def with_batch(model: GpuModel, demand: Demand, pool: DecodePool) -> DecodePool:
    """Find the batch at which each worker makes as many tokens as are asked of it."""
    context = demand.mean_context_tokens
    needed = demand.requests_per_second * demand.output_tokens / pool.num_workers

    def is_too_slow(batch: int) -> bool:
        return batch / model.decode_step_seconds(batch, context) < needed

    batch = 1 if not is_too_slow(1) else _last(is_too_slow, pool.max_batch) + 1
    return replace(
        pool, batch=batch, step_seconds=model.decode_step_seconds(batch, context)
    )  # fmt: skip


def _last(holds: Callable[[int], bool], largest: int) -> int:
    """The last number up to ``largest`` for which something holds that holds for 1, then ceases."""
    low, high = 1, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _num_for_links(model: GpuModel, demand: Demand) -> int:
    total = demand.requests_per_second * _bytes_per_request(model, demand)
    rate = model.assumptions.link_bytes_per_second * model.assumptions.utilisation
    return math.ceil(total / rate)


def _bytes_per_request(model: GpuModel, demand: Demand) -> int:
    return _prefill_tokens(demand) * kv_bytes_per_token(model.shape, model.formats.wire)


def _prefill_tokens(demand: Demand) -> int:
    """The last token of a prompt is an ordinary decode step."""
    return demand.prompt_tokens - 1


def least_prefill(model: GpuModel, demand: Demand) -> int:
    """Prefill workers that the rate alone wants, whatever the wait."""
    seconds = model.prefill_seconds(_prefill_tokens(demand))
    busy = demand.requests_per_second * seconds / model.assumptions.utilisation
    return max(math.ceil(busy), _num_for_links(model, demand))


def prefill_pool(model: GpuModel, demand: Demand, num_workers: int) -> PrefillPool:
    """A prefill pool of so many workers."""
    seconds = model.prefill_seconds(_prefill_tokens(demand))
    load = demand.requests_per_second * seconds / num_workers
    wait = tail_wait_seconds(load, seconds)
    return PrefillPool(seconds, num_workers, _num_for_links(model, demand), load, wait)


def links_between(
    model: GpuModel, demand: Demand, prefill: PrefillPool, decode: DecodePool
) -> Links:
    """What the links between two pools carry."""
    rate, size = model.assumptions.link_bytes_per_second, _bytes_per_request(model, demand)
    total = demand.requests_per_second * size
    fewest = min(prefill.num_workers, decode.num_workers)
    num_steps = model.num_prefill_steps(_prefill_tokens(demand))
    # All but the last step's KV can be sent while later tokens are computed.
    hidden = prefill.prompt_seconds * (num_steps - 1) / num_steps
    transfer = size / rate
    slack = demand.ttft_seconds - (
        model.assumptions.request_overhead_seconds
        + prefill.wait_seconds
        + prefill.prompt_seconds
        + 2 * decode.step_seconds
    )
    least = max(size / num_steps / slack, size / (slack + hidden)) if slack > 0 else math.inf
    return Links(
        bytes_per_request=size,
        total_bytes_per_second=total,
        wait_seconds=tail_wait_seconds(total / fewest / rate, transfer),
        exposed_seconds=max(transfer / num_steps, transfer - hidden),
        least_bytes_per_second=max(least, total / fewest / model.assumptions.utilisation),
    )


def milliseconds(seconds: float) -> str:
    """For messages."""
    return f"{seconds * 1e3:.1f} ms"
