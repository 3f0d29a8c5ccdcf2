"""Every metric is listed in docs/monitoring.md, with few words for each label, and counters have a
sample for each of them at once.

``tests/monitoring/test_live.py`` holds the words against a system with many faults.
"""

import asyncio
from collections import defaultdict

import pytest
from listed_metrics import combinations, metric_labels, metric_rows
from pools import start
from tiny_models import tiny_model

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import Role
from antiphon.metrics import Metrics

LISTED = metric_labels()


def counted(metrics: Metrics) -> dict[str, set[tuple[str, ...]]]:
    """Label values of every counter that counts something by words, and not seconds."""
    found: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for family in metrics.registry.collect():
        name = f"{family.name}_total"
        if family.type == "counter" and combinations(LISTED[name]) and "seconds" not in name:
            for sample in family.samples:
                if sample.name == name:
                    assert sample.value == 0, sample
                    found[name].add(tuple(sample.labels[label] for label in LISTED[name]))
    return found


async def of_a_worker() -> dict[str, set[tuple[str, ...]]]:
    worker = await start(Role.DECODE, tiny_model("llama"))
    found = counted(worker.metrics)
    await worker.close()
    return found


def names_of(metrics: Metrics) -> set[str]:
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in metrics.registry.collect()
    }


def test_every_metric_is_listed_and_in_one_kind_of_process() -> None:
    async def scenario() -> tuple[set[str], set[str]]:
        worker = await start(Role.DECODE, tiny_model("llama"), vllm_names=True)
        metrics = IngressMetrics()
        ClusterBackend("tiny", RouterConfig(), {Role.DECODE}, metrics)
        names = names_of(worker.metrics), names_of(metrics)
        await worker.close()
        return names

    of_worker, of_ingress = asyncio.run(scenario())
    assert of_worker & of_ingress == {"antiphon_trace_spans_total"}  # each counts its own
    assert sorted(metric_rows()) == sorted(of_worker | of_ingress)


@pytest.mark.parametrize("side", ["ingress", "worker"])
def test_counters_start_at_0_under_the_words_that_are_listed(side: str) -> None:
    targets = RouterConfig(target_ttft_seconds=1.0, target_itl_seconds=1.0)
    found = counted(IngressMetrics(targets)) if side == "ingress" else asyncio.run(of_a_worker())
    assert len(found) >= 6
    assert found == {name: combinations(LISTED[name]) for name in found}


def test_the_page_is_read() -> None:
    assert LISTED["antiphon_refusals_total"] == {"reason": {"busy", "draining"}}
    assert LISTED["antiphon_router_index_blocks"] == {"worker": None}
    assert LISTED["antiphon_requests_in_progress"] == {}
    assert LISTED["antiphon_handoff_link_seconds_total"].keys() == {"direction", "peer"}
