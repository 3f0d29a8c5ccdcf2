import asyncio

import pytest
from scripted_backend import CharTokenizer, Gate, ScriptedBackend, says

from antiphon.deployment.http_app import create_app
from antiphon.deployment.http_generation import (
    Choice,
    ClientGone,
    Generations,
    Slots,
    unless_disconnected,
)
from antiphon.deployment.journey import Journey
from antiphon.errors import CapacityError, InvalidParameterError, WorkerLostError
from antiphon.messages import SamplingParams

CHOICE = Choice([1], SamplingParams(max_tokens=9), counts_prompt=True, journey=Journey(0.0))


def texts(batch):
    return [(index, "".join(map(chr, output.token_ids))) for index, output in batch]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_a_batch_is_all_that_has_arrived():
    backend = ScriptedBackend()
    gate = Gate()
    backend.plays("a", "b", gate, says("c", "stop"))

    async def scenario():
        async with Generations(backend, "r", [CHOICE, CHOICE]) as generations:
            assert texts(await generations.batch()) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
            gate.open()
            rest = await generations.batch()
            while len(rest) < 2:
                rest += await generations.batch()
            assert sorted(texts(rest)) == [(0, "c"), (1, "c")]

    run(scenario())


def test_outputs_before_a_failure_are_handed_out_first():
    backend = ScriptedBackend()
    gate = Gate()
    backend.plays("a", gate, "b", WorkerLostError("gone"))

    async def scenario():
        async with Generations(backend, "r", [CHOICE]) as generations:
            assert texts(await generations.batch()) == [(0, "a")]
            gate.open()
            assert texts(await generations.batch()) == [(0, "b")]
            with pytest.raises(WorkerLostError, match="gone"):
                await generations.batch()

    run(scenario())


def test_a_failure_beside_the_first_output_fails_the_request():
    backend = ScriptedBackend()
    scripts = iter([["a", Gate()], [CapacityError("full")]])
    backend.script = lambda call: next(scripts)

    async def scenario():
        async with Generations(backend, "r", [CHOICE, CHOICE]) as generations:
            with pytest.raises(CapacityError):
                await generations.batch()

    run(scenario())


def test_a_generation_cancelled_from_below_is_a_failure_not_a_hang():
    class Cancelling(ScriptedBackend):
        async def generate(self, request_id, prompt_token_ids, sampling, journey):
            yield says("a")
            raise asyncio.CancelledError

    async def scenario():
        async with Generations(Cancelling(), "r", [CHOICE]) as generations:
            with pytest.raises(WorkerLostError, match="cancelled from below"):
                await generations.batch()

    run(scenario())


def test_leaving_closes_every_generator_and_stopping_closes_one():
    backend = ScriptedBackend()
    backend.plays("a", Gate())

    async def scenario():
        async with Generations(backend, "r", [CHOICE, CHOICE]) as generations:
            await generations.batch()
            generations.stop(0)
            while not backend.calls[0].closed.is_set():
                await asyncio.sleep(0)
            assert not backend.calls[1].closed.is_set()
        assert backend.calls[1].closed.is_set()

    run(scenario())


def test_work_of_a_client_that_left_is_cancelled_and_over():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def scenario():
        messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

        async def receive():
            await asyncio.sleep(0)
            return next(messages)

        with pytest.raises(ClientGone):
            await unless_disconnected(receive, work())
        assert ended == [True]

    run(scenario())


def test_a_server_that_raises_on_a_closed_connection_ends_the_work():
    backend = ScriptedBackend()
    backend.plays("a", Gate())
    app = create_app(backend, CharTokenizer(), max_concurrent_requests=1)
    body = b'{"model": "org/tiny", "prompt": "x", "stream": true}'
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [],
    }

    async def scenario():
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            for message in requests:
                return message
            await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                raise ConnectionResetError

        await app(scope, receive, send)

    run(scenario())
    assert backend.calls[0].closed.is_set()


def test_slots_are_bounded_and_come_back():
    slots = Slots(3)
    with slots.hold(2):
        with pytest.raises(CapacityError, match="2 of 3"), slots.hold(2):
            pass
        with slots.hold(1):
            pass
    with pytest.raises(InvalidParameterError, match="4 choices"), slots.hold(4):
        pass
    with pytest.raises(KeyError), slots.hold(3):
        raise KeyError
    with slots.hold(3) as release:
        release()
        with slots.hold(3):
            release()  # once is enough
            with pytest.raises(CapacityError), slots.hold(1):
                pass
    with slots.hold(3):
        pass
