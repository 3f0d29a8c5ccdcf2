"""Finds a request in the journals of all ingresses: any of them may have served it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from antiphon.deployment.http_app import clean_request_id
from antiphon.deployment.journal import MAX_FOUND, Journal
from antiphon.deployment.metrics_targets import ASK_SECONDS, AskAll, readable
from antiphon.deployment.request_timeline import Found, RequestTimeline
from antiphon.errors import UnknownRequestError

logger = logging.getLogger(__name__)


async def find_everywhere(request_id: str, ask_all: AskAll, own: Journal) -> Found:
    """Ask every ingress for a request; bounded by ``ASK_SECONDS``.

    Args:
        request_id: As it is kept, see ``clean_request_id``.
        ask_all: Calls a method of every ingress, this one too.
        own: Is read where the others cannot be asked.
    """
    answers: Sequence[Any] = ()
    told: list[list[RequestTimeline]] = []
    try:
        async with asyncio.timeout(ASK_SECONDS):
            answers = await ask_all(ASK_SECONDS, "find_requests", request_id)
        told = readable(answers, list[RequestTimeline])
    except Exception as error:
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
    """Answer ``GET /requests/{request_id}``, with an id as it was sent or as it is kept."""

    @app.get("/requests/{request_id:path}", include_in_schema=False)
    async def find_request(request_id: str) -> Response:
        kept_id = clean_request_id(request_id)
        if not kept_id:
            raise UnknownRequestError(f"nothing is kept of a request id such as {request_id!r}")
        found = await find_everywhere(kept_id, ask_all, own)
        if not found.requests:
            raise UnknownRequestError(_explain_missing(kept_id, found))
        return Response(msgspec.json.encode(found), media_type="application/json")
