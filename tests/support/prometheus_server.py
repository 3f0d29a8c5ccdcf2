"""A real Prometheus on a free port, and the shipped rules at a pace that a test can wait for."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from processes import free_port
from prometheus_binaries import ROOT, binary

PACE = 60  # a minute of the rules is a second here
AGE_PACE = 15  # for limits of age, which are seconds already, and below which a busy machine may be
SCRAPE_INTERVAL = "300ms"  # as long as an answer may take, of a process that does much else
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WAIT_SECONDS = 30.0
Sample = dict[str, Any]


class Prometheus:
    """A running server; all waits are bounded."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def get(self, path: str, **parameters: str) -> Any:
        """What its API answers as data."""
        timeout = aiohttp.ClientTimeout(total=_WAIT_SECONDS)
        async with self._session.get(
            f"{self._url}/api/v1/{path}", params=parameters, timeout=timeout
        ) as answer:
            document = await answer.json()
        assert document["status"] == "success", document
        return document["data"]

    async def query(self, expression: str) -> list[Sample]:
        """The samples of an instant query, without those that are not a number."""
        samples: list[Sample] = (await self.get("query", query=expression))["result"]
        return [sample for sample in samples if sample["value"][1] != "NaN"]

    async def targets(self) -> list[dict[str, Any]]:
        """What is scraped."""
        active: list[dict[str, Any]] = (await self.get("targets", state="active"))["activeTargets"]
        return active

    async def firing(self) -> dict[str, str]:
        """Alerts that fire, with a description that was filled in."""
        alerts = (await self.get("alerts"))["alerts"]
        return {
            alert["labels"]["alertname"]: alert["annotations"]["description"]
            for alert in alerts
            if alert["state"] == "firing"
        }


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets_url: str) -> AsyncIterator[Prometheus]:
    """Run one with the documented scrape configuration and the rules, both in haste."""
    port = free_port()
    configuration = folder / "prometheus.yml"
    configuration.write_text(yaml.safe_dump(_configuration(folder, targets_url)))
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            binary("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as session:
            await _until_ready(session, f"http://127.0.0.1:{port}")
            yield Prometheus(f"http://127.0.0.1:{port}", session)
    finally:
        process.terminate()
        async with asyncio.timeout(_WAIT_SECONDS):
            await process.wait()


def _configuration(folder: Path, targets_url: str) -> dict[str, Any]:
    """That of docs/monitoring.md, with this test's address and pace."""
    page = (ROOT / "docs/monitoring.md").read_text()
    block = re.search(r"^```yaml\n(# prometheus.yml\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    configuration: dict[str, Any] = yaml.safe_load(block[1])
    configuration["global"] = {
        "scrape_interval": SCRAPE_INTERVAL,
        "scrape_timeout": SCRAPE_INTERVAL,
        "evaluation_interval": "500ms",
    }
    for path in (ROOT / "helm/antiphon/rules").glob("*.yaml"):
        (folder / path.name).write_text(hastened(path.read_text()))
    configuration["rule_files"] = [str(folder / "*.yaml")]
    (scrape,) = configuration["scrape_configs"]
    (discovery,) = scrape["http_sd_configs"]
    discovery.update(url=targets_url, refresh_interval="500ms")
    return configuration


def hastened(rules: str) -> str:
    """Rules whose windows, offsets and waits are divided by ``PACE``, limits of age by less."""

    durations = (
        r"(?<=[\[:])(\d+)([smhd])(?=[:\]])|(?<=for: )(\d+)([smhd])|(?<=offset )(\d+)([smhd])"
    )

    def replace(match: re.Match[str]) -> str:
        number, unit = (group for group in match.groups() if group is not None)
        return f"{1000 * int(number) * _SECONDS[unit] // PACE}ms"

    quick = re.sub(durations, replace, rules)
    return re.sub(r"(age_seconds > )(\d+)", lambda age: f"{age[1]}{int(age[2]) / AGE_PACE}", quick)


async def _until_ready(session: aiohttp.ClientSession, url: str) -> None:
    deadline = asyncio.get_running_loop().time() + _WAIT_SECONDS
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/-/ready") as answer:
                if answer.status == 200:
                    return
        assert asyncio.get_running_loop().time() < deadline, "Prometheus did not start"
        await asyncio.sleep(0.05)
