"""Joins a Ray cluster that others use too, and sees that the application has a place there.

Serve is one for a whole cluster: who starts it says where it listens, and that cannot be changed
while it runs. An application has its name and its path for itself.
"""

import logging
from typing import Any

import typer

from antiphon.config import HttpConfig
from antiphon.deployment.serve_document import APP_NAME
from antiphon.errors import ConfigError


def join(address: str) -> None:
    """Connect to the cluster.

    Raises:
        ConfigError: None is at the address, or it does not let us in.
    """
    import ray
    import ray.exceptions

    from antiphon.deployment.ray_address import reachable_head

    typer.echo(f"joining Ray at {address}")
    try:
        found = reachable_head(address)
        ray.init(address=found, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot join a Ray cluster at {address}: {error}") from None


def check_serve(address: str, http: HttpConfig) -> None:
    """See that Serve, where it runs already, has room for the application and listens as wanted.

    Raises:
        ConfigError: The application's name or path is taken, or Serve listens elsewhere.
    """
    from ray.serve.context import _get_global_client  # alone it tells where Serve listens

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    for name, application in client.get_serve_details()["applications"].items():
        _check_application(address, name, application)
    listens = client.http_config
    if (listens.host, listens.port) != (http.host, http.port):
        raise ConfigError(
            f"http: Serve of the cluster at {address} listens on {listens.host}:{listens.port}, "
            f"and not on {http.host}:{http.port}; say --host {listens.host} --port "
            f"{listens.port}, or end it first, with all that it serves, by `serve shutdown`"
        )


def _check_application(address: str, name: str, application: dict[str, Any]) -> None:
    """Two commands would update one application, and the first that ends would delete it.

    Of two paths that are the same, Serve refuses the second, once everything is fetched.
    """
    status = application["status"]
    if name == APP_NAME:
        raise ConfigError(
            f"the cluster at {address} serves an application {name!r} already "
            f"({status.lower()}); update it with `serve deploy`, or end it first, "
            f"with ray.serve.delete({name!r})"
        )
    if application["route_prefix"] == "/" and status != "DELETING":
        raise ConfigError(
            f"the cluster at {address} serves an application {name!r} at / ({status.lower()}), "
            f"where this one belongs; end it first, with ray.serve.delete({name!r})"
        )
