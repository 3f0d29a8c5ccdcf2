"""What the README says is what the program does: keys, commands, parameters, model families."""

import ast
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import configuration_page
import pytest
import typer.main
import yaml
from page_commands import PATHS, blocks, check, check_import_path, commands
from tiny_models import FAMILIES, REFUSED

from antiphon.config_loading import parse_config
from antiphon.deployment.cli import app as antiphon_command
from antiphon.deployment.openai_api import ChatCompletionRequest, CompletionRequest

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    _, _, rest = README.partition(f"## {heading}\n")
    assert rest, f"the README has no section {heading!r}"
    return rest.partition("\n## ")[0]


# The configuration.


def test_the_page_of_all_keys_is_fresh():
    assert configuration_page.PAGE.read_text() == configuration_page.page_text(), "make reference"


def test_the_keys_that_most_need_are_as_on_the_page_of_all():
    table = r"^\| `[^`]*` \| `[^`]*` \| .* \|$"
    written = re.findall(table, section("Configuration"), re.MULTILINE)
    rows = [line for line in configuration_page.page_text().splitlines() if line[:3] == "| `"]
    known = {configuration_page.short_row(row) for row in rows}
    assert len(written) > 10
    assert set(written) <= known, "should be of:\n" + "\n".join(sorted(known))
    assert "(docs/configuration.md)" in section("Configuration")


def test_the_examples_of_configurations_are_valid():
    documents = [yaml.safe_load(block) for block in blocks(README, "yaml")]
    kinds = {"applications" in document for document in documents}
    assert kinds == {True, False}
    for document in documents:
        if "applications" in document:
            for application in ServeDeploySchema.model_validate(document).applications:
                check_import_path(application.import_path)
                parse_config(application.args)
        else:
            parse_config(document)


# Commands.


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_every_command_is_known(words):
    check(words)


def test_the_two_commands_come_first():
    assert [words[:2] for words in commands(README)[:2]] == [["make", "serve"], ["make", "test"]]


def test_programs_are_on_the_path_before_they_are_called():
    programs = [words[0] for words in commands(README)]
    before = programs[: programs.index("source")]
    assert set(before) == {"make", "curl"}


@pytest.mark.parametrize("there", [("python3",), ("python3", "python3.11")], ids=" ".join)
def test_make_takes_the_python_that_is_there(there: tuple[str, ...], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).touch(0o755)
    answer = subprocess.run(
        [shutil.which("make") or "make", "--dry-run", "VENV=new", "new/.installed"],
        cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30,
        check=True,
    )  # fmt: skip
    assert answer.stdout.startswith(f"{tmp_path / there[-1]} -m venv new\n")


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_examples_are_python(block):
    ast.parse(block)


def test_every_option_of_serve_is_listed():
    command = typer.main.get_command(antiphon_command).commands["serve"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)) == options


def subcommands(command: Any, name: str) -> Iterator[str]:
    """Full names of all commands that do something."""
    if not hasattr(command, "commands"):
        yield name
        return
    for word, inner in command.commands.items():
        yield from subcommands(inner, f"{name} {word}")


def test_every_subcommand_is_listed():
    command = typer.main.get_command(antiphon_command)
    listed = re.findall(r"^\| `(antiphon [a-z -]*[a-z])[^`]*` \|", README, re.MULTILINE)
    assert set(listed) == {*subcommands(command, "antiphon"), "antiphon --version"}


# The HTTP surface and the models.


def test_every_served_parameter_is_listed():
    served = set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields)
    table = section("HTTP").partition("### Parameters")[2].partition("### ")[0]
    listed = re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(served)


def test_every_path_is_listed():
    listed = set(re.findall(r"^\| `(?:GET|POST) (/[^`{]*?)/?(?:\{.*)?` \|", README, re.MULTILINE))
    assert listed == PATHS


def test_the_families_are_those_that_are_tested():
    served, _, refused = section("Models").partition("Refused")
    assert set(re.findall(r"`([a-z0-9_]+)`", served.partition("Families:")[2])) == set(FAMILIES)
    assert set(re.findall(r"`([a-z0-9_]+)`", refused)) >= set(REFUSED)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
