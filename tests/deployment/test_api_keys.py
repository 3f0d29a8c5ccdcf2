"""With keys, nobody gets in without one; keys change while the endpoint serves."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from scripted_backend import CharTokenizer, ScriptedBackend, serving

from antiphon.deployment.api_keys import ApiKeys, read_key_file
from antiphon.deployment.http_app import create_app
from antiphon.deployment.http_auth import ApiKeyMiddleware
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.errors import ConfigError

GOOD, OTHER = "sk-good-0123456789", "sk-other-0123456789"
BODY = {"model": "org/tiny", "prompt": "once"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Door:
    """A key file, who it lets in, and what was counted."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock, self.metrics = path, Clock(), IngressMetrics()
        self.write(f"# for the tests\n\n  {GOOD}\t\n")
        self.keys = ApiKeys(path, self.metrics, self.clock)

    def write(self, text: str) -> None:
        """Replace the file, as an editor does and as Kubernetes does."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        new.replace(self.path)

    def opens_for(self, key: str) -> bool:
        return self.keys.refuses(f"Bearer {key}") is None

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.count(name, **labels)

    @property
    def num_failures(self) -> float:
        return self.count("antiphon_api_key_file_failures_total")


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path / "keys")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f"Bearer {GOOD}", None),
        (f"bearer   {GOOD} ", None),
        ("", "missing"),
        ("Bearer", "missing"),
        ("Bearer  ", "missing"),
        (f"Basic {GOOD}", "missing"),
        (GOOD, "missing"),
        (f"Bearer {GOOD[:-1]}", "unknown"),
        (f"Bearer {GOOD}x", "unknown"),
        (f"Bearer {GOOD} {GOOD}", "unknown"),
        ("Bearer # for the tests", "unknown"),
        ("Bearer \xe9\udce9", "unknown"),
    ],
)
def test_only_a_key_of_the_file_opens(door: Door, header: str, reason: str | None) -> None:
    assert door.keys.refuses(header) == reason
    if reason is not None:
        assert door.count("antiphon_unauthorized_total", reason=reason) == 1


def test_a_changed_file_counts_within_a_second(door: Door) -> None:
    door.write(f"{OTHER}\n{GOOD}\n")
    assert not door.opens_for(OTHER), "one look at the file for each second, not for each request"
    door.clock.now = 1.0
    assert door.opens_for(OTHER)
    assert door.opens_for(GOOD)
    door.write(f"{OTHER}\n")
    door.clock.now = 2.0
    assert not door.opens_for(GOOD)
    assert door.opens_for(OTHER)
    assert door.num_failures == 0


def test_a_link_that_is_turned_counts_as_a_change(tmp_path: Path) -> None:
    """Kubernetes swaps a link when a Secret changes; the new file may be older and as long."""
    for name, key in (("new", OTHER[:18]), ("old", GOOD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(key)
        os.utime(tmp_path / name / "keys", (1000, 1000))
    (tmp_path / "data").symlink_to("old")
    clock = Clock()
    keys = ApiKeys(tmp_path / "data/keys", IngressMetrics(), clock)
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").replace(tmp_path / "data")
    clock.now = 1.0
    assert keys.refuses(f"Bearer {OTHER[:18]}") is None
    assert keys.refuses(f"Bearer {GOOD}") == "unknown"


@pytest.mark.parametrize("bad", [None, "", "# all revoked\n", "one two\n", "schl\xfcssel\n"])
def test_a_file_that_has_become_useless_leaves_the_last_keys_and_is_tried_again(
    door: Door, bad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if bad is None:
        door.path.unlink()
    else:
        door.write(bad)
    for second in (1, 2, 3):
        door.clock.now = second
        assert door.opens_for(GOOD)
        assert door.num_failures == second
    assert caplog.text.count("the keys from before stay valid") == 1
    door.write(OTHER)
    door.clock.now = 4.0
    assert door.opens_for(OTHER)
    assert not door.opens_for(GOOD)
    assert door.num_failures == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "has no key; write one on each line"),
        ("# nothing\n\n", "has no key"),
        (f"{GOOD}\nsk-secret with blanks\n", "line 2: a key has no blanks in it"),
        ("sk-secret\x07\n", "line 1: a key has no blanks in it"),
        ("sk-secr\xe9t\n", "is not ASCII text"),
    ],
)
def test_a_useless_file_is_refused_at_the_start_without_naming_keys(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        ApiKeys(path, IngressMetrics())
    assert str(path) in str(refused.value)
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_everybody_can_read_is_warned_about(
    tmp_path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(GOOD)
    path.chmod(mode)
    read_key_file(path)
    assert ("can be read by every user" in caplog.text) is warns
    assert GOOD not in caplog.text


# Through HTTP.


@pytest.fixture(params=[False, True], ids=["open metrics", "closed metrics"])
def metrics_need_key(request: pytest.FixtureRequest) -> bool:
    needed: bool = request.param
    return needed


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def url(door: Door, backend: ScriptedBackend, metrics_need_key: bool) -> Iterator[str]:
    guard = partial(ApiKeyMiddleware, keys=door.keys, metrics_need_key=metrics_need_key)
    app = create_app(
        backend, CharTokenizer(), max_concurrent_requests=4, metrics=door.metrics, guard=guard
    )
    for path in ("/metrics", "/metrics/targets", "/workers"):
        app.add_api_route(path, lambda: "seen")
    with serving(app) as base:
        yield base


def test_the_official_client_gets_in_with_its_key_and_is_told_without(
    url: str, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=GOOD, max_retries=0) as client:
        assert client.completions.create(**BODY).choices[0].text == "hi"
        assert [model.id for model in client.models.list()] == ["org/tiny"]
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key=OTHER, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.completions.create(**BODY, stream=True)
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"
    assert refused.value.response.headers["www-authenticate"] == "Bearer"
    assert refused.value.request_id
    assert len(backend.calls) == 1
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("antiphon", "uvicorn"))]
    assert not [line for line in ours if GOOD in line or OTHER in line]


def test_all_paths_but_the_open_ones_ask_for_a_key(url: str, metrics_need_key: bool) -> None:
    def status(path: str, key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(url + path, headers=headers, trust_env=False).status_code

    for path in ("/health", "/ready"):
        assert [status(path, key) for key in (None, OTHER, GOOD)] == [200, 200, 200]
    for path in ("/metrics", "/metrics/targets"):
        without = 401 if metrics_need_key else 200
        assert [status(path, key) for key in (None, OTHER, GOOD)] == [without, without, 200]
    for path in ("/workers", "/v1/models", "/openapi.json", "/docs"):
        assert [status(path, key) for key in (None, OTHER, GOOD)] == [401, 401, 200]
    for path in ("//health", "/health/../v1/models", "/nothing", "/%68ealth/", "/ready/"):
        assert status(path, None) == 401


def test_the_key_comes_before_anything_else_that_may_be_wrong(door: Door, url: str) -> None:
    answer = httpx.post(
        f"{url}/v1/completions",
        content=b"no JSON",
        headers={"X-Request-Id": "mine"},
        trust_env=False,
    )
    assert answer.status_code == 401
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"] == {
        "message": "an API key is needed, as the header Authorization: Bearer KEY",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert door.count("antiphon_requests_total", outcome="unauthorized") == 1
