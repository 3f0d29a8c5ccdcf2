"""Which fields are served, ignored, refused; each refusal names its parameter."""

import pytest
from pydantic import ValidationError

from antiphon.deployment.http_errors import describe_validation
from antiphon.deployment.openai_api import ChatCompletionRequest, CompletionRequest

MESSAGE = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [MESSAGE]}
TEXT = {"model": "m", "prompt": "hi"}


def refusal(body):
    model = ChatCompletionRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    reply = describe_validation(errors)
    assert reply.status == 400
    assert reply.message.removeprefix("Unrecognized request argument supplied: ").startswith(
        reply.param
    )
    return reply


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
        ("min_p", 0.05),
        ("min_tokens", 1),
        ("best_of", 2),
        ("suffix", "x"),
        ("echo", True),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("functions", [{}]),
    ],
)
@pytest.mark.parametrize("body", [CHAT, TEXT])
def test_what_would_change_the_output_is_refused(body, name, value):
    reply = refusal({**body, name: value})
    assert (reply.param, reply.code) == (name, "unsupported_parameter")
    assert "not supported" in reply.message


def test_values_that_ask_for_nothing_are_accepted():
    neutral = {
        "logprobs": False,
        "top_logprobs": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "repetition_penalty": 1.0,
        "min_p": 0,
        "best_of": 1,
        "echo": False,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "temperature": None,
        "stop": None,
        "stream_options": None,
    }
    body = ChatCompletionRequest.model_validate({**CHAT, **neutral})
    assert body == ChatCompletionRequest.model_validate(CHAT)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"max_completion_tokens": 5, "prompt": "hi"}, "max_completion_tokens"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{**MESSAGE, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_unknown_fields_are_refused(field, param):
    body = {"model": "m", **field} if "prompt" in field else {**CHAT, **field}
    reply = refusal(body)
    assert reply.message == f"Unrecognized request argument supplied: {param}"
    assert (reply.param, reply.code) == (param, "unknown_parameter")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["\ud800"]}, "stop[0]"),
        ({"stream": 1}, "stream"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [MESSAGE, {"role": "robot", "content": ""}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, param):
    assert refusal({**CHAT, **field}).param == param


@pytest.mark.parametrize("prompt", [None, [], 5, [1, "a"], [-1], [[1], "a", [True]], "\ud800"])
def test_prompts_that_cannot_be_read_are_refused(prompt):
    assert refusal({**TEXT, "prompt": prompt}).param.startswith("prompt")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", None])
def test_parts_that_are_not_text_are_refused_by_kind(kind):
    content = [{"type": "text", "text": "see"}, {"type": kind}]
    reply = refusal({**CHAT, "messages": [{"role": "user", "content": content}]})
    assert reply.param == "messages[0].content"
    assert f"part 1 is of type {kind!r}" in reply.message


def test_an_answer_can_be_sent_back_as_it_came():
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    body = ChatCompletionRequest.model_validate({"model": "m", "messages": [MESSAGE, message]})
    assert body.messages[1].for_template() == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_every_form_of_prompt_becomes_a_list_of_prompts(prompt, prompts):
    assert CompletionRequest.model_validate({**TEXT, "prompt": prompt}).prompt == prompts
