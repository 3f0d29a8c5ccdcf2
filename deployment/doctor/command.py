"""``antiphon doctor``: looks at a cluster, or at this machine, before traffic comes."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from antiphon.config import AntiphonConfig, HttpConfig
from antiphon.config_loading import parse_config, read_yaml
from antiphon.deployment.config_document import documents_in, parse
from antiphon.deployment.doctor.facts import ClusterFacts
from antiphon.errors import ConfigError

_CHART_FIRST_PORT = 20100  # where processes of the chart's pods are scraped
_SERVE_PORT = 8000  # where Serve listens if its file does not say


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="A file as for antiphon config check; default: the defaults."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster, 'auto' for the one here; default: this machine alone."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that it may take once the cluster is joined.", min=5)
    ] = 180.0,
    is_json: Annotated[
        bool, typer.Option("--json", help="Print all facts and findings for programs.")
    ] = False,
) -> None:
    """Check nodes, links and model before traffic; exits with 1 if there is something to mend."""
    try:
        wanted = read_config(config)
        facts = _survey(wanted, address, time_limit)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    from antiphon.deployment.doctor.diagnosis import diagnose
    from antiphon.deployment.doctor.report import as_json, as_text, num_problems

    findings = diagnose(facts)
    typer.echo((as_json if is_json else as_text)(facts, findings))
    raise typer.Exit(1 if num_problems(findings) else 0)


def read_config(path: Path | None) -> AntiphonConfig:
    """The configuration of a file, as it will be deployed.

    Raises:
        ConfigError: There is not exactly one, or it is wrong.
    """
    if path is None:
        return AntiphonConfig()
    text = read_yaml(path)
    documents = documents_in(text, path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: holds {len(documents)} configurations; doctor needs one")
    config = parse(documents[0])
    if "applications" in text:
        return parse_config({**config.model_dump(), "http": _serve_http(config.http, text)})
    if documents[0].data is not text:  # values of the chart
        return parse_config({**config.model_dump(), **_chart_sections(config)})
    return config


def _serve_http(http: HttpConfig, document: dict[str, Any]) -> dict[str, Any]:
    """Where Serve's file says that it listens."""
    options = document.get("http_options") or {}
    address = {"host": options.get("host", "0.0.0.0"), "port": options.get("port", _SERVE_PORT)}
    return {**http.model_dump(), **address}


def _chart_sections(config: AntiphonConfig) -> dict[str, Any]:
    """What the chart adds: where workers and ingresses go, and at which ports they are scraped."""
    placed = {
        role: {**pool.model_dump(), "resources": {f"antiphon_{role}": 1.0, **pool.resources}}
        for role, pool in config.pools.items()
    }
    places = {"antiphon_ingress": 0.001, **config.http.resources}
    http = {**config.http.model_dump(), "host": "0.0.0.0", "resources": places}
    first_port = config.metrics.first_port or _CHART_FIRST_PORT
    metrics = {**config.metrics.model_dump(), "first_port": first_port}
    return {**placed, "http": http, "metrics": metrics}


def _survey(config: AntiphonConfig, address: str | None, seconds: float) -> ClusterFacts:
    # Ray and torch take seconds to import: only now, so that --help and bad files answer at once.
    from antiphon.deployment.doctor.survey import Survey

    def report(line: str) -> None:
        typer.echo(line, err=True)

    if address is None:
        from antiphon.deployment.doctor.local_agents import LocalAgents, this_machine
        from antiphon.deployment.local_machine import with_gpus

        machine = this_machine(config)
        config = with_gpus(config, int(machine.resources["GPU"]), report)
        with closing(LocalAgents([machine])) as local:
            return Survey(local, config, seconds, report).run()
    from antiphon.deployment.doctor.ray_agents import agents_of

    report(f"joining Ray at {address}")
    with agents_of(address) as agents:
        return Survey(agents, config, seconds, report).run()
