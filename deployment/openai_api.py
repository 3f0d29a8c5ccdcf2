"""What a client may ask for: the request bodies of the OpenAI API, as far as they are served.

Three kinds of fields: those that are served (declared here), those that cannot change the output
(``_IGNORED``: accepted and ignored), and those that would change the output but are not served
(``_NEUTRAL``: accepted only with the value that asks for nothing). Every other field is an error:
no client is left to believe that a parameter had an effect.

``top_k`` and ``ignore_eos`` are extensions, named as in other servers.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128  # OpenAI's own limit of n
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

_IGNORED = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


def _is_neutral(name: str, value: object) -> bool:
    return value is None or any(
        isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
        for neutral in _NEUTRAL[name]
    )


def _unsupported(param: str, message: str) -> PydanticCustomError:
    # {detail} keeps braces of the message from being read as a template
    return PydanticCustomError(
        "unsupported_parameter", "{detail}", {"param": param, "detail": message}
    )


class _Body(BaseModel):
    """Knows what to do with fields that are not served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _set_aside_what_is_not_served(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        served = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:  # null is OpenAI's way to say "as if it were absent"
                    served[name] = value
            elif name in _NEUTRAL:
                if not _is_neutral(name, value):
                    raise _unsupported(name, _explain_neutral(name))
            elif name not in _IGNORED:
                served[name] = value
        return served


def _explain_neutral(name: str) -> str:
    neutral = _NEUTRAL[name]
    return "is not supported here; leave it out" + (
        f", or send {', '.join(json.dumps(value) for value in neutral)}" if neutral else ""
    )


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _check_unicode(text: str) -> str:
    """Refuse lone surrogates, which JSON can express and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "holds a lone surrogate at character {position}"
        raise PydanticCustomError("unicode", message, {"position": error.start}) from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


def _as_stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_stop_list, json_schema_input_type=str | list[str]),
    Field(max_length=4),
]


class SamplingFields(_Body):
    """The fields that both kinds of request share."""

    prompt_field: ClassVar[str]  # the name of the one that holds the prompt
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options",
                "is only allowed together with stream: true",
                {"param": "stream_options"},
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output, and the limit in tokens if the client set one."""
        return "max_tokens", self.max_tokens


def _as_text(content: object) -> object:
    """Join text parts by newlines; refuse parts of any other kind by name."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise PydanticCustomError(
                "content_part",
                "part {index} is of type {kind}; only parts of type 'text' can be read",
                {"index": index, "kind": repr(kind)},
            )
        if not isinstance(text := part.get("text"), str):
            raise PydanticCustomError("content_part", "part {index} has no text", {"index": index})
        texts.append(text)
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Text,
        BeforeValidator(_as_text, json_schema_input_type=str | list[dict[str, str]]),
    ]
    name: Text | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, data: Any) -> Any:
        """Clients send an answer back with every field it had, most of them null."""
        if not isinstance(data, Mapping):
            return data
        return {
            name: value
            for name, value in data.items()
            if name in cls.model_fields or (value is not None and value != [])
        }

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it; they have no developer role."""
        fields: dict[str, str] = self.model_dump(exclude_none=True)
        if self.role == "developer":
            fields["role"] = "system"
        return fields


class ChatCompletionRequest(SamplingFields):
    """The body of ``POST /v1/chat/completions``."""

    prompt_field = "messages"
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_output_limit(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "output_limit",
                "differs from max_tokens; send one of them",
                {"param": "max_completion_tokens"},
            )
        return self

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output, and the limit in tokens if the client set one."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().output_limit


def _as_prompt_list(value: object) -> object:
    """Wrap a single prompt, so that there is always a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and not isinstance(value[0], (str, list)):
        return [value]
    return value


def _check_prompt(value: object) -> object:
    if isinstance(value, str):
        return _check_unicode(value)
    if isinstance(value, list) and all(
        type(token_id) is int and token_id >= 0 for token_id in value
    ):
        return value
    raise PydanticCustomError("prompt", "must be a string or a list of token ids")


Prompt = Annotated[Any, BeforeValidator(_check_prompt, json_schema_input_type=str | list[int])]


class CompletionRequest(SamplingFields):
    """The body of ``POST /v1/completions``."""

    prompt_field = "prompt"
    prompt: Annotated[
        list[Prompt],
        BeforeValidator(
            _as_prompt_list, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
        Field(min_length=1),
    ]
