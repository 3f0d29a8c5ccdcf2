"""What the probe of a worker's pod answers, by workers in processes of their own."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import free_port

from antiphon.deployment import pod_readiness
from antiphon.deployment.pod_readiness import FOLDER_VARIABLE, PodReadiness, why_not_ready

LOADS, NONE = "a worker still loads", "no worker serves here"
PROXY = "Serve's proxy takes no requests"
WORKER = f"""
import sys
from {pod_readiness.__name__} import PodReadiness
worker = PodReadiness({{"{FOLDER_VARIABLE}": sys.argv[1]}})
for line in sys.stdin:
    getattr(worker, line.strip())()
    print(flush=True)
"""


class Proxy(ThreadingHTTPServer):
    """Answers what Serve's proxy would; ``status`` and ``words`` may be changed."""

    status = 200
    words = b"success"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Proxy)
        self.send_response(self.server.status if self.path == "/-/healthz" else 404)
        self.end_headers()
        self.wfile.write(self.server.words)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


class Worker:
    """A process that says to the probe what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    started = [Worker(tmp_path / "pod") for _ in range(2)]
    yield started
    for worker in started:
        worker.kill()


def test_a_pod_is_ready_when_all_its_workers_serve(
    workers: list[Worker], proxy: Proxy, tmp_path: Path
) -> None:
    folder, port = tmp_path / "pod", proxy.server_address[1]
    first, second = workers
    assert why_not_ready(folder, port) == NONE, "a spare pod"
    first.say("loading")
    assert why_not_ready(folder, port) == LOADS
    first.say("serving")
    assert why_not_ready(folder, port) is None
    second.say("loading")
    assert why_not_ready(folder, port) == LOADS
    second.say("serving")
    assert why_not_ready(folder, port) is None
    first.say("leaving")
    assert why_not_ready(folder, port) is None
    second.say("leaving")
    assert why_not_ready(folder, port) == NONE


def test_a_worker_that_was_killed_holds_nothing(
    workers: list[Worker], proxy: Proxy, tmp_path: Path
) -> None:
    folder, port = tmp_path / "pod", proxy.server_address[1]
    first, second = workers
    first.say("serving")
    second.say("loading")
    second.kill()
    assert why_not_ready(folder, port) is None
    first.kill()
    assert why_not_ready(folder, port) == NONE


def test_the_proxy_has_to_take_requests(proxy: Proxy, tmp_path: Path) -> None:
    worker = PodReadiness({FOLDER_VARIABLE: str(tmp_path)})
    worker.serving()
    try:
        port = proxy.server_address[1]
        assert why_not_ready(tmp_path, port) is None
        proxy.status = 503
        assert why_not_ready(tmp_path, port) == PROXY
        proxy.status, proxy.words = 200, b"# HELP ray_tasks Current number of tasks"
        assert why_not_ready(tmp_path, port) == PROXY, "Ray's metrics answer to any path"
        assert why_not_ready(tmp_path, free_port()) == PROXY
    finally:
        worker.leaving()


def test_the_probe_is_a_command_that_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", pod_readiness.__name__, str(tmp_path), str(free_port())]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (answer.returncode, answer.stderr) == (1, f"{NONE}\n")


def test_outside_a_pod_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    worker = PodReadiness({})
    worker.loading()
    worker.serving()
    worker.leaving()
    assert not list(tmp_path.iterdir())
