"""Between one configuration and the document that Serve deploys.

    prefill.replicas, decode.replicas, colocated.replicas    deployments: [{name, num_replicas}]
    http.ingress_replicas                                     the same, for the ingress
    everything else                                           args

Serve replaces every replica of an application whose ``args`` have changed, and only adds or stops
some where ``num_replicas`` has. So sizes stand beside the arguments, which are then the same for
every size: a pool that has workers is named without ``replicas``, which means one, and Serve lays
its number over that. Whether a pool has workers at all is a matter of the arguments.
"""

from collections.abc import Mapping
from typing import Any

from antiphon.config_loading import parse_config
from antiphon.errors import ConfigError

APP_NAME = "antiphon"
IMPORT_PATH = "antiphon.deployment.application:app"
POOLS = ("prefill", "decode", "colocated")
INGRESS_NAME = "ingress"


def serve_document(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``serve deploy`` takes for a configuration as it was written.

    Raises:
        ConfigError: It does not describe a deployment.
    """
    config = parse_config(data)
    arguments = {**data}
    deployments = []
    for role in POOLS:
        arguments.pop(role, None)
        if role in config.pools:
            arguments[role] = _without(data.get(role), "replicas")
            deployments.append({"name": role, "num_replicas": config.pools[role].replicas})
        elif role != "colocated":  # which has no workers unless it is named
            arguments[role] = {"replicas": 0}
    arguments["http"] = _without(data.get("http"), "ingress_replicas")
    deployments.append({"name": INGRESS_NAME, "num_replicas": config.http.ingress_replicas})
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": arguments,
        "deployments": deployments,
    }
    http_options = {"host": config.http.host, "port": config.http.port}
    return {"http_options": http_options, "applications": [application]}


def _without(section: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    return {name: value for name, value in (section or {}).items() if name != key}


def configuration_of(application: Mapping[str, Any], origin: str) -> Any:
    """Return the configuration of an application of ours: its arguments, with Serve's numbers.

    Raises:
        ConfigError: Its ``deployments`` cannot be, or contradict its ``args``.
    """
    data = application.get("args")
    overrides = application.get("deployments") or []
    if not isinstance(overrides, list):
        kind = type(overrides).__name__
        raise ConfigError(f"{origin}.deployments: expected a list, got {kind}")
    if not overrides or not (data is None or isinstance(data, dict)):
        return data  # whoever parses it will say what is wrong with it
    data = dict(data or {})
    try:
        available = [*parse_config(data).pools, INGRESS_NAME]
    except ConfigError:
        return data  # whoever parses it will say that
    for index, override in enumerate(overrides):
        where = f"{origin}.deployments.{index}"
        if not isinstance(override, dict):
            raise ConfigError(f"{where}: expected a mapping, got {type(override).__name__}")
        if override.get("name") not in available:
            wanted, allowed = override.get("name"), ", ".join(available)
            raise ConfigError(f"{where}: no deployment {wanted!r}; with these args: {allowed}")
        _lay_over(data, override, where)
    return data


def _lay_over(data: dict[str, Any], override: Mapping[str, Any], where: str) -> None:
    if override.get("autoscaling_config") or override.get("num_replicas") == "auto":
        raise ConfigError(
            f"{where}: Serve scales by its own queues, through which no request passes here: "
            "give num_replicas as a number"
        )
    if "num_replicas" not in override:
        return
    number, name = override["num_replicas"], override["name"]
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"{where}.num_replicas: got {number!r}; a number from 1 is allowed")
    section, key = ("http", "ingress_replicas") if name == INGRESS_NAME else (name, "replicas")
    written = (data.get(section) or {}).get(key, number)
    if written != number:
        raise ConfigError(
            f"{where}.num_replicas is {number}, but args.{section}.{key} is {written}: "
            "leave it out of args, where a change restarts everything"
        )
    data[section] = {**(data.get(section) or {}), key: number}
