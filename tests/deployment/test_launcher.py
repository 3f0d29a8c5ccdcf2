"""What the command checks before it serves, and how it ends: the whole way is in ``tests/e2e``."""

import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from antiphon.config_loading import parse_config
from antiphon.deployment import launcher
from antiphon.deployment.launcher import (
    APP_NAME,
    _check_name,
    _check_port,
    _finish_open_requests,
    serve_listen_error,
)
from antiphon.errors import ConfigError

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus


@contextmanager
def http_listener(healthz_status: int) -> Iterator[int]:
    """Yield the port of a listener that answers one request, as a proxy of Serve does if 200."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(healthz_status if self.path == "/-/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.handle_request, daemon=True).start()
        yield proxy.server_port


@contextmanager
def silent_listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@contextmanager
def listener_of_another_protocol() -> Iterator[int]:
    def greet() -> None:
        connection, _ = taken.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"220 mail\r\n")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=greet, daemon=True).start()
        yield taken.getsockname()[1]


def test_a_port_is_taken_unless_it_is_that_of_the_clusters_serve() -> None:
    with http_listener(200) as port:
        config = parse_config({"http": {"port": port}})
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address alr"):
            _check_port(config, address=None)
        _check_port(config, address="auto")


@pytest.mark.parametrize(
    "listener", [silent_listener, listener_of_another_protocol, lambda: http_listener(404)]
)
def test_what_else_has_the_port_is_no_serve(
    listener: Callable[[], AbstractContextManager[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_SERVE_SECONDS", 0.1)
    with listener() as port:
        in_use = f"127.0.0.1:{port}: Address already in use"
        assert serve_listen_error("127.0.0.1", port) == in_use
        with pytest.raises(ConfigError, match=in_use):
            _check_port(parse_config({"http": {"port": port}}), address="auto")
    assert serve_listen_error("127.0.0.1", port) is None


def test_a_cluster_serves_one_application_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    overview = ApplicationStatusOverview(
        status=ApplicationStatus.RUNNING, message="", last_deployed_time_s=0.0, deployments={}
    )
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={"other": overview}))
    _check_name("auto")
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={APP_NAME: overview}))
    with pytest.raises(ConfigError, match="at auto serves an application 'antiphon' already"):
        _check_name("auto")


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
