"""The ``antiphon`` command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from antiphon import __version__
from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config, read_yaml
from antiphon.deployment.config_command import config_app
from antiphon.deployment.doctor.command import doctor
from antiphon.deployment.plan_command import plan
from antiphon.deployment.trace_command import trace
from antiphon.errors import ConfigError
from antiphon.workers.model_source import with_name

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(config_app, name="config")
app.command()(plan)
app.command()(doctor)
app.command()(trace)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Serve large language models with prefill and decode on different workers."""


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Folder with safetensors, GGUF file, hub name or built-in.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.", min=0)] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.", min=0)] = None,
    colocated: Annotated[
        int | None, typer.Option(help="Workers that do both; alone unless others are named.", min=0)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options override it.")] = None,
    address: Annotated[
        str | None, typer.Option(help="An existing Ray cluster, 'auto' for the one here.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key per line; without it none is asked.")
    ] = None,
) -> None:
    """Start the application and serve until Ctrl-C."""
    pools = {"prefill": prefill, "decode": decode, "colocated": colocated}
    try:
        keys = str(api_key_file.absolute()) if api_key_file is not None else None
        http = {"host": host, "port": port, "api_key_file": keys}
        parsed = merge_options(config, model, pools, http)
        # Ray takes seconds to import: only now, so that --help and bad options answer at once.
        from antiphon.deployment.launcher import launch

        launch(parsed, address)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


@app.command()
def drain(
    within: Annotated[float, typer.Option(help="Seconds that it may take.", min=1)] = 110.0,
    node: Annotated[
        str | None, typer.Option(help="Ray's id of the node; default: the one on this machine.")
    ] = None,
) -> None:
    """Empty this Ray node before it is stopped: workers start elsewhere, requests finish."""
    from antiphon.deployment.node_drain import drain_node

    try:
        is_empty = drain_node(node, within, typer.echo)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if is_empty else 1)


def merge_options(
    config: Path | None, model: str | None, pools: dict[str, int | None], http: dict[str, Any]
) -> AntiphonConfig:
    """Lay the command line over the configuration file.

    Raises:
        ConfigError: The result does not describe a deployment.
    """
    data = read_yaml(config) if config is not None else {}
    if pools["colocated"] and config is None:
        # Colocated workers replace the default pools; they join those that are named.
        pools = {role: replicas or 0 for role, replicas in pools.items()}
    if model is not None:
        data = _with(data, "model", {"source": with_name(model)})
    for role, replicas in pools.items():
        if replicas is not None:
            data = _with(data, role, {"replicas": replicas})
    given = {key: value for key, value in http.items() if value is not None}
    if given:
        data = _with(data, "http", given)
    return parse_config(data, str(config) if config is not None else "command line")


def _with(data: dict[str, Any], section: str, values: dict[str, Any]) -> dict[str, Any]:
    old = data.get(section) or {}
    if not isinstance(old, dict):
        return data  # the parser will say what is wrong with it
    return {**data, section: {**old, **values}}
