"""``antiphon trace`` against ingresses that serve HTTP, and what their journals remember."""

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from page_commands import blocks, check, commands
from scripted_backend import CharTokenizer, Gate, ScriptedBackend, says, serving
from typer.testing import CliRunner, Result

from antiphon.config_loading import parse_config
from antiphon.deployment.api_keys import ApiKeys
from antiphon.deployment.cli import app as command
from antiphon.deployment.http_app import Guard, create_app
from antiphon.deployment.http_auth import ApiKeyMiddleware
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal, OpenRequest
from antiphon.deployment.journey import Journey
from antiphon.deployment.request_search import add_request_route
from antiphon.deployment.request_timeline import (
    AttemptTimeline,
    ChoiceTimeline,
    Found,
    RequestTimeline,
)
from antiphon.deployment.timeline_report import report
from antiphon.errors import WorkerBusyError
from antiphon.messages import TraceContext
from antiphon.request_timing import FailedPrefill, RemotePrefill

PAGE = (Path(__file__).parents[2] / "docs/tracing.md").read_text()
ARRIVED_AT = datetime(2026, 11, 25, 15, tzinfo=UTC).timestamp()
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


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("http://127.0.0.1:9", 2, "http://127.0.0.1:9/requests/demo: "),
        ("127.0.0.1:8000", 2, "begins with neither http:// nor https://"),
    ],
)
def test_mistakes_are_explained(url: str, code: int, message: str) -> None:
    answer = run("demo", "--url", url)
    assert answer.exit_code == code
    assert message in answer.output


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


# The drawing.


def choice(**changes: Any) -> ChoiceTimeline:
    parts = dict(zip(
        ("route", "submit", "prefill_queue", "prefill", "transfer", "decode_queue", "first_step",
         "return"),
        (0.01, 0.0, 0.09, 0.3, 0.02, 0.03, 0.04, 0.01), strict=True,
    ))  # fmt: skip
    told = ChoiceTimeline(
        num_prompt_tokens=142, num_cached_tokens=16, num_output_tokens=11, finish_reason="length",
        path="remote", ttft_seconds=0.5, tpot_seconds=0.04, longest_gap_seconds=0.06,
        last_token_at=0.9, parts=parts,
        remote=RemotePrefill("p1", 0.01, 0.3, 0.05, 32, 125),
        failed_prefills=(FailedPrefill("p0", "stalled", 0.07),),
        attempts=[
            AttemptTimeline("d0", "decode", "n0", "remote", "p0", 0.4, 0.005, 0.006, "busy"),
            AttemptTimeline("d1", "decode", "n0", "remote", "p1", 0.45, 0.01, 0.95, None),
        ],
    )  # fmt: skip
    return msgspec.structs.replace(told, **changes)


def drawn(*choices: ChoiceTimeline) -> str:
    request = RequestTimeline(
        request_id="demo-17", ingress="i0", trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        path="/v1/chat/completions", arrived_at=ARRIVED_AT, seconds=1.0, outcome="length",
        choices=list(choices),
    )  # fmt: skip
    return "\n".join(report(Found([request], 1, 0)))


def test_a_timeline_is_drawn_as_on_its_page() -> None:
    (drawing,) = blocks(PAGE, "text")
    assert drawn(choice()) == drawing.rstrip()


def test_the_examples_of_the_page_are_valid() -> None:
    for words in commands(PAGE):
        check(words)
    for block in blocks(PAGE, "yaml"):
        assert parse_config(yaml.safe_load(block)).tracing.endpoint is not None


def test_what_has_not_happened_is_not_drawn() -> None:
    waiting = choice(
        path=None, ttft_seconds=None, tpot_seconds=None, last_token_at=None, parts={}, remote=None,
        failed_prefills=(), finish_reason=None, num_output_tokens=0, attempts=[],
    )  # fmt: skip
    text = drawn(waiting)
    assert "no token yet      1,000.0  100.0 %  ########################################" in text
    assert "first token" not in text
    assert text.endswith("whole             1,000.0  100.0 %\n")
