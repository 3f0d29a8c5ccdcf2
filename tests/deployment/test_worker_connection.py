"""An ingress's session with a real worker, and how the requests on it end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pools import assert_idle, start, until
from tiny_models import tiny_model

from antiphon.deployment.http_errors import ErrorReply, describe
from antiphon.deployment.worker_connection import WorkerConnection
from antiphon.errors import AntiphonError, RequestError, ServiceStoppingError, WorkerLostError
from antiphon.messages import Role, SamplingParams, Submit
from antiphon.workers.worker import Worker

STOPPING = ServiceStoppingError("it stops")
STOPPING.retry_after_seconds = 7.0


async def lose(worker: Worker, connection: WorkerConnection) -> None:
    (session,) = worker._server.sessions
    session.cut()


async def stop(worker: Worker, connection: WorkerConnection) -> None:
    connection.fail_all(STOPPING)


async def read(connection: WorkerConnection, request_id: str) -> None:
    request = Submit(request_id, [5, 6, 7], SamplingParams(400, temperature=0), ())
    async for _ in connection.generate(request):
        pass


def test_what_only_a_worker_can_refuse_names_no_parameter_of_the_client() -> None:
    async def scenario() -> None:
        worker = await start(Role.COLOCATED, tiny_model("llama"), num_blocks=2)
        connection = await WorkerConnection.open(
            worker.card, "test", on_telemetry=lambda _: None, on_lost=lambda: None
        )
        with pytest.raises(RequestError, match="exceed this worker's context of 32") as caught:
            await read(connection, "too long")
        assert describe(caught.value, "id") == ErrorReply(400, str(caught.value))
        await connection.close()
        await worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("end", "expected"),
    [(lose, WorkerLostError("is gone")), (stop, STOPPING)],
    ids=["lost", "stopped"],
)
def test_what_ends_all_requests_is_an_error_of_each_ones_own(
    end: Callable[[Worker, WorkerConnection], Awaitable[None]], expected: AntiphonError
) -> None:
    """One for all would hold every one's frames, and so their prompts, until the last is over."""
    model: Any = tiny_model("llama")

    async def scenario() -> None:
        worker = await start(Role.COLOCATED, model)
        connection = await WorkerConnection.open(
            worker.card, "test", on_telemetry=lambda _: None, on_lost=lambda: None
        )
        reading = [asyncio.create_task(read(connection, str(index))) for index in range(3)]
        await until(lambda: worker.num_requests == len(reading))
        await end(worker, connection)
        errors = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(error) for error in errors] == [type(expected)] * len(reading)
        assert len({id(error) for error in (expected, *errors)}) == 1 + len(reading)
        for error in errors:
            assert isinstance(error, type(expected))
            assert str(expected) in str(error)
            assert error.__dict__ == expected.__dict__
        await assert_idle(worker)
        await connection.close()
        await worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
