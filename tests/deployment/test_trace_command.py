"""``antiphon trace`` against ingresses that serve HTTP, and what their journals remember."""

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from scripted_backend import CharTokenizer, Gate, ScriptedBackend, says, serving
from typer.testing import CliRunner, Result

from antiphon.deployment.api_keys import ApiKeys
from antiphon.deployment.cli import app as command
from antiphon.deployment.http_app import Guard, create_app
from antiphon.deployment.http_auth import ApiKeyMiddleware
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal, OpenRequest
from antiphon.deployment.journey import Journey
from antiphon.deployment.request_search import add_request_route
from antiphon.deployment.request_timeline import Found
from antiphon.errors import WorkerBusyError
from antiphon.messages import TraceContext

BODY = {"model": "org/tiny", "prompt": "a secret"}


class Ingresses:
    """Two of them, as Serve's proxy leads to: each asks both."""

    def __init__(self) -> None:
        self.backend = ScriptedBackend()
        self.journals = [Journal(None, f"ingress-{index}", 10) for index in range(2)]
        self.silent: set[int] = set()

    async def ask_all(self, seconds: float, method: str, request_id: str) -> Sequence[Any]:
        assert method == "find_requests"
        return [
            RuntimeError("hangs") if index in self.silent
            else msgspec.to_builtins(journal.find(request_id))
            for index, journal in enumerate(self.journals)
        ]  # fmt: skip

    @contextlib.contextmanager
    def serving(self, guard: Guard | None = None) -> Iterator[list[str]]:
        with contextlib.ExitStack() as stack:
            urls = []
            for journal in self.journals:
                app = create_app(
                    self.backend,
                    CharTokenizer(),
                    max_concurrent_requests=4,
                    journal=journal,
                    guard=guard,
                )
                add_request_route(app, self.ask_all, journal)
                urls.append(stack.enter_context(serving(app)))
            yield urls


def run(*arguments: str, api_key: str = "") -> Result:
    return CliRunner().invoke(command, ["trace", *arguments], env={"ANTIPHON_API_KEY": api_key})


def ask(url: str, request_id: str, **more: Any) -> int:
    headers = {"X-Request-Id": request_id}
    body = {**BODY, **more}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=20).status_code


def test_an_endpoint_with_keys_wants_one(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one-key\n")
    keys = ApiKeys(tmp_path / "keys", IngressMetrics())
    guard = functools.partial(ApiKeyMiddleware, keys=keys, metrics_need_key=False)
    with Ingresses().serving(guard) as urls:
        assert ask(urls[0], "demo") == 401  # is not remembered
        refused = run("demo", "--url", urls[0])
        assert (refused.exit_code, "an API key is needed" in refused.output) == (2, True)
        answer = run("demo", "--url", urls[0], api_key="one-key")
        assert (answer.exit_code, "remembers" in answer.output) == (1, True), answer.output


def test_any_ingress_finds_what_any_of_them_served() -> None:
    ingresses = Ingresses()
    ingresses.backend.plays(says("hi"), says("!", "stop"))
    with ingresses.serving() as urls:
        assert ask(urls[1], "demo", n=2) == 200
        for url in urls:
            answer = run("demo", "--url", url)
            assert answer.exit_code == 0, answer.output
            assert "request demo: stop, " in answer.output
            assert "at ingress-1" in answer.output
            assert answer.output.count("8 prompt tokens, 0 cached; 3 output tokens, stop") == 2
            assert "secret" not in answer.output
        as_json = run("demo", "--url", urls[0], "--json")
        found = msgspec.json.decode(as_json.output, type=Found)
        assert (found.num_ingresses, found.num_silent) == (2, 0)
        assert found.requests[0].outcome == "stop"

        ingresses.silent = {0}
        answer = run("demo", "--url", urls[0])
        assert "1 of 2 ingresses did not answer." in answer.output
        ingresses.silent = {1}
        missing = run("demo", "--url", urls[0])
        assert missing.exit_code == 1
        assert "none of 2 ingresses remembers a request 'demo'; 1 did not answer" in missing.output
        ingresses.silent = {0, 1}  # its own journal it can always read
        assert run("demo", "--url", urls[1]).exit_code == 0


def test_an_open_request_is_told_as_it_stands() -> None:
    ingresses, gate = Ingresses(), Gate()
    ingresses.backend.plays(says("hi"), gate, says("!", "stop"))
    with ingresses.serving() as urls:
        with httpx.stream(
            "POST", f"{urls[0]}/v1/completions", json={**BODY, "stream": True}, timeout=20,
            headers={"X-Request-Id": "demo"},
        ) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            answer = run("demo", "--url", urls[1])
            assert "request demo: open, " in answer.output
            assert "2 output tokens, unfinished" in answer.output
            gate.open()
            for _ in lines:
                pass
        deadline = time.monotonic() + 10
        while "open" in (output := run("demo", "--url", urls[1]).output):
            assert time.monotonic() < deadline
        assert "3 output tokens, stop" in output


def test_a_request_that_failed_and_one_that_was_sent_again_under_its_id() -> None:
    ingresses = Ingresses()
    with ingresses.serving() as urls:
        ingresses.backend.plays(WorkerBusyError("full"))
        assert ask(urls[0], "demo") == 503
        assert ask(urls[1], "demo", temperature=9) == 400
        outcomes = [
            r["outcome"]
            for r in json.loads(run("demo", "--url", urls[0], "--json").output)["requests"]
        ]
        assert outcomes == ["invalid", "busy"]
        output = run("demo", "--url", urls[0]).output
        assert output.index("request demo: invalid") < output.index("request demo: busy")
        assert "no token yet" in output


def test_a_client_finds_its_request_by_the_id_that_it_sent() -> None:
    """Behind Serve that is the id in the answer; here only what is safe of it is kept."""
    ingresses = Ingresses()
    ingresses.backend.plays(says("hi", "stop"))
    with ingresses.serving() as urls:
        for sent, kept in [("Root=1-67ab", "Root1-67ab"), ("a/b+c=", "abc"), ("|d." * 99, "d.")]:
            assert ask(urls[0], sent) == 200
            answer = run(sent, "--url", urls[1])
            assert (answer.exit_code, f"request {kept}" in answer.output) == (0, True), answer
        nothing = run("///", "--url", urls[0])
        assert (nothing.exit_code, "nothing is kept" in nothing.output) == (1, True), nothing.output


def test_an_ingress_of_another_version_hides_no_other() -> None:
    ingresses = Ingresses()
    ingresses.backend.plays(says("hi", "stop"))

    async def ask_all(*arguments: Any) -> Sequence[Any]:
        return [[{}], *(await Ingresses.ask_all(ingresses, *arguments))]

    ingresses.ask_all = ask_all  # type: ignore[method-assign]
    with ingresses.serving() as urls:
        assert ask(urls[1], "demo") == 200
        answer = run("demo", "--url", urls[0])
        assert answer.exit_code == 0, answer.output
        assert "1 of 3 ingresses did not answer." in answer.output


@contextlib.contextmanager
def saying(words: bytes) -> Iterator[str]:
    """A server that says this to its first client, whatever that wants."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(words)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(timeout=10)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9/requests/demo: "),
        ("127.0.0.1:8000", "begins with neither http:// nor https://"),
        ("http://127.0.0.1:none", "nonnumeric port"),
        ("http://127.0.0.1:9/a b", "can't contain control characters"),
    ],
)
def test_mistakes_are_explained(url: str, message: str) -> None:
    answer = run("demo", "--url", url)
    assert answer.exit_code == 2
    assert message in answer.output


_PAGE = b"<p>Hello</p>"


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (b"-ERR unknown command\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + _PAGE, "is no endpoint of Antiphon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + _PAGE, "IncompleteRead"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\n\r\n" + _PAGE, "404: Not Found"),
    ],
)
def test_others_that_answer_remember_nothing(
    words: bytes, message: str, options: list[str]
) -> None:
    with saying(words) as url:
        answer = run("demo", "--url", url, *options)
    assert answer.exit_code == 2
    assert message in answer.output


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost"):
        with saying(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + _PAGE) as url:
            answer = run("demo", "--url", url.replace("127.0.0.1", host))
        assert "is no endpoint of Antiphon" in answer.output
    assert "Connection refused" in run("demo", "--url", "http://endpoint.test").output


def test_a_path_that_is_not_served_and_a_key_that_cannot_be_sent() -> None:
    with Ingresses().serving() as urls:
        wrong_path = run("demo", "--url", f"{urls[0]}/v1")
        assert (wrong_path.exit_code, "Not Found" in wrong_path.output) == (2, True)
        answer = run("demo", "--url", urls[0], api_key="secret\nkey")
        assert (answer.exit_code, "a line's end" in answer.output) == (2, True)
        assert "secret" not in answer.output


# The journal.


def ended(journal: Journal, request_id: str, num_choices: int) -> OpenRequest:
    request = journal.began("/v1/completions", TraceContext(request_id), time.monotonic())
    request.journeys = [Journey(request.arrived_at) for _ in range(num_choices)]
    journal.ended(request, "stop", 200)
    return request


def test_the_oldest_are_forgotten_and_nothing_is_kept_of_none() -> None:
    journal = Journal(None, "i0", max_timelines=4)
    for number, num_choices in enumerate([1, 0, 2]):
        ended(journal, f"r{number}", num_choices)
    known = [bool(journal.find(f"r{number}")) for number in range(3)]
    assert known == [True, True, True]
    ended(journal, "r3", 2)
    known = [bool(journal.find(f"r{number}")) for number in range(4)]
    assert known == [False, False, True, True]
    ended(journal, "r4", 9)  # the last one is always there
    assert [len(journal.find(f"r{n}")) for n in range(5)] == [0, 0, 0, 0, 1]

    forgetful = Journal()
    ended(forgetful, "r", 1)
    assert forgetful.find("r") == []
    assert not forgetful._open
