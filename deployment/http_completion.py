"""One answer, streamed or whole, from the first check to the last byte.

The status is decided by the first output: until then every failure is a proper HTTP status; after
it a failure is an ``error`` event that ends the stream without ``[DONE]``.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from antiphon.deployment.http_errors import ARRIVED_AT_KEY, REQUEST_ID_KEY, describe
from antiphon.deployment.http_generation import (
    Choice,
    ClientGone,
    Generations,
    Slots,
    unless_disconnected,
)
from antiphon.deployment.http_metrics import OPEN_REQUEST_KEY, OUTCOME_KEY
from antiphon.deployment.http_planning import Body, Planner
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.openai_api import ChatCompletionRequest
from antiphon.deployment.openai_replies import ChatReply, Reply, TextReply, Usage
from antiphon.deployment.text_stream import TextStream
from antiphon.messages import RequestOutput

logger = logging.getLogger(__name__)

_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
)


class Answer:
    """What the choices of one request have said so far."""

    def __init__(
        self, choices: Sequence[Choice], streams: Sequence[TextStream], metrics: IngressMetrics
    ) -> None:
        self._choices = choices
        self._metrics = metrics
        self.streams = streams

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(stream.finish_reason is not None for stream in self.streams)

    @property
    def finish_reasons(self) -> list[str]:
        """The finish reasons of a finished answer, by choice."""
        return [stream.finish_reason or "" for stream in self.streams]

    def take(self, batch: Sequence[tuple[int, RequestOutput]]) -> dict[int, str]:
        """Add outputs; return the new text of each unfinished choice among them."""
        texts: dict[int, str] = {}
        now = time.monotonic()
        for index, output in batch:
            stream = self.streams[index]
            if index not in texts and stream.finish_reason is not None:
                continue
            journey = self._choices[index].journey
            self._metrics.tokens_left(journey, len(output.token_ids), now)
            journey.num_cached_tokens = max(journey.num_cached_tokens, output.num_cached_tokens)
            text = stream.push(output.token_ids, output.finish_reason)
            texts[index] = texts.get(index, "") + text
        return texts

    def finish(self) -> str:
        """Count an answer that is finished; return how it ended."""
        for choice, reason in zip(self._choices, self.finish_reasons, strict=True):
            choice.journey.finish_reason = reason
            self._metrics.choice_ended(choice.journey)
        usage = self.usage()
        self._metrics.request_used(usage.num_prompt_tokens, usage.num_output_tokens)
        return "length" if "length" in self.finish_reasons else "stop"

    def usage(self) -> Usage:
        """Count the tokens so far."""
        firsts = [choice for choice in self._choices if choice.counts_prompt]
        return Usage(
            num_prompt_tokens=sum(len(choice.prompt_token_ids) for choice in firsts),
            num_output_tokens=sum(stream.num_tokens for stream in self.streams),
            num_cached_tokens=sum(choice.journey.num_cached_tokens for choice in firsts),
        )


@dataclass(frozen=True, slots=True)
class _Exchange:
    """What comes in from the workers and goes out to the client."""

    request_id: str
    generations: Generations
    answer: Answer
    send: Send
    release_slots: Callable[[], None]

    async def next_texts(self) -> dict[int, str]:
        """Wait for output; return the new text by choice."""
        texts = self.answer.take(await self.generations.batch())
        for index in texts:
            if self.answer.streams[index].finish_reason is not None:
                self.generations.stop(index)
        return texts

    async def start(self, *headers: tuple[bytes, bytes]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_body(self, body: bytes, is_last: bool) -> None:
        if is_last:  # a client that has seen the end may use the slots at once
            self.release_slots()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _send(self, message: Message) -> None:
        try:
            await self.send(message)
        except OSError as error:  # how some servers tell that the connection is closed
            raise ClientGone from error


class _StreamWriter:
    """Puts events in order: opening, text and closing of each choice, then the end."""

    def __init__(self, reply: Reply, answer: Answer) -> None:
        self._reply = reply
        self._answer = answer
        self._opened: set[int] = set()

    def events(self, texts: Mapping[int, str]) -> bytes:
        """Return the events for new texts; empty if there is nothing to tell yet."""
        events = []
        for index, text in texts.items():
            if index not in self._opened:
                self._opened.add(index)
                events.append(self._reply.opening(index))
            if text:
                events.append(self._reply.text(index, text))
            finish_reason = self._answer.streams[index].finish_reason
            if finish_reason is not None:
                events.append(self._reply.closing(index, finish_reason))
        if self._answer.is_finished:
            events.append(self._reply.end(self._answer.usage()))
        return b"".join(events)


@dataclass(frozen=True, slots=True)
class Service:
    """What every answer needs."""

    planner: Planner
    slots: Slots
    metrics: IngressMetrics


class CompletionResponse(Response):
    """Does the whole work when the server calls it, so that one scope owns all that must end."""

    def __init__(self, service: Service, body: Body) -> None:
        super().__init__()
        self._service = service
        self._planner = service.planner
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request.

        Raises:
            AntiphonError: It failed before the response was started.
        """
        planner, body, request_id = self._planner, self._body, scope[REQUEST_ID_KEY]
        write = self._write_stream if body.stream else self._write_whole
        service = self._service
        asked = planner.count_choices(body), planner.counted_field(body)
        with service.metrics.request_in_progress(), service.slots.hold(*asked) as release_slots:
            choices = await planner.plan(body, scope[ARRIVED_AT_KEY])
            scope[OPEN_REQUEST_KEY].planned(body, [choice.journey for choice in choices])
            texts = [self._text_stream() for _ in choices]
            answer = Answer(choices, texts, service.metrics)
            try:
                async with Generations(planner.backend, request_id, choices) as generations:
                    exchange = _Exchange(request_id, generations, answer, send, release_slots)
                    await unless_disconnected(receive, write(exchange))
                scope[OUTCOME_KEY] = answer.finish() if answer.is_finished else "failed"
            except ClientGone:
                scope[OUTCOME_KEY] = "aborted"
                logger.debug("request %s: the client went away", request_id)

    def _text_stream(self) -> TextStream:
        tokenizer = self._planner.tokenizer
        return TextStream(tokenizer.detokenizer(), self._body.stop, tokenizer.eos_token_ids)

    def _reply(self, num_choices: int) -> Reply:
        kind = ChatReply if isinstance(self._body, ChatCompletionRequest) else TextReply
        return kind(self._planner.backend.model_name, num_choices, self._body.include_usage)

    async def _write_whole(self, exchange: _Exchange) -> None:
        answer = exchange.answer
        parts: list[list[str]] = [[] for _ in answer.streams]
        while not answer.is_finished:
            for index, text in (await exchange.next_texts()).items():
                parts[index].append(text)
        texts = ["".join(part) for part in parts]
        document = self._reply(len(texts)).whole(texts, answer.finish_reasons, answer.usage())
        length = str(len(document)).encode()
        await exchange.start((b"content-type", b"application/json"), (b"content-length", length))
        await exchange.send_body(document, is_last=True)

    async def _write_stream(self, exchange: _Exchange) -> None:
        writer = _StreamWriter(self._reply(len(exchange.answer.streams)), exchange.answer)
        texts = await exchange.next_texts()
        await exchange.start(*_STREAM_HEADERS)
        while True:
            is_last = exchange.answer.is_finished
            if (events := writer.events(texts)) or is_last:
                await exchange.send_body(events, is_last)
            if is_last:
                return
            try:
                texts = await exchange.next_texts()
            except Exception as error:
                reply = describe(error, exchange.request_id)
                await exchange.send_body(b"data: " + reply.body + b"\n\n", is_last=True)
                return
