"""Where the endpoint listens, told from what else may have its port."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from antiphon.config_loading import parse_config
from antiphon.deployment import endpoint
from antiphon.deployment.endpoint import base_url, serve_listen_error
from antiphon.deployment.launcher import _check_port
from antiphon.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::7", "http://[fd00::7]:80"),
        ("gpu-1", "http://gpu-1:80"),
    ],
)
def test_what_listens_is_reached_from_this_machine(host: str, url: str) -> None:
    assert base_url(host, 80) == url


@contextmanager
def http_listener(healthz_status: int, words: bytes = b"success") -> Iterator[int]:
    """Yield the port of a listener that answers one request, as a proxy of Serve does if 200."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(healthz_status if self.path == "/-/healthz" else 404)
            self.end_headers()
            self.wfile.write(words)

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
    "listener",
    [
        silent_listener,
        listener_of_another_protocol,
        lambda: http_listener(404),
        lambda: http_listener(200, b"# HELP ray_tasks Current number of tasks"),
    ],
)
def test_what_else_has_the_port_is_no_serve(
    listener: Callable[[], AbstractContextManager[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_SERVE_SECONDS", 0.1)
    with listener() as port:
        in_use = f"127.0.0.1:{port}: Address already in use"
        assert serve_listen_error("127.0.0.1", port) == in_use
        with pytest.raises(ConfigError, match=in_use):
            _check_port(parse_config({"http": {"port": port}}), address="auto")
    assert serve_listen_error("127.0.0.1", port) is None
