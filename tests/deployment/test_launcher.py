"""What the command checks before it serves, and how it ends: the whole way is in ``tests/e2e``."""

import os
import signal
import threading
import time
import warnings
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port

from antiphon.config_loading import parse_config
from antiphon.deployment import launcher
from antiphon.deployment.launcher import (
    _check_port,
    _finish_open_requests,
    _placed,
    _print_ready,
    _wait_until_ready,
    launch,
)
from antiphon.deployment.serve_document import APP_NAME
from antiphon.errors import ConfigError

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus


def test_the_port_may_not_be_one_that_workers_are_scraped_at() -> None:
    for first_port in (7950, 8000):
        metrics = {"first_port": first_port, "num_ports": 51}
        with pytest.raises(ConfigError, match=f"8000 is one of .* {first_port} and 50 more"):
            _check_port(parse_config({"metrics": metrics}), address="auto")


def test_what_there_is_no_room_for_is_refused_before_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(launcher, "_ray", lambda *_: nullcontext())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(launcher, "_resolve_model", lambda _: pytest.fail("fetched"))
    config = parse_config(
        {
            "model": {"source": str(tmp_path)},
            "decode": {"num_gpus": 1},
            "http": {"port": free_port()},
        }
    )
    with pytest.raises(ConfigError, match="decode: no place for 1 of 1"):
        launch(config, None)


def test_gpus_of_this_machine_are_given_and_those_of_a_cluster_only_mentioned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    placed = _placed(parse_config({}), None)
    assert {role: pool.num_gpus for role, pool in placed.pools.items()} == {
        "prefill": 1, "decode": 1,
    }  # fmt: skip
    capsys.readouterr()
    assert _placed(parse_config({}), "auto") == parse_config({})
    assert "on CPUs, though there are GPUs" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no place for 1 of 3"):
        _placed(parse_config({"decode": {"replicas": 3, "num_gpus": 1}}), None)


class Ingress:
    """A handle to ingresses that have open requests until they are cut off."""

    def __init__(self, finishes: bool, fails: bool = False) -> None:
        self.asked: list[float] = []
        self._finishes = finishes
        self._fails = fails

    def broadcast(self, method: str, seconds: float) -> "Ingress":
        assert method == "stop_taking"
        self.asked.append(seconds)
        return self

    def results(self, timeout_s: float) -> list[None]:
        if self._fails:
            raise RuntimeError("no replica is left")
        if self._finishes or self.asked[-1] == 0:
            return [None]
        time.sleep(timeout_s)
        raise TimeoutError


def stop(monkeypatch: pytest.MonkeyPatch, ingress: Ingress, hurry: threading.Event) -> float:
    def handle(deployment: str, app: str) -> Ingress:
        return ingress

    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    began = time.monotonic()
    _finish_open_requests(30.0, hurry)
    return time.monotonic() - began


def test_a_stop_waits_until_every_ingress_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    ingress = Ingress(finishes=True)
    stop(monkeypatch, ingress, threading.Event())
    assert ingress.asked == [30.0]


def test_a_second_signal_ends_open_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ingress, hurry = Ingress(finishes=False), threading.Event()
    threading.Timer(0.3, hurry.set).start()
    assert stop(monkeypatch, ingress, hurry) < 5
    assert ingress.asked == [30.0, 0.0]


def test_an_application_that_does_not_answer_is_stopped_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(monkeypatch, Ingress(finishes=False, fails=True), threading.Event())
    assert "open requests are cut off: no replica is left" in capsys.readouterr().err


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that can be joined, and the names of applications that were to be deleted there."""
    deleted: list[str] = []

    def delete(name: str) -> None:
        deleted.append(name)
        raise TimeoutError("not within 60 s")

    overview = ApplicationStatusOverview(
        status=ApplicationStatus.RUNNING, message="", last_deployed_time_s=0.0, deployments={}
    )
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={APP_NAME: overview}))
    monkeypatch.setattr(serve, "delete", delete)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", {**os.environ})  # which it sets Ray up by
    monkeypatch.setattr(launcher, "_placed", lambda config, _: config)
    for name in ("join", "check_serve", "_check_model", "_resolve_model"):
        monkeypatch.setattr(launcher, name, lambda *_: None)
    return deleted


def fail(words: str) -> Any:
    def failing(*_: object) -> None:
        raise ConfigError(words)

    return failing


def test_what_fails_at_the_end_does_not_hide_why_it_ends(
    cluster: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "_deploy", fail("no worker starts"))
    config = parse_config({"http": {"port": free_port()}})
    with pytest.raises(ConfigError, match="no worker starts"):
        launch(config, "auto")
    assert cluster == [APP_NAME]
    assert "'antiphon' may be there still: not within 60 s" in capsys.readouterr().err


def test_what_was_not_deployed_is_not_removed(
    cluster: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve may not run yet, and says that instead; or somebody else has deployed by now."""
    monkeypatch.setattr(launcher, "_resolve_model", fail("no tokenizer"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        launch(parse_config({"http": {"port": free_port()}}), "auto")
    assert cluster == []


def test_a_proxy_is_not_asked_whether_this_machine_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_READY_SECONDS", 5.0)
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        config = parse_config({"http": {"port": server.server_port}})
        assert _wait_until_ready(config, threading.Event())


def test_workers_that_cannot_be_listed_end_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(deployment: str, app: str) -> None:
        raise RayServeException("is replaced")

    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    _print_ready(parse_config({}), 1.0)
    printed = capsys.readouterr().out
    assert "workers  unknown (RayServeException): ask http://127.0.0.1:8000/workers" in printed
    assert "try it:" in printed
