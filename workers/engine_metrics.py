"""An engine's counters for Prometheus, read when it scrapes: a step pays nothing for them."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from antiphon.workers.engine import EngineStats


class EngineCollector(Collector):
    """Renders ``EngineStats``.

    Args:
        role: Label of every sample.
        stats: Of the engine; read from the scraping thread.
    """

    def __init__(self, role: str, stats: EngineStats) -> None:
        self._role = role
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield one family per counter."""
        stats = self._stats
        counters = {
            "antiphon_engine_steps": ("Steps taken.", stats.num_steps),
            "antiphon_engine_step_failures": ("Steps that failed.", stats.step_failures),
            "antiphon_decode_steps": ("Steps without prompt tokens.", stats.num_decode_steps),
            "antiphon_graph_steps": ("Of those, from a CUDA graph.", stats.num_graph_steps),
            "antiphon_decode_steps_seconds": ("Time in those.", stats.decode_seconds),
            "antiphon_prompt_tokens": ("Prompt tokens computed here.", stats.num_prompt_tokens),
            "antiphon_generation_tokens": ("Tokens sampled here.", stats.num_generated_tokens),
            "antiphon_preemptions": ("Requests preempted.", stats.num_preemptions),
        }
        for name, (text, value) in counters.items():
            family = CounterMetricFamily(name, text, labels=["role"])
            family.add_metric([self._role], value)
            yield family
