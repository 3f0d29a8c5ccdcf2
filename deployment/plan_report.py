"""Writes a plan: arithmetic for people, numbers for programs, the configuration for both."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import yaml

from antiphon.config import HandoffConfig, HttpConfig
from antiphon.deployment.capacity_model import ITEM_BYTES
from antiphon.deployment.capacity_plan import Plan
from antiphon.deployment.capacity_pools import milliseconds

_MARGIN = 2.0  # limits on what is in flight, over the mean


def as_json(plan: Plan, source: str) -> dict[str, Any]:
    """Everything that was asked, assumed and found; seconds, bytes and tokens."""
    shape = plan.model.shape
    return {
        "model": {**asdict(shape), "layers": len(shape.layers), "source": source},
        "gpu": asdict(plan.model.gpu),
        "formats": asdict(plan.model.formats),
        "assumptions": asdict(plan.model.assumptions),
        "demand": asdict(plan.demand),
        "memory": asdict(plan.memory),
        "decode": asdict(plan.decode),
        "prefill": asdict(plan.prefill),
        "links": asdict(plan.links),
        "ttft_seconds": plan.ttft_seconds,
        "tpot_seconds": plan.decode.step_seconds,
        "num_gpus": plan.num_gpus,
        "config": configuration(plan, source),
    }


def configuration(plan: Plan, source: str) -> dict[str, Any]:
    """The document that runs it; says only what differs from the defaults."""
    formats = plan.model.formats
    engine: dict[str, Any] = {}
    if formats.kv_cache != formats.weights:
        engine["kv_cache_dtype"] = formats.kv_cache
    decode_engine = {**engine, "max_num_requests": plan.decode.max_batch}
    handoff: dict[str, Any] = {}
    if formats.wire != formats.weights:
        handoff["wire_dtype"] = formats.wire
    rate = plan.demand.requests_per_second
    pending = math.ceil(_MARGIN * rate * plan.ttft_seconds / plan.decode.num_workers)
    if pending > HandoffConfig().max_pending:
        handoff["max_pending"] = pending
    prefill = {"replicas": plan.prefill.num_workers, "num_gpus": 1, "engine": engine}
    decode = {"replicas": plan.decode.num_workers, "num_gpus": 1, "engine": decode_engine}
    document = {
        "model": {"source": source, "dtype": formats.weights},
        "prefill": {key: value for key, value in prefill.items() if value != {}},
        "decode": decode,
        "handoff": handoff,
        "router": {"link_bytes_per_second": plan.model.assumptions.link_bytes_per_second},
        "http": _http(plan),
    }
    return {key: value for key, value in document.items() if value}


def _http(plan: Plan) -> dict[str, int]:
    seconds = plan.ttft_seconds + plan.demand.output_tokens * plan.decode.step_seconds
    at_once = math.ceil(_MARGIN * plan.demand.requests_per_second * seconds)
    is_more = at_once > HttpConfig().max_concurrent_requests
    return {"max_concurrent_requests": at_once} if is_more else {}


def as_text(plan: Plan, source: str) -> str:
    """A page that shows the arithmetic, with every assumption."""
    parts = (
        _head(plan, source), _memory(plan), _decode(plan), _prefill(plan), _first_token(plan),
        _links(plan), _end(plan, source),
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts)


def _head(plan: Plan, source: str) -> Iterator[str]:
    shape, gpu, demand = plan.model.shape, plan.model.gpu, plan.demand
    pools = f"{plan.prefill.num_workers} prefill, {plan.decode.num_workers} decode"
    yield f"{plan.num_gpus} x {gpu.name}: {pools}"
    yield "A model of data sheets and the assumptions below; nothing here was measured."
    yield ""
    yield (
        f"Model   {source}: {shape.family}, {shape.num_parameters / 1e9:.2f} billion parameters in "
        f"{plan.model.formats.weights}, {shape.num_active_parameters / 1e9:.2f} per token"
    )
    yield (
        f"GPU     {gpu.source}: {gpu.memory_bytes / 1e9:.0f} GB, {gpu.bytes_per_second / 1e12:.2f} "
        f"TB/s, {plan.model.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    if not gpu.is_served:
        yield f"        workers of this version refuse {gpu.name}: no kernels are tuned for it"
    yield (
        f"Asked   {demand.requests_per_second:g} requests/s of {demand.prompt_tokens} + "
        f"{demand.output_tokens} tokens, TTFT {milliseconds(demand.ttft_seconds)}, "
        f"TPOT {milliseconds(demand.tpot_seconds)}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, demand = plan.memory, plan.demand
    share = 1 - plan.model.assumptions.kv_share
    yield "Memory of one GPU"
    yield f"  {memory.total / 1e9:8.1f} GB  in all"
    yield f"- {memory.runtime / 1e9:8.1f} GB  driver's context and libraries"
    yield (
        f"- {memory.weights / 1e9:8.1f} GB  weights: {plan.model.shape.num_parameters:,} "
        f"parameters x {ITEM_BYTES[plan.model.formats.weights]} bytes"
    )
    yield f"- {memory.activations / 1e9:8.1f} GB  activations: {share:.0%} of what is left"
    yield (
        f"= {memory.kv_cache / 1e9:8.1f} GB  KV cache: at {memory.kv_per_token:,} bytes per token "
        f"{memory.kv_tokens:,} tokens, {memory.kv_tokens // demand.num_tokens:,} requests of "
        f"{demand.num_tokens:,}"
    )


def _decode(plan: Plan) -> Iterator[str]:
    pool, demand, model = plan.decode, plan.demand, plan.model
    limit = "memory" if pool.max_batch == pool.num_fitting_requests else "TPOT"
    read = model.decode_step_bytes(pool.batch, demand.mean_context_tokens)
    needed = demand.requests_per_second * demand.output_tokens
    links = _because_of_links(pool.num_workers, pool.num_workers_for_links)
    yield "Decode"
    yield f"  one request alone      {milliseconds(pool.floor_seconds)} a step: no TPOT below it"
    yield (
        f"  largest batch          {pool.max_batch}, limited by {limit}: "
        f"{milliseconds(pool.max_batch_seconds)} a step, "
        f"{pool.max_batch / pool.max_batch_seconds:,.0f} tokens/s"
    )
    yield (
        f"  workers                {needed:,.0f} tokens/s at {model.assumptions.utilisation:.0%} "
        f"of that: {pool.num_workers}{links}"
    )
    yield (
        f"  at the asked rate      batch {pool.batch}, {read / 1e9:.1f} GB read a step: TPOT "
        f"{milliseconds(pool.step_seconds)}"
    )


def _because_of_links(num_workers: int, for_links: int) -> str:
    return " (what the links want)" if num_workers == for_links > 1 else ""


def _prefill(plan: Plan) -> Iterator[str]:
    pool, model = plan.prefill, plan.model
    flops = model.prefill_flops(plan.demand.prompt_tokens - 1)
    yield "Prefill"
    yield (
        f"  one prompt             {flops / 1e12:.1f} TFLOP at "
        f"{model.assumptions.compute_share:.0%} of peak: {milliseconds(pool.prompt_seconds)}"
    )
    yield (
        f"  workers                {pool.num_workers}"
        f"{_because_of_links(pool.num_workers, pool.num_workers_for_links)}, busy {pool.load:.0%} "
        "of the time"
    )


def _first_token(plan: Plan) -> Iterator[str]:
    rows = {
        "request overhead": plan.model.assumptions.request_overhead_seconds,
        "wait for prefill": plan.prefill.wait_seconds,
        "prefill": plan.prefill.prompt_seconds,
        "wait for the link": plan.links.wait_seconds,
        "exposed transfer": plan.links.exposed_seconds,
        "two decode steps": 2 * plan.decode.step_seconds,
    }
    yield "Time to the first token, waits as nine of ten requests see them"
    for name, seconds in rows.items():
        yield f"  {name:<22} {milliseconds(seconds)}"
    yield f"  in all                 {milliseconds(plan.ttft_seconds)}"


def _links(plan: Plan) -> Iterator[str]:
    links, num_prefill, num_decode = plan.links, plan.prefill.num_workers, plan.decode.num_workers
    total = links.total_bytes_per_second / 1e9
    yield "Links"
    yield f"  one prompt             {links.bytes_per_request / 1e6:.1f} MB of KV"
    yield (
        f"  on average             {total:.2f} GB/s in all, {total / num_prefill:.2f} out of each "
        f"prefill worker, {total / num_decode:.2f} into each decode worker, "
        f"{total / num_prefill / num_decode:.2f} per pair"
    )
    yield (
        f"  a pair needs           {links.least_bytes_per_second / 1e9:.2f} GB/s at least; assumed "
        f"{plan.model.assumptions.link_bytes_per_second / 1e9:.2f}"
    )


def _end(plan: Plan, source: str) -> Iterator[str]:
    values = plan.model.assumptions
    yield "Assumed"
    yield (
        f"  {values.compute_share:.0%} of peak FLOPs in prefill, {values.memory_share:.0%} of peak "
        "bandwidth in decode"
    )
    yield (
        f"  {milliseconds(values.step_overhead_seconds)} more for every step, "
        f"{milliseconds(values.request_overhead_seconds)} for every request"
    )
    yield (
        f"  at most {values.utilisation:.0%} of each pool and link used; KV sent every "
        f"{values.step_tokens} tokens"
    )
    yield (
        f"  KV cache {values.kv_share:.0%} of what is free after weights and "
        f"{values.runtime_bytes / 1e9:.1f} GB for the driver"
    )
    yield "  all requests of the mean length, arriving at random, no prefix in a cache"
    yield ""
    yield "Configuration"
    document = yaml.safe_dump(configuration(plan, source), sort_keys=False)
    yield from (f"  {line}" for line in document.splitlines())
