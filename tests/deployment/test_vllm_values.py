"""What the gauges with vLLM's names say; that they are there is in test_metric_labels.py."""

import asyncio
import threading

import pytest
from crew import watch
from pools import Client, assert_idle, start, until
from tiny_models import tiny_model
from two_pools import backend_over, close

from antiphon.config import EngineConfig
from antiphon.deployment.cluster_metrics import worker_states
from antiphon.messages import Role
from antiphon.vllm_names import VllmCollector, WorkerState
from antiphon.workers.engine_metrics import worker_state

PROMPT = [5 + i for i in range(40)]  # three blocks of 16


def gauges(*states: WorkerState) -> dict[str, float]:
    """Values by the name behind ``vllm:``, of those that count something."""
    families = VllmCollector("mine", lambda: states).collect()
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["model_name"] for sample in samples} == {"mine"}
    names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    values = {sample.name.removeprefix("vllm:"): sample.value for sample in samples}
    return {name: values[name] for name in names}


def test_workers_are_added_up_and_usage_is_that_of_all_blocks() -> None:
    one = WorkerState(num_waiting=1, num_running=5, num_used_blocks=30, num_blocks=40, block_size=8)
    other = WorkerState(
        num_waiting=2, num_running=7, num_used_blocks=6, num_blocks=80, block_size=16
    )
    assert gauges(one, other) == {
        "num_requests_waiting": 3,
        "num_requests_running": 12,
        "kv_cache_usage_perc": pytest.approx(36 / 120),
    }
    assert set(gauges().values()) == {0}
    families = {
        family.name: family for family in VllmCollector("m", lambda: [one, other]).collect()
    }
    (config,) = families["vllm:cache_config_info"].samples
    assert config.labels == {"model_name": "m", "block_size": "8", "num_gpu_blocks": "120"}


def test_a_worker_and_an_ingress_say_how_it_is() -> None:
    async def scenario() -> None:
        engine = EngineConfig(max_num_requests=1)
        decode = await start(Role.DECODE, tiny_model("llama"), engine=engine)
        prefill = await start(Role.PREFILL, tiny_model("llama"))  # it does not generate
        backend = await backend_over(prefill, decode)
        client = await Client.connect(decode)
        goes_on = threading.Event()
        watch(decode, lambda batch: goes_on.wait(0.02) and None)
        running = client.submit(PROMPT, 300)
        waiting = [client.submit(PROMPT, 1) for _ in range(2)]
        await until(lambda: decode.engine.last_load.num_waiting == 2)
        of_worker = worker_state(decode.engine)
        assert (of_worker.num_waiting, of_worker.num_running) == (2, 1)
        assert 3 <= of_worker.num_used_blocks < of_worker.num_blocks == decode.card.num_blocks
        await until(lambda: [state.num_waiting for state in worker_states(backend.view)] == [2])
        (of_view,) = worker_states(backend.view)
        assert (of_view.num_running, of_view.num_blocks) == (1, decode.card.num_blocks)
        assert 3 <= of_view.num_used_blocks < of_view.num_blocks
        goes_on.set()
        await client.finish(running, *waiting)
        await assert_idle(decode)
        assert set(gauges(worker_state(decode.engine)).values()) == {0}
        await close(client.session, backend, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))
