"""The endpoint through a real server, mostly as the official client sees it."""

import json
import socket
import time

import httpx
import openai
import pytest
from scripted_backend import CharTokenizer, Gate, ScriptedBackend, says, serving

from antiphon.deployment.backend import REST_OF_CONTEXT
from antiphon.deployment.http_app import create_app
from antiphon.errors import (
    LinkBrokenError,
    NoWorkerError,
    PromptTooLongError,
    WorkerBusyError,
    WorkerLostError,
)

MAX_CONCURRENT = 4
HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "org/tiny", "messages": HELLO}
TEXT = {"model": "org/tiny", "prompt": "once"}


@pytest.fixture(scope="module")
def server():
    backend = ScriptedBackend()
    app = create_app(backend, CharTokenizer(), max_concurrent_requests=MAX_CONCURRENT)
    with serving(app) as url:
        yield backend, url


@pytest.fixture
def backend(server):
    backend, _ = server
    backend.__init__()
    return backend


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[1], timeout=10, trust_env=False) as client:
        yield client


@pytest.fixture
def client(server, http):
    with openai.OpenAI(
        base_url=f"{server[1]}/v1", api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client


def events(response):
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


# whole answers


def test_a_chat_is_answered_whole(backend, client):
    backend.plays(says("hel", num_cached_tokens=3), says("lo$", "stop"))
    answer = client.chat.completions.create(**CHAT)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "org/tiny")
    assert answer.created > 0
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "hello")
    prompt = "u:hello\n>"
    assert backend.calls[0].prompt == prompt
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 6,
        "total_tokens": len(prompt) + 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_text_is_answered_whole(backend, client):
    backend.plays(says(" upon", "length"))
    answer = client.completions.create(**TEXT)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "org/tiny")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" upon", "length")
    assert backend.calls[0].prompt == "once"


def test_prompts_and_choices_fan_out_with_a_seed_each(backend, client):
    backend.script = lambda call: [says(f"{call.prompt}{call.sampling.seed}", "stop", 1)]
    answer = client.completions.create(model="org/tiny", prompt=["a", "bc"], n=2, seed=7)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "a7"),
        (1, "a8"),
        (2, "bc7"),
        (3, "bc8"),
    ]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert len({call.request_id for call in backend.calls}) == 4


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]], ["hi"], "hi"])
def test_a_prompt_may_be_text_or_token_ids(backend, client, prompt):
    client.completions.create(model="org/tiny", prompt=prompt)
    assert [call.prompt for call in backend.calls] == ["hi"]


def test_sampling_parameters_reach_the_backend(backend, client):
    client.chat.completions.create(
        **CHAT, temperature=0.5, top_p=0.9, seed=5, max_tokens=9, extra_body={"top_k": 40}
    )
    sampling = backend.calls[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.seed, sampling.max_tokens, sampling.stop_token_ids) == (5, 9, (ord("$"),))


def test_defaults_are_those_of_openai(backend, client):
    client.completions.create(**TEXT)
    client.chat.completions.create(**CHAT)
    client.chat.completions.create(**CHAT, extra_body={"ignore_eos": True, "top_k": -1})
    text, chat, ignoring = [call.sampling for call in backend.calls]
    assert text.max_tokens == 16
    assert chat.max_tokens == REST_OF_CONTEXT
    assert (chat.temperature, chat.top_p, chat.top_k) == (1.0, 1.0, 0)
    assert len({text.seed, chat.seed, ignoring.seed}) == 3
    assert (ignoring.stop_token_ids, ignoring.top_k) == ((), 0)


def test_the_developer_speaks_as_system_and_parts_are_joined(backend, client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="org/tiny", messages=messages)
    assert backend.calls[0].prompt == "s:x\nu:a\nb\n>"


def test_max_completion_tokens_limits_a_chat(backend, client):
    client.chat.completions.create(**CHAT, max_completion_tokens=5)
    assert backend.calls[0].sampling.max_tokens == 5


# streams


def test_a_chat_streams_role_text_and_finish(backend, http):
    gates = [Gate(), Gate()]
    backend.plays("he", gates[0], "l", gates[1], says("lo$", "stop"))
    seen = []
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in response.iter_lines():
            if line:
                seen.append(line.removeprefix("data: "))
            if line and len(seen) in (2, 3):  # opened only once the text before was seen here
                gates[len(seen) - 2].open()
    assert seen.pop() == "[DONE]"
    chunks = [json.loads(event) for event in seen]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"org/tiny"}
    assert all(chunk["system_fingerprint"] and "usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "he"},
        {"content": "l"},
        {"content": "lo"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, None, "stop"]


def test_the_official_client_reads_a_stream_with_usage(backend, client):
    backend.plays(says("h\u2028é", num_cached_tokens=2), says("🙂$", "stop"))
    stream = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "h\u2028é🙂"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 5)
    assert last.usage.prompt_tokens_details.cached_tokens == 2


def test_a_text_streams(backend, client):
    backend.plays("a", says("b", "length"))
    chunks = list(client.completions.create(**TEXT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def test_choices_of_a_stream_are_told_apart(backend, client):
    backend.script = lambda call: [f"{call.sampling.seed}", says("!", "stop")]
    texts = {}
    for chunk in client.chat.completions.create(**CHAT, n=3, seed=0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: "0!", 1: "1!", 2: "2!"}


def test_what_has_piled_up_is_one_chunk(backend, http):
    backend.plays("a", "b", "c", says("d", "length"))
    response = http.post("/v1/completions", json={**TEXT, "stream": True})
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["abcd", ""]


# stop strings


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_outputs_ends_and_aborts(backend, client, stream):
    never = Gate()
    backend.plays("one E", "ND", "x", never)
    create = client.completions.create
    if stream:
        options = {"include_usage": True}
        *chunks, last = create(**TEXT, stop="END", stream=True, stream_options=options)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason, usage = chunks[-1].choices[0].finish_reason, last.usage
    else:
        answer = create(**TEXT, stop=["END", "?"])
        text, reason, usage = answer.choices[0].text, answer.choices[0].finish_reason, answer.usage
    assert (text, reason, usage.completion_tokens) == ("one ", "stop", 7)
    assert backend.calls[0].wait_closed()


def test_a_stop_ends_one_choice_and_not_the_others(backend, client):
    never, gate = Gate(), Gate()
    scripts = {0: ["aSTOP", never], 1: ["b", gate, says("c", "length")]}
    backend.script = lambda call: scripts[call.sampling.seed]
    stream = client.completions.create(**TEXT, n=2, seed=0, stop="STOP", stream=True)
    chunks = [next(stream)]
    (stopped,) = (call for call in backend.calls if call.sampling.seed == 0)
    assert stopped.wait_closed()  # while the other choice is still at work
    gate.open()
    chunks += stream
    choices = [chunk.choices[0] for chunk in chunks]
    texts = ["".join(c.text for c in choices if c.index == index) for index in (0, 1)]
    reasons = {c.index: c.finish_reason for c in choices if c.finish_reason}
    assert texts == ["a", "bc"]
    assert reasons == {0: "stop", 1: "length"}


# errors


def error_of(response):
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_an_unknown_model_is_404(client, http, path):
    body = {**(CHAT if "chat" in path else TEXT), "model": "gpt-9"}
    response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-9" in error["message"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HELLO)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": ', "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe\xff", "body"),
        (b"", "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_400(http, content, message):
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_bad_parameter_is_400_and_named(backend, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, logprobs=True)
    assert caught.value.param == "logprobs"
    assert caught.value.code == "unsupported_parameter"
    assert backend.calls == []


def test_prompt_and_max_tokens_must_fit_the_context(backend, client):
    with pytest.raises(openai.BadRequestError, match=r"97 is too large.* 4 tokens.* 100 tokens"):
        client.completions.create(**TEXT, max_tokens=97)
    client.completions.create(**TEXT, max_tokens=96)
    with pytest.raises(openai.BadRequestError, match="100 tokens") as caught:
        client.completions.create(model="org/tiny", prompt="x" * 100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="100 tokens") as caught:
        client.chat.completions.create(
            model="org/tiny", messages=[{"role": "user", "content": "x" * 100}]
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    client.completions.create(model="org/tiny", prompt="x" * 99)
    assert backend.calls[-1].sampling.max_tokens == 1  # a default never exceeds what fits


def test_a_prompt_needs_tokens_of_the_vocabulary(client):
    with pytest.raises(openai.BadRequestError, match="no tokens"):
        client.completions.create(model="org/tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="1114112 is not below"):
        client.completions.create(model="org/tiny", prompt=[1, 0x110000])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (WorkerBusyError("12 requests wait"), 503, "overloaded"),
        (NoWorkerError("no decode worker"), 503, "no_worker"),
        (LinkBrokenError("10.1.2.3 is gone"), 502, "worker_failed"),
        (WorkerLostError("10.1.2.3 is gone"), 502, "worker_failed"),
        (PromptTooLongError(9, 8), 400, "context_length_exceeded"),
        (KeyError("10.1.2.3"), 500, "internal_error"),
    ],
)
def test_failures_before_the_first_output_are_statuses(backend, http, raised, status, code, stream):
    backend.plays(raised)
    response = http.post("/v1/completions", json={**TEXT, "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("Retry-After" in response.headers) == (status == 503)
    assert "10.1.2.3" not in response.text
    if status >= 500 and status != 503:
        assert response.headers["x-request-id"] in error_of(response)["message"]


def test_a_client_is_told_in_whole_seconds_when_to_come_again_and_in_words_why(backend, http):
    error = WorkerBusyError("12 requests wait")
    for error.retry_after_seconds, told in ((41.2, "42"), (1e9, "60"), (0.0, "1")):
        backend.plays(error)
        response = http.post("/v1/completions", json=TEXT)
        assert response.headers["Retry-After"] == told
        assert "12 requests wait" in error_of(response)["message"]


def test_a_failure_in_mid_stream_is_an_event_without_done(backend, http):
    gate = Gate()
    backend.plays("a", gate, WorkerLostError("10.1.2.3 is gone"))
    with http.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        assert response.status_code == 200
        gate.open()
        response.read()
    *chunks, last = events(response)
    assert json.loads(chunks[0])["choices"][0]["text"] == "a"
    assert all(json.loads(chunk)["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert json.loads(last)["error"]["code"] == "worker_failed"
    assert "10.1.2.3" not in response.text


def test_the_official_client_raises_a_failure_in_mid_stream(backend, client):
    gate = Gate()
    backend.plays("a", gate, RuntimeError("10.1.2.3"))
    stream = client.chat.completions.create(**CHAT, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    gate.open()
    with pytest.raises(openai.APIError, match="internal error"):
        list(stream)


def test_a_generation_that_just_ends_is_a_failure(backend, http):
    backend.plays("a")
    assert http.post("/v1/completions", json=TEXT).status_code == 502


def test_requests_above_the_limit_get_503_at_once(backend, http):
    gate = Gate()
    backend.plays("a", gate, says("b", "stop"))
    streaming = {**TEXT, "stream": True}
    with http.stream("POST", "/v1/completions", json={**streaming, "n": MAX_CONCURRENT}) as held:
        assert held.status_code == 200
        refused = http.post("/v1/completions", json=streaming)
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        gate.open()
        assert held.read().endswith(b"data: [DONE]\n\n")
    assert http.post("/v1/completions", json=streaming).status_code == 200
    for field, value in (("n", MAX_CONCURRENT + 1), ("prompt", ["x"] * (MAX_CONCURRENT + 1))):
        never = http.post("/v1/completions", json={**TEXT, field: value})
        assert (never.status_code, error_of(never)["param"]) == (400, field)


def test_unknown_routes_and_methods_are_told_in_the_same_shape(http):
    assert http.get("/v1/nothing").status_code == 404
    assert "/v1/nothing" in error_of(http.get("/v1/nothing"))["message"]
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    assert "GET" in error_of(wrong)["message"]


# clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_work_is_closed_when_the_client_leaves(backend, server, stream):
    never = Gate()
    backend.plays("a", never)
    host, port = server[1].removeprefix("http://").split(":")
    body = json.dumps({**CHAT, "stream": stream, "n": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        else:
            _until(lambda: len(backend.calls) == 2)
    assert all(call.wait_closed() for call in backend.calls)
    backend.plays(says("b", "stop"))
    with httpx.Client(base_url=server[1], trust_env=False) as http:  # and its slots are free again
        everything = {**TEXT, "n": MAX_CONCURRENT}
        _until(lambda: http.post("/v1/completions", json=everything).status_code == 200)


def _until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not come true")


# ids, models, probes


def test_a_request_id_is_kept_or_made(backend, http):
    kept = http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "my-id.1"})
    assert kept.headers["x-request-id"] == "my-id.1"
    again = http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "my-id.1"})
    assert again.json()["id"] != kept.json()["id"]
    ids = [call.request_id for call in backend.calls]
    assert all(request_id.startswith("my-id.1-") for request_id in ids)
    assert len(set(ids)) == 2
    cleaned = http.get("/health", headers={"X-Request-Id": "a b\t<c>" + "d" * 500})
    assert cleaned.headers["x-request-id"] == "abc" + "d" * 125
    made = [http.get(path).headers["x-request-id"] for path in ("/health", "/nowhere")]
    assert len(set(made)) == 2
    assert all(len(request_id) == 32 for request_id in made)


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("org/tiny", "model")
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_probes_tell_alive_from_ready(backend, http):
    backend.readiness = (False, "no decode worker is connected")
    assert http.get("/health").status_code == 200
    response = http.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "no decode worker is connected"
    backend.readiness = (True, "2 workers")
    assert http.get("/ready").status_code == 200


def test_the_schema_can_be_read(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/ready"} <= set(paths)
