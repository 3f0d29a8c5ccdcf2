"""Starts the product in a process of its own, and finds what it leaves behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 180.0
STOP_SECONDS = 60.0
LEFT_SECONDS = 30.0  # Ray's dashboard and agents end after what has started them
KILL_SECONDS = 20.0
_MARK = "ANTIPHON_TEST_RUN"


def sum_of(exposition: str, name: str, labels: dict[str, str]) -> float:
    """Sum of the samples of a metric, in Prometheus' text format, whose labels match."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in exposition.splitlines()
        if line.startswith(f"{name}{{") and all(w in line for w in wanted)
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Product:
    """A command that serves HTTP, its log, and every process it started."""

    def __init__(self, command: list[str], port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.api_key = "none"
        self.log = folder / "log"
        self._mark = uuid.uuid4().hex
        executable = Path(sys.executable).parent / command[0]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [executable, *command[1:]],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,
                env={**os.environ, _MARK: self._mark, "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return bool(self.get("/ready")["status"] == "ready")
            except OSError:
                return False

        wait_for(is_ready, START_SECONDS, lambda: self.log.read_text())

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all ingresses of a metric's samples whose labels match."""
        return sum(
            sample_sum(target["targets"][0], name, **labels)
            for target in self.get("/metrics/targets")
            if target["labels"]["pool"] == "ingress"
        )

    def workers(self, role: str) -> list[dict[str, Any]]:
        return [worker for worker in self.get("/workers") if worker["role"] == role]

    def stop(self) -> None:
        """Ctrl-C, then make sure that nothing is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=STOP_SECONDS)
            left = self.processes
            wait_for(lambda: not left(), LEFT_SECONDS, lambda: f"left: {left()}")
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of it with SIGKILL, all at once; on return nothing is."""

        def are_gone() -> bool:
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        wait_for(are_gone, KILL_SECONDS, lambda: f"survive SIGKILL: {self.processes()}")
        self.process.communicate(timeout=KILL_SECONDS)  # reaped, and its pipe closed

    def processes(self) -> dict[int, str]:
        """Command lines of the living processes that this product started, by pid."""
        found = {}
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = command
            except OSError:
                continue  # it has just ended
        return {pid: command for pid, command in found.items() if command}


def sample_sum(host_port: str, name: str, **labels: str) -> float:
    """Sum of one process's samples of a metric whose labels match."""
    with urllib.request.urlopen(f"http://{host_port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum_of(text, name, labels)


def wait_for(
    condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = lambda: ""
) -> float:
    """Poll until a condition holds; return how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s; {explain()}"
        time.sleep(0.02)
    return time.monotonic() - started
