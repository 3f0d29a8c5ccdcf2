"""``antiphon trace``: prints where one request's time went, as its ingress remembers it."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, NoReturn

import msgspec
import typer

from antiphon.deployment.request_timeline import Found
from antiphon.deployment.timeline_report import report

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
    if as_json:
        typer.echo(json.dumps(json.loads(body), indent=2))
        return
    try:
        found = msgspec.json.decode(body, type=Found)
    except msgspec.DecodeError as error:
        _fail(2, f"{url} is no endpoint of Antiphon, or of another version: {error}")
    for line in report(found):
        typer.echo(line)


def _get(url: str, api_key: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        _fail(2, f"{url}: begins with neither http:// nor https://")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            body: bytes = answer.read()
            return body
    except urllib.error.HTTPError as error:
        with error:
            _fail(1 if error.code == 404 else 2, _message(error.read()) or f"{url}: {error}")
    except OSError as error:
        _fail(2, f"{url}: {getattr(error, 'reason', error)}")


def _message(body: bytes) -> str:
    """OpenAI's error shape, as far as it is one."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _fail(code: int, message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code)
