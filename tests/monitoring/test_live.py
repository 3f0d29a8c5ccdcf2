"""A real Prometheus scrapes a real system under load, finds what the dashboards want, and alerts.

The rules are those that are shipped, with every duration divided by 60 (``prometheus_server``); the
scrape configuration is the one in docs/monitoring.md. One test, because the system and its faults
take a minute.
"""

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
from dashboard_queries import alerts, panel_queries, rules
from listed_metrics import metric_labels
from monitored_faults import Faults, lose_colocated
from monitored_system import MonitoredSystem
from prometheus_server import Prometheus, prometheus

JOB = "antiphon"  # of the documented scrape configuration
INTERVAL = "10s"  # for $__rate_interval
NUM_PROCESSES = 7
WAIT_SECONDS = 120.0
SLOW = {"AntiphonHandoffSlow"}  # as long as most hand-offs succeed
BIASED = {"AntiphonPredictionBias"}  # its fault leaves decode workers little to do
# What can only be caused when everything else has been seen.
LOST = {"AntiphonPoolGone", "AntiphonTargetDown"}
HANGING = {"AntiphonNoProgress", "AntiphonEngineStuck"}
DOWN = {"AntiphonDown"}


class Watch:
    """Remembers every alert that has fired."""

    def __init__(self, server: Prometheus) -> None:
        self._server = server
        self.fired: dict[str, str] = {}

    async def run(self) -> None:
        """Look, again and again; what fires for a moment counts."""
        while True:
            self.fired |= await self._server.firing()
            await asyncio.sleep(0.3)

    async def wait_for(self, names: set[str]) -> None:
        """Return once all of these have fired, or report those that did not."""
        deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
        while missing := names - self.fired.keys():
            assert asyncio.get_running_loop().time() < deadline, f"did not fire: {missing}"
            await asyncio.sleep(0.2)


async def every_query_finds_something(server: Prometheus) -> None:
    """Those of panels, variables and recording rules; after a late scrape it may take a while."""
    queries = {query.where: query.expression for query in panel_queries(JOB, INTERVAL)}
    for rule in rules():
        if "record" in rule:
            labels = ", ".join(f'{k}="{v}"' for k, v in rule.get("labels", {}).items())
            queries[f"{rule['record']} {labels}"] = f"{rule['record']}{{{labels}}}"
    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
    while queries := {w: e for w, e in queries.items() if not await server.query(e)}:
        assert asyncio.get_running_loop().time() < deadline, f"nothing found: {queries}"
        await asyncio.sleep(0.5)


async def labels_have_the_words_that_are_listed(server: Prometheus) -> None:
    """After all those faults; other labels are those of the target, or name a worker."""
    listed = metric_labels()
    ours = '{__name__=~"antiphon_.+", __name__!~".+_created"}'  # those say when counting began
    for sample in await server.query(ours):
        name = sample["metric"]["__name__"]
        base = name if name in listed else re.sub("_(bucket|sum|count)$", "", name)
        for label, words in listed[base].items():
            assert words is None or sample["metric"][label] in words, sample


async def every_process_is_a_target_once(server: Prometheus, system: MonitoredSystem) -> None:
    async def is_complete() -> bool:
        targets = await server.targets()
        addresses = [target["labels"]["instance"] for target in targets]
        is_up = all(target["health"] == "up" for target in targets)
        return is_up and len(addresses) == len(set(addresses)) == NUM_PROCESSES

    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
    while not await is_complete():
        assert asyncio.get_running_loop().time() < deadline, await server.targets()
        await asyncio.sleep(0.1)


async def scenario(folder: Path) -> None:
    faults = Faults()
    async with (
        aiohttp.ClientSession() as session,
        faults.system() as system,
        prometheus(folder, f"{system.ingresses[0].url}/metrics/targets") as server,
    ):
        try:
            system.load(session)
            await every_process_is_a_target_once(server, system)
            watch = Watch(server)
            system.spawn(watch.run())
            await faults.disturb(system, session, server)
            await watch.wait_for(SLOW)
            faults.obstruct(system, session)
            names = {rule["alert"] for rule in alerts()}
            await watch.wait_for(names - BIASED - LOST - HANGING - DOWN)
            faults.slow_sessions(system, 1.0)
            await watch.wait_for(BIASED)
            faults.slow_sessions(system, 0.0)
            await every_query_finds_something(server)
            await labels_have_the_words_that_are_listed(server)
            await lose_colocated(system)
            await watch.wait_for(LOST)
            faults.hang(system)
            await watch.wait_for(HANGING)
            watch.fired.pop("AntiphonDown", None)  # it fires until the first scrape, too
            for ingress in system.ingresses:
                await ingress.stop()
            await watch.wait_for(DOWN)
            assert not [text for text in watch.fired.values() if "error" in text]
        finally:
            faults.release()


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_every_query_finds_data_and_faults_make_alerts_fire(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(scenario(tmp_path), 300))
