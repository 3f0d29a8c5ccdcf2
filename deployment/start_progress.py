"""Follows the start of the application, and passes on what Serve says of it.

A cluster without room is waited for as long as the command is left running: it may grow, and who
waits reads what is asked for and what there is. Serve says that after half a minute.
"""

import threading

import typer

from antiphon.errors import ConfigError

_POLL_SECONDS = 0.25
# Of Serve's message. It tries again, since a node may have been lost. On this machine it is the
# model or its settings, which fail in the same way again.
_FAILED_ONCE = "failed to start with exception"


def wait_until_running(application: str, stop: threading.Event, *, is_patient: bool) -> None:
    """Return when the application runs, or once ``stop`` is set.

    Args:
        application: Its name.
        stop: Looked at a few times a second.
        is_patient: Leave it to Serve whether a worker that failed is tried again.

    Raises:
        ConfigError: A worker failed to start, or Serve gave up; in Serve's words.
    """
    from ray import serve

    seen = ""
    said: dict[str, str] = {}
    while not stop.wait(_POLL_SECONDS):
        status = serve.status().applications[application]
        now = "  ".join(f"{n}: {d.status.value.lower()}" for n, d in status.deployments.items())
        if now != seen:
            typer.echo(f"  {now}")
            seen = now
        if status.status.value == "RUNNING":
            return
        messages = {n: d.message for n, d in status.deployments.items() if d.message}
        is_over = status.status.value in ("DEPLOY_FAILED", "UNHEALTHY")
        has_failed = any(_FAILED_ONCE in message for message in messages.values())
        if is_over or (has_failed and not is_patient):
            words = "\n".join(messages.values()) or status.message
            raise ConfigError(f"the application did not start:\n{words}")
        for name, message in messages.items():
            if said.get(name) != message:
                typer.echo(f"  {name}: {message}")
                said[name] = message
