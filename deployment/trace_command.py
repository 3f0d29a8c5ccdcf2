"""``antiphon trace``: prints where one request's time went, as its ingress remembers it."""

import http.client
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from antiphon.deployment.endpoint import direct_opener
from antiphon.deployment.request_timeline import Found
from antiphon.deployment.timeline_report import report
from antiphon.errors import UnknownRequestError

_TIMEOUT_SECONDS = 10.0


def trace(
    request_id: Annotated[str, typer.Argument(help="The X-Request-Id of its answer.")],
    url: Annotated[
        str, typer.Option(help="The endpoint; any ingress finds what any of them served.")
    ] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    api_key: Annotated[
        str, typer.Option(envvar="ANTIPHON_API_KEY", help="Where the endpoint asks for a key.")
    ] = "",
) -> None:
    """Print the timeline of a request, open or ended; exits with 1 if no ingress remembers it."""
    path = urllib.parse.quote(request_id, safe="")
    body = _get(f"{url.rstrip('/')}/requests/{path}", api_key)
    try:
        found = msgspec.json.decode(body, type=Found)
    except msgspec.DecodeError as error:
        _fail(2, f"{url} is no endpoint of Antiphon, or of another version: {error}")
    if as_json:
        typer.echo(json.dumps(json.loads(body), indent=2))
        return
    for line in report(found):
        typer.echo(line)


def _get(url: str, api_key: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        _fail(2, f"{url}: begins with neither http:// nor https://")
    if not (api_key.isascii() and api_key.isprintable()):
        _fail(2, "the API key has a character that no header can carry, such as a line's end")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        opener = direct_opener() if _is_here(url) else urllib.request.build_opener()
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            body: bytes = answer.read()
            return body
    except urllib.error.HTTPError as error:
        with error:
            told = _told(error)
        # Any other 404 is of a server that was not asked what it remembers.
        is_forgotten = error.code == 404 and told.get("code") == UnknownRequestError.CODE
        _fail(1 if is_forgotten else 2, str(told.get("message") or f"{url}: {error}"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        _fail(2, f"{url}: {getattr(error, 'reason', '') or error!r}")


def _is_here(url: str) -> bool:
    """Whether it is this machine by any name that needs no look-up."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _told(answer: urllib.error.HTTPError) -> dict[str, Any]:
    """What OpenAI's error shape holds; nothing if the answer is another."""
    try:
        error = json.loads(answer.read())["error"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _fail(code: int, message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code)
