"""``antiphon config``: check a configuration, show its defaults, and turn it into Serve's file."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from antiphon.config import AntiphonConfig
from antiphon.config_loading import read_yaml
from antiphon.deployment.config_document import check_documents, find_documents, summary
from antiphon.deployment.serve_document import serve_document
from antiphon.errors import ConfigError

config_app = typer.Typer(no_args_is_help=True)
_FILE_HELP = "A file for antiphon serve --config, a Serve config file, or values of the chart."
_DOCUMENT_HELP = "A file for antiphon serve --config."


@config_app.callback()
def main() -> None:
    """Check a configuration file, show it with all defaults, or turn it into Serve's."""


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help=_FILE_HELP)]) -> None:
    """Say what a file describes, or every problem in it; exits with 1 if there are problems."""
    for origin, config in _read(file):
        typer.echo(f"{origin}: ok")
        for line in summary(config):
            typer.echo(f"  {line}")


@config_app.command()
def show(
    file: Annotated[
        Path | None, typer.Argument(help=f"{_FILE_HELP} Without one: the defaults.")
    ] = None,
) -> None:
    """Print the whole document, defaults included, as YAML."""
    found = _read(file) if file is not None else [("", AntiphonConfig())]
    if len(found) > 1:
        _fail(f"{file}: holds {len(found)} configurations; show needs one")
    _print(found[0][1].model_dump(mode="json"))


@config_app.command()
def serve(file: Annotated[Path, typer.Argument(help=_DOCUMENT_HELP)]) -> None:
    """Print what serve deploy takes, with sizes where a change of them restarts nothing."""
    try:
        _print(serve_document(read_yaml(file)))
    except ConfigError as error:
        _fail(str(error))


def _print(document: dict[str, Any]) -> None:
    typer.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)


def _read(file: Path) -> list[tuple[str, AntiphonConfig]]:
    try:
        checked = check_documents(find_documents(file))
    except ConfigError as error:
        _fail(str(error))
    return [(document.origin, config) for document, config in checked]


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)
