"""The five scheduler gauges of vLLM, for gateways that know those names and route by them.

    vllm:num_requests_waiting  vllm:num_requests_running  vllm:kv_cache_usage_perc
    vllm:cache_config_info     vllm:lora_requests_info    (no adapters are served)

A worker says what it has, an ingress what all workers that generate have together: read one or the
other, and do not add them up. ``kv_cache_usage_perc`` is a ratio between 0 and 1, as vLLM's is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from antiphon.metrics import gauge_family


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What one worker adds to the gauges."""

    num_waiting: int
    num_running: int
    num_used_blocks: int
    num_blocks: int
    block_size: int


class VllmCollector(Collector):
    """Renders what ``states`` returns.

    Args:
        model_name: Label of every sample.
        states: One for each worker; called when Prometheus scrapes.
    """

    def __init__(self, model_name: str, states: Callable[[], Sequence[WorkerState]]) -> None:
        self._model_name = model_name
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Yield the five families."""
        states = self._states()
        num_blocks = sum(state.num_blocks for state in states)
        num_used = sum(state.num_used_blocks for state in states)
        for name, text, value in (
            ("num_requests_waiting", "Requests without KV blocks.", _sum(states, "num_waiting")),
            ("num_requests_running", "Requests with KV blocks.", _sum(states, "num_running")),
            ("kv_cache_usage_perc", "1 is full.", num_used / num_blocks if num_blocks else 0.0),
        ):
            yield self._gauge(name, text, {}, value)
        sizes = sorted({state.block_size for state in states})
        config = {"block_size": str(sizes[0] if sizes else 0), "num_gpu_blocks": str(num_blocks)}
        yield self._gauge("cache_config_info", "Of the KV cache.", config, 1)
        adapters = dict.fromkeys(("running_lora_adapters", "waiting_lora_adapters"), "")
        yield self._gauge("lora_requests_info", "None.", {"max_lora": "0", **adapters}, 1)

    def _gauge(self, name: str, text: str, labels: dict[str, str], value: float) -> Metric:
        names = ["model_name", *labels]
        return gauge_family(
            f"vllm:{name}", text, names, {(self._model_name, *labels.values()): value}
        )


def _sum(states: Sequence[WorkerState], name: str) -> int:
    return sum(getattr(state, name) for state in states)
