"""Finds Antiphon's configuration in the files that may hold it.

    file of                    holds the document
    antiphon serve --config    as it is
    serve run, serve deploy    as ``args`` and ``deployments`` of each application whose import path
                               is ours
    the chart                  as ``config``, which may be missing

Neither ``applications`` nor any value of the chart is a key of the document, so the file says what
it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.config import AntiphonConfig, PoolConfig
from antiphon.config_loading import parse_config, read_yaml
from antiphon.deployment.serve_document import IMPORT_PATH, configuration_of
from antiphon.errors import ConfigError

_CHART_KEYS = "/etc/antiphon/api-keys"  # where its pods have the file of API keys
_CHART_VALUES = {
    "config", "image", "imagePullSecrets", "nameOverride", "ray", "head", "pools", "env",
    "sharedMemory", "objectStoreMemory", "modelCache", "models", "autoscaling", "upgrade",
    "terminationGracePeriodSeconds", "service", "ingress", "httpRoute", "apiKeys", "scrapeConfig",
    "podMonitor", "dashboards", "prometheusRule", "podDisruptionBudget", "networkPolicy",
    "serviceAccount", "securityContext",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """One configuration, unchecked.

    Attributes:
        origin: The file and, if it is a part of it, which part; errors begin with it.
        data: What stands there.
    """

    origin: str
    data: Any


def find_documents(path: Path) -> list[Document]:
    """Read a file and return every configuration that it holds, one at least.

    Raises:
        ConfigError: The file cannot be read, or is a Serve config without an application of ours.
    """
    return documents_in(read_yaml(path), path)


def documents_in(data: dict[str, Any], path: Path) -> list[Document]:
    """Return every configuration in what was read from a file; see ``find_documents``."""
    if data.keys() & AntiphonConfig.model_fields.keys():
        return [Document(str(path), data)]
    if "applications" in data:
        return _of_applications(path, data["applications"])
    if "config" in data or _are_values_without_config(data):
        document = _of_chart(data.get("config", {}), data.get("apiKeys"))
        return [Document(f"{path}: config", document)]
    return [Document(str(path), data)]


def _are_values_without_config(data: dict[str, Any]) -> bool:
    """Whether all keys are the chart's; ``models`` alone is rather a mistyped ``model``."""
    return data.keys() <= _CHART_VALUES and data.keys() - {"models"} != set()


def _of_chart(config: Any, keys: Any) -> Any:
    """The document as the chart completes it: it says where it mounts the file of API keys."""
    http = config.get("http") or {} if isinstance(config, dict) else None
    has_keys = isinstance(keys, dict) and (keys.get("keys") or keys.get("existingSecret"))
    if not has_keys or not isinstance(http, dict):
        return config  # the parser will say what is wrong with it
    file = f"{_CHART_KEYS}/{keys.get('secretKey', 'keys')}"
    return {**config, "http": {"api_key_file": file, **http}}


def _of_applications(path: Path, applications: Any) -> list[Document]:
    found = applications if isinstance(applications, list) else []
    ours = [
        (index, application)
        for index, application in enumerate(found)
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH
    ]
    if not ours:
        raise ConfigError(f"{path}: applications: none has import_path {IMPORT_PATH}")
    origins = [(f"{path}: applications.{index}", application) for index, application in ours]
    return [Document(f"{o}.args", configuration_of(a, o)) for o, a in origins]


def check_documents(documents: Iterable[Document]) -> list[tuple[Document, AntiphonConfig]]:
    """Check all of them.

    Raises:
        ConfigError: Names the problems of every document, not of the first one only.
    """
    good, problems = [], []
    for document in documents:
        try:
            good.append((document, parse(document)))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return good


def parse(document: Document) -> AntiphonConfig:
    """Check one document.

    Raises:
        ConfigError: Names every offending key.
    """
    if document.data is not None and not isinstance(document.data, dict):
        kind = type(document.data).__name__
        raise ConfigError(f"{document.origin}: expected a mapping, got {kind}")
    return parse_config(document.data, document.origin)


def summary(config: AntiphonConfig) -> list[str]:
    """Say in a few lines what a deployment is and needs."""
    model, http, pools = config.model, config.http, config.pools
    lines = [f"model     {model.source}, served as {model.name}"]
    lines += [f"{role:<9} {_workers(pool)}" for role, pool in pools.items()]
    needed = [
        _count(sum(pool.replicas * pool.num_cpus for pool in pools.values()), "CPU"),
        _count(sum(pool.replicas * pool.num_gpus for pool in pools.values()), "GPU"),
    ]
    resources: dict[str, float] = {}
    asking = [(pool.replicas, pool.resources) for pool in pools.values()]
    for replicas, wanted in [*asking, (http.ingress_replicas, http.resources)]:
        for name, amount in wanted.items():
            resources[name] = resources.get(name, 0.0) + replicas * amount
    needed += [f"{amount:g} of {name}" for name, amount in sorted(resources.items())]
    lines.append(f"needs     {', '.join(needed)}")
    lines.append(f"endpoint  {http.host}:{http.port}, {http.ingress_replicas} of the ingress")
    return lines


def _workers(pool: PoolConfig) -> str:
    needs = f"{_count(pool.num_cpus, 'CPU')} and {_count(pool.num_gpus, 'GPU')}"
    return f"{_count(pool.replicas, 'worker')}, each with {needs}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
