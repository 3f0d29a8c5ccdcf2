"""A running ``antiphon serve`` for benchmarks: HTTP timings against the workers' own figures."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from antiphon.config import DEFAULT_MODEL

_START_SECONDS = 300.0
_MARK = "ANTIPHON_BENCHMARK"


class Served:
    """The endpoint, its workers and its processes."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=120)

    def workers(self) -> list[dict[str, Any]]:
        """Cards and loads of the connected workers."""
        with urllib.request.urlopen(f"{self.url}/workers", timeout=30) as answer:
            workers: list[dict[str, Any]] = json.load(answer)
            return workers

    def ingress_metric(self, name: str, label: str = "") -> float:
        """Sum of an ingress metric's samples; those with a label such as ``part="route"``."""
        return _metric(f"{self.url}/metrics", name, label)

    def worker_metric(self, role: str, name: str, label: str = "") -> float:
        """Sum of a metric's samples over the workers of a role; those with a label."""
        urls = [w["url"] for w in self.workers() if w["role"] == role]
        return sum(
            _metric(url.replace("ws:", "http:").replace("/session", "/metrics"), name, label)
            for url in urls
        )

    async def stream(self, prompt: list[int], max_tokens: int) -> list[float]:
        """Stream a greedy completion; return the time of each chunk since the request."""
        body = {
            "model": DEFAULT_MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        started = time.perf_counter()
        times = []
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - started)
        return times


@contextmanager
def serving() -> Iterator[Served]:
    """Start the default application and stop it at the end."""
    port = _free_port()
    command = [Path(sys.executable).parent / "antiphon", "serve", "--port", str(port)]
    environment = {**os.environ, _MARK: str(os.getpid()), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment
        )
        try:
            _wait_until_ready(process, port, Path(folder) / "log")
            yield Served(port)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def resident_bytes() -> dict[str, int]:
    """Memory of every process that ``serving`` started.

    Returns:
        ``pss``: shared pages counted once; ``rss``: the plain sum, shared pages counted each time.
    """
    totals = {"pss": 0, "rss": 0}
    mark = f"{_MARK}={os.getpid()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (folder / "environ").read_bytes():
                continue
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        for line in lines:
            name, _, value = line.partition(":")
            if name.lower() in totals:
                totals[name.lower()] += int(value.split()[0]) * 1024
    return totals


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the application did not become ready:\n{log.read_text()}")


def _metric(url: str, name: str, label: str) -> float:
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    wanted = (line for line in lines if line.startswith(f"{name}{{") and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in wanted)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
