"""Finds a request in the journals of all ingresses: any of them may have served it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from antiphon.deployment.journal import MAX_FOUND, Journal
from antiphon.deployment.metrics_targets import ASK_SECONDS, AskAll
from antiphon.deployment.request_timeline import Found, RequestTimeline

logger = logging.getLogger(__name__)


async def find_everywhere(request_id: str, ask_all: AskAll, own: Journal) -> Found:
    """Ask every ingress for a request; bounded by ``ASK_SECONDS``.

    Args:
        request_id: As its client knows it.
        ask_all: Calls a method of every ingress, this one too.
        own: Is read where the others cannot be asked.
    """
    answers: Sequence[Any] = ()
    told: list[list[RequestTimeline]] = []
    try:
        async with asyncio.timeout(ASK_SECONDS):
            answers = await ask_all(ASK_SECONDS, "find_requests", request_id)
        told = [msgspec.convert(a, list[RequestTimeline]) for a in answers if isinstance(a, list)]
    except Exception as error:  # one may be of another version
        logger.warning("the other ingresses cannot be asked for a request: %r", error)
    num_silent = len(answers) - len(told)
    if not told:  # then there may be others, of whom nothing is known
        told, num_silent = [own.find(request_id)], max(num_silent - 1, 1)
    requests = [request for each in told for request in each]
    requests.sort(key=lambda request: request.arrived_at, reverse=True)
    return Found(requests[:MAX_FOUND], len(told) + num_silent, num_silent)


def _explain_missing(request_id: str, found: Found) -> str:
    """Say why a request may not be known."""
    silent = f"; {found.num_silent} did not answer" if found.num_silent else ""
    return (
        f"none of {found.num_ingresses} ingresses remembers a request {request_id!r}{silent}; they "
        "keep the last tracing.kept_timelines choices that ended"
    )


def add_request_route(app: FastAPI, ask_all: AskAll, own: Journal) -> None:
    """Answer ``GET /requests/{request_id}``."""

    @app.get("/requests/{request_id}", include_in_schema=False)
    async def find_request(request_id: str) -> Response:
        found = await find_everywhere(request_id, ask_all, own)
        if not found.requests:
            raise HTTPException(404, _explain_missing(request_id, found))
        return Response(msgspec.json.encode(found), media_type="application/json")
