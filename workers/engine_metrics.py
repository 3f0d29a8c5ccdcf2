"""An engine's state and counters for Prometheus, read when it scrapes."""

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from antiphon.metrics import Values, counter_family, gauge_family
from antiphon.vllm_names import WorkerState
from antiphon.workers.engine import Engine


class EngineCollector(Collector):
    """Renders an engine.

    Args:
        role: Label of every sample.
        engine: Read from the scraping thread.
    """

    def __init__(self, role: str, engine: Engine) -> None:
        self._role = role
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        stats = self._engine.stats
        for name, (text, count) in {
            "antiphon_engine_steps": ("Steps taken.", stats.num_steps),
            "antiphon_engine_step_failures": ("Steps that failed.", stats.step_failures),
            "antiphon_graph_steps": ("Steps from a CUDA graph.", stats.num_graph_steps),
            "antiphon_prompt_tokens": ("Prompt tokens computed here.", stats.num_prompt_tokens),
            "antiphon_cached_tokens": (
                "Prompt tokens found in this worker's prefix cache.",
                stats.num_cached_tokens,
            ),
            "antiphon_generation_tokens": ("Tokens sampled here.", stats.num_generated_tokens),
            "antiphon_preemptions": ("Requests preempted.", stats.num_preemptions),
        }.items():
            yield counter_family(name, text, ["role"], self._alone(count))
        yield stats.step_seconds.family(
            "antiphon_engine_step_seconds",
            "Steps that succeeded: of decoding requests, of prompts, of both (mixed).",
            self._role,
            "kind",
        )
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        engine, load = self._engine, self._engine.last_load
        blocks = engine.pool.counts
        for name, (text, value) in {
            "antiphon_requests_running": (
                "Requests with KV blocks: computing, or with KV on its way.",
                load.num_running,
            ),
            "antiphon_requests_waiting": ("Requests without KV blocks yet.", engine.num_waiting),
            "antiphon_kv_cache_usage_ratio": (
                "KV blocks that requests hold, of all.",
                blocks["held"] / sum(blocks.values()),
            ),
            "antiphon_decode_step_seconds": (
                "A step without prompt tokens, smoothed.",
                load.decode_step_seconds,
            ),
            "antiphon_prefill_tokens_per_second": (
                "Prompt tokens in a step that has many, smoothed.",
                load.prefill_tokens_per_second,
            ),
            "antiphon_engine_last_step_age_seconds": (
                "Since the last step began, while there is work; 0 without.",
                engine.last_step_age_seconds,
            ),
        }.items():
            yield gauge_family(name, text, ["role"], self._alone(value))
        yield gauge_family(
            "antiphon_kv_cache_blocks",
            "KV blocks: held by requests, cached for later ones, free.",
            ["role", "state"],
            {(self._role, state): count for state, count in blocks.items()},
        )

    def _alone(self, value: float) -> Values:
        return {(self._role,): value}


def worker_state(engine: Engine) -> WorkerState:
    """What vLLM's names say of an engine."""
    return WorkerState(
        num_waiting=engine.num_waiting,
        num_running=engine.last_load.num_running,
        num_used_blocks=engine.pool.counts["held"],
        num_blocks=engine.pool.num_blocks,
        block_size=engine.pool.block_size,
    )
