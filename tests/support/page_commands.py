"""The commands in our pages, and what can be checked of a call without making it."""

import re
import shlex
import warnings
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer.main

from antiphon.deployment.cli import app as antiphon_command
from antiphon.deployment.openai_api import ChatCompletionRequest, CompletionRequest

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR
    from ray.scripts.scripts import cli as ray_command
    from ray.serve.scripts import cli as serve_command

ROOT = Path(__file__).parents[2]
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready"}
PATHS |= {"/metrics", "/metrics/targets", "/workers", "/requests"}
_FROM_THE_USER = {"my-values.yaml"}
_KUBECTL = {"apply", "create", "delete", "describe", "exec", "get", "logs", "port-forward", "wait"}
_HELM = {"install", "rollback", "test", "uninstall", "upgrade"}


def blocks(page: str, language: str) -> list[str]:
    """The contents of its code blocks in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The calls in its shell blocks, each as words."""
    found, pending = [], ""
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        pending += f"{line}\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue  # a quotation goes on in the next line
        pending = ""
        found += [words] if words else []
    assert not pending, f"no end of quotation: {pending}"
    return found


def check_antiphon(words: list[str]) -> None:
    command: Any = typer.main.get_command(antiphon_command)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("antiphon", words)  # raises on an unknown option or a wrong value


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    target, *variables = words
    assert target in targets
    for variable in variables:
        name, _, value = variable.partition("=")
        assert (target, name) == ("serve", "ARGS")
        check_antiphon(["serve", *shlex.split(value)])


def check_import_path(path: str) -> None:
    module, _, name = path.partition(":")
    assert callable(getattr(import_module(module), name))


def check_serve(words: list[str]) -> None:
    command = serve_command.commands[words[0]]
    context = command.make_context("serve", words[1:])
    target = context.params.get("config_or_import_path") or ""
    if ":" in target:
        check_import_path(target)


def check_curl(words: list[str]) -> None:
    (url,) = (word for word in words if word.startswith("http"))
    path = re.sub(r"^http://[^/]*", "", url)
    assert path in PATHS
    bodies = [value for option, value in pairwise(words) if option == "-d"]
    model = ChatCompletionRequest if "chat" in path else CompletionRequest
    for body in bodies:
        model.model_validate_json(body)


def check_ray(words: list[str]) -> None:
    ray_command.commands[words[0]].make_context("ray", words[1:])


def check_helm(words: list[str]) -> None:
    assert words[0] in _HELM
    # Without a registry every node looks for it in its default one, where it is not.
    assert words[0] != "install" or "image.repository=REGISTRY/antiphon" in words
    for word, value in pairwise(words):
        if word.startswith("helm/"):
            assert (ROOT / word).exists(), word
        if word == "--values":
            assert value in _FROM_THE_USER or (ROOT / value).is_file(), value


def check_docker(words: list[str]) -> None:
    if words[0] == "push":
        assert words[1].startswith("REGISTRY/")
        return
    assert words[0] == "build"
    assert (ROOT / words[words.index("-f") + 1]).is_file()


def check_kubectl(words: list[str]) -> None:
    assert _KUBECTL & set(words)
    # KubeRay makes this Service once everything serves; in an upgrade it leads to the old cluster.
    assert "-head-svc" not in " ".join(words)


def check_export(words: list[str]) -> None:
    assert words == [f"{AUTH_MODE_ENV_VAR}=token"]


def check_openssl(words: list[str]) -> None:
    assert words == ["rand", "-hex", "32", ">>", "keys"]


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]  # which make installs into


def check_python(words: list[str]) -> None:
    assert words[:2] == ["-m", "venv"]


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    assert (ROOT / words[words.index("-c") + 1]).is_file()


_CHECKS = {
    "antiphon": check_antiphon,
    "curl": check_curl,
    "docker": check_docker,
    "export": check_export,
    "helm": check_helm,
    "kubectl": check_kubectl,
    "make": check_make,
    "openssl": check_openssl,
    "pip": check_pip,
    "python3": check_python,
    "python3.11": check_python,
    "ray": check_ray,
    "serve": check_serve,
    "source": check_source,
}


def check(words: list[str]) -> None:
    """Fail if the program, an option or a file of a call is not known."""
    _CHECKS[Path(words[0]).name](words[1:])
