"""Starts Ray and the application from a terminal, says what is happening, and cleans up.

A local Ray is started unless an address is given, and ends with the command. On an existing cluster
only the application is removed. SIGTERM ends it like Ctrl-C:

    first signal   new requests get 503; open ones have ``http.drain_seconds`` to finish
    second signal  open ones are ended now
    then           whoever is still open gets an error in its stream, and everything stops
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from antiphon.config import AntiphonConfig
from antiphon.deployment.endpoint import base_url, direct_opener, listen_error, serve_listen_error
from antiphon.deployment.existing_cluster import check_serve, join
from antiphon.deployment.local_machine import (
    OBJECT_STORE_BYTES,
    check_room,
    local_cpus,
    report_cpus,
    usable_gpus,
    with_gpus,
)
from antiphon.deployment.serve_document import APP_NAME, INGRESS_NAME
from antiphon.deployment.start_progress import wait_until_running
from antiphon.errors import ConfigError

_READY_SECONDS = 60.0
_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 5.0  # for an ingress to end what is open, once it is told to


def launch(config: AntiphonConfig, address: str | None) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: The model cannot be found, the port is taken, there are no API keys where there
            should be, no cluster is at the address or its Serve has no place for the application,
            this machine lacks what the workers ask for, or they cannot start.
    """
    started_at = time.monotonic()
    _check_port(config, address)
    _check_api_keys(config, address)
    _check_model(config)
    stop, hurry = threading.Event(), threading.Event()
    with _ray(config, address):
        config = _placed(config, address)  # before weights are fetched in vain
        _resolve_model(config)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: (hurry if stop.is_set() else stop).set())
        try:
            _deploy(config, address, stop)
            if not stop.is_set() and _wait_until_ready(config, stop):
                _print_ready(config, time.monotonic() - started_at)
                stop.wait()
                _finish_open_requests(config.http.drain_seconds, hurry)
            typer.echo("stopping ...")
        finally:
            _remove(address)


def _check_port(config: AntiphonConfig, address: str | None) -> None:
    """A cluster's Serve keeps its port when an application ends, and takes the next one too."""
    http = config.http
    if http.port in config.metrics.ports:  # a worker would take it before Serve's proxy does
        raise ConfigError(
            f"http.port: {http.port} is one of the ports of metrics, {config.metrics.first_port} "
            f"and {config.metrics.num_ports - 1} more; choose another with --port"
        )
    why_not = listen_error if address is None else serve_listen_error
    if (error := why_not(http.host, http.port)) is not None:
        raise ConfigError(
            f"http: cannot listen on {error}; stop what listens there or choose another with --port"
        )


def _check_api_keys(config: AntiphonConfig, address: str | None) -> None:
    """Find a bad file now, and not in an ingress; on a cluster it lies on other machines."""
    if config.http.api_key_file is not None and address is None:
        from antiphon.deployment.api_keys import read_key_file

        read_key_file(Path(config.http.api_key_file))


def _check_model(config: AntiphonConfig) -> None:
    """See that there is such a model; of a hub's, no more is fetched than it takes to know."""
    typer.echo(f"model {config.model.source}")
    from antiphon.workers.model_source import config_folder

    config_folder(config.model.source, _report)


def _resolve_model(config: AntiphonConfig) -> None:
    """Convert or download here, where progress can be seen; workers then find it in the cache."""
    from antiphon.workers.model_source import resolve_model

    typer.echo(f"  in {resolve_model(config.model.source, _report)}")


def _report(line: str) -> None:
    typer.echo(f"  {line}")


@contextmanager
def _ray(config: AntiphonConfig, address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Of a Ray of its own: an update goes on though some new workers die, instead of leaving a pool
    # short for good.
    os.environ.setdefault("RAY_SERVE_STOP_FAILED_ROLLING_UPDATES", "0")
    import ray

    if address is not None:
        join(address)
        check_serve(address, config.http)
    else:
        num_cpus = local_cpus(config)
        typer.echo(f"starting Ray with {num_cpus} CPUs")
        ray.init(
            address="local",  # no other one: not that of RAY_ADDRESS, nor one that runs here
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _placed(config: AntiphonConfig, address: str | None) -> AntiphonConfig:
    """Give GPUs and look for room on this machine; on a cluster both are for its users to say."""
    import ray

    offered = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if address is None:
        config = with_gpus(config, usable_gpus(offered, _report), _report)
        check_room(config, offered)
    elif offered.get("GPU"):
        report_cpus(config, _report)
    return config


def _deploy(config: AntiphonConfig, address: str | None, stop: threading.Event) -> None:
    """Deploy and report progress until the application runs, fails or is stopped."""
    from ray import serve

    from antiphon.deployment.application import AppArguments, app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http_options = {"host": config.http.host, "port": config.http.port}
    serve.start(http_options=http_options, proxy_location="HeadOnly" if not address else None)
    application = app(AppArguments.model_validate(config.model_dump()))
    target = serve.RunTarget(application, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    wait_until_running(APP_NAME, stop, is_patient=address is not None)


def _wait_until_ready(config: AntiphonConfig, stop: threading.Event) -> bool:
    """Wait until the ingress has found its workers; False if stopped first."""
    url = f"{base_url(config.http.host, config.http.port)}/ready"
    deadline = time.monotonic() + _READY_SECONDS
    reason = "no answer"
    opener = direct_opener()
    while time.monotonic() < deadline:
        try:
            with opener.open(url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
        except OSError as error:
            reason = str(error)
        if stop.wait(0.1):
            return False
    raise ConfigError(f"{url} was not ready within {_READY_SECONDS:.0f} s: {reason}")


def _remove(address: str | None) -> None:
    """End what was deployed; what fails here does not hide the reason why it ends."""
    from ray import serve

    try:
        if address is None:
            serve.shutdown()  # type: ignore[no-untyped-call]
        elif APP_NAME in serve.status().applications:
            serve.delete(APP_NAME)
    except Exception as error:
        typer.echo(f"application {APP_NAME!r} may be there still: {error}", err=True)


def _finish_open_requests(seconds: float, hurry: threading.Event) -> None:
    """Refuse new requests and wait for open ones; on return none is open."""
    from ray import serve

    typer.echo(f"finishing open requests, for {seconds:.0f} s at most; once more ends them now")
    try:
        ingress = serve.get_deployment_handle(INGRESS_NAME, APP_NAME)
        finishing = ingress.broadcast("stop_taking", seconds)
        deadline = time.monotonic() + seconds + _ANSWER_SECONDS
        while not hurry.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                finishing.results(timeout_s=_POLL_SECONDS)
                return
        ingress.broadcast("stop_taking", 0.0).results(timeout_s=_ANSWER_SECONDS)
    except Exception as error:  # the application may be what failed; it is stopped anyway
        typer.echo(f"open requests are cut off: {error}", err=True)


def _print_ready(config: AntiphonConfig, seconds: float) -> None:
    base = base_url(config.http.host, config.http.port)
    body = {
        "model": config.model.name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 64,
        "stream": True,
    }
    typer.secho(f"\nready after {seconds:.1f} s: {base}/v1", fg="green", bold=True)
    typer.echo(f"  model    {config.model.name}")
    for worker in _workers(base):
        num_tokens = worker["num_blocks"] * worker["block_size"]
        kv_gib = num_tokens * worker["kv_bytes_per_token"] / 2**30
        typer.echo(
            f"  {worker['role']:<9}on {worker['node']}, process {worker['pid']}, "
            f"KV cache of {num_tokens} tokens ({kv_gib:.2f} GiB)"
        )
    typer.echo(
        f"  ingress  {config.http.ingress_replicas} process, metrics at {base}/metrics/targets"
    )
    typer.echo(f"  keys     {config.http.api_key_file or 'none: everybody may use it'}")
    key = '-H "Authorization: Bearer $API_KEY" ' if config.http.api_key_file else ""
    typer.echo("\ntry it:\n")
    typer.echo(
        f"curl -N {base}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
    typer.echo("\nCtrl-C stops it.")


def _workers(base: str) -> list[dict[str, Any]]:
    """What ``/workers`` answers, asked for by a way that needs no API key."""
    from ray import serve

    try:
        ingress = serve.get_deployment_handle(INGRESS_NAME, APP_NAME)
        asked = ingress.list_workers.remote()
        workers: list[dict[str, Any]] = asked.result(timeout_s=_ANSWER_SECONDS)
    except Exception as error:  # the ingress may be busy already, or be replaced: it serves
        typer.echo(f"  workers  unknown ({type(error).__name__}): ask {base}/workers")
        return []
    return workers
