"""How many workers of each pool meet a rate of requests and two latencies.

    TTFT  =  request overhead + wait for prefill + prefill + wait for the link + exposed transfer
             + 2 decode steps, the one that runs and the first own one

Pools begin with what throughput wants. Then workers are added where they shorten a wait, until the
time to the first token is met; waits vanish at low load, so that ends.
"""

from dataclasses import dataclass, replace

from antiphon.deployment.capacity_model import GpuModel, Memory
from antiphon.deployment.capacity_pools import (
    DecodePool,
    Demand,
    Links,
    PrefillPool,
    decode_pool,
    least_prefill,
    links_between,
    milliseconds,
    prefill_pool,
    with_batch,
)
from antiphon.errors import ConfigError

_ADVICE = {
    "prefill": "a GPU with more FLOPs, or a smaller model",
    "transfer": "faster links (--link-bytes-per-second) or --wire-dtype int8",
    "two decode steps": "a GPU with more bandwidth, or a smaller model",
    "the request itself": "a longer time",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked, and what meets it."""

    model: GpuModel
    demand: Demand
    memory: Memory
    decode: DecodePool
    prefill: PrefillPool
    links: Links
    ttft_seconds: float

    @property
    def num_gpus(self) -> int:
        """Of both pools; a worker is one GPU."""
        return self.prefill.num_workers + self.decode.num_workers


def make_plan(model: GpuModel, demand: Demand) -> Plan:
    """Size both pools.

    Raises:
        ConfigError: No number of workers can meet the demand; says why, and what to change.
    """
    _check(model, demand)
    memory = model.memory()
    decode = decode_pool(model, demand, memory)
    plan = _with_workers(model, demand, memory, decode, least_prefill(model, demand))
    if sum(_unavoidable(plan, decode.floor_seconds).values()) > demand.ttft_seconds:
        raise _ttft_error(plan, decode.floor_seconds, "at no load")
    while plan.ttft_seconds > demand.ttft_seconds:
        if plan.prefill.wait_seconds + plan.links.wait_seconds == 0:
            raise _ttft_error(plan, plan.decode.step_seconds, "without any wait")
        plan = _enlarge(plan)
    return plan


def _check(model: GpuModel, demand: Demand) -> None:
    limit = model.shape.max_context_tokens
    if demand.num_tokens > limit:
        raise ConfigError(
            f"a request of {demand.num_tokens} tokens exceeds the model's context of {limit}: "
            "choose less --prompt-tokens or --output-tokens"
        )
    if model.formats.kv_cache == "fp8" and model.gpu.architecture == "sm_80":
        raise ConfigError(f"--kv-cache-dtype: got fp8, which {model.gpu.name} lacks; use int8")


def _with_workers(
    model: GpuModel, demand: Demand, memory: Memory, decode: DecodePool, num_prefill: int
) -> Plan:
    prefill = prefill_pool(model, demand, num_prefill)
    links = links_between(model, demand, prefill, decode)
    ttft = (
        model.assumptions.request_overhead_seconds
        + prefill.wait_seconds
        + prefill.prompt_seconds
        + links.wait_seconds
        + links.exposed_seconds
        + 2 * decode.step_seconds
    )
    return Plan(model, demand, memory, decode, prefill, links, ttft)


def _enlarge(plan: Plan) -> Plan:
    """Add a worker where it shortens the longer wait."""
    decode, num_prefill = plan.decode, plan.prefill.num_workers
    link_waits_longer = plan.links.wait_seconds > plan.prefill.wait_seconds
    if link_waits_longer and decode.num_workers < num_prefill:
        larger = replace(decode, num_workers=decode.num_workers + 1)
        decode = with_batch(plan.model, plan.demand, larger)
    else:
        num_prefill += 1
    return _with_workers(plan.model, plan.demand, plan.memory, decode, num_prefill)


def _unavoidable(plan: Plan, step_seconds: float) -> dict[str, float]:
    """Parts of the time to the first token that no number of workers shortens, in seconds."""
    return {
        "prefill": plan.prefill.prompt_seconds,
        "transfer": plan.links.exposed_seconds,
        "two decode steps": 2 * step_seconds,
        "the request itself": plan.model.assumptions.request_overhead_seconds,
    }


def _ttft_error(plan: Plan, step_seconds: float, when: str) -> ConfigError:
    parts = _unavoidable(plan, step_seconds)
    spelled = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts.items())
    return ConfigError(
        f"--ttft: {milliseconds(plan.demand.ttft_seconds)} cannot be met with any number of GPUs; "
        f"{when} it is {milliseconds(sum(parts.values()))}: {spelled}. What helps most: "
        f"{_ADVICE[max(parts, key=lambda name: parts[name])]}"
    )
