"""The queries of the dashboards and rules as Prometheus gets them, with all variables filled in."""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml
from prometheus_binaries import ROOT

CHART = ROOT / "helm/antiphon"


@dataclass(frozen=True)
class Query:
    """PromQL, and where it stands."""

    where: str
    expression: str


def dashboards() -> dict[str, dict[str, Any]]:
    """The generated dashboards, by file name without suffix."""
    paths = sorted((CHART / "dashboards").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def panels() -> list[tuple[str, dict[str, Any]]]:
    """Every panel that is no heading, with its dashboard's name."""
    return [
        (name, panel)
        for name, dashboard in dashboards().items()
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    ]


def panel_queries(job: str, interval: str) -> list[Query]:
    """Every query of every panel, of every variable and of the marks for alerts."""
    values = {"job": job, "pool": ".*", "worker": ".*", "__rate_interval": interval}
    found = [
        Query(
            f"{name}: {panel['title']} ({target['legendFormat']})", _filled(target["expr"], values)
        )
        for name, panel in panels()
        for target in panel["targets"]
    ]
    for name, dashboard in dashboards().items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                expression = re.match(r"label_values\((.*), \w+\)$", variable["query"]["query"])
                assert expression is not None, variable
                found.append(Query(f"{name}: ${variable['name']}", _filled(expression[1], values)))
    return found


def rules() -> list[dict[str, Any]]:
    """Every recording and alert rule."""
    documents = [yaml.safe_load(path.read_text()) for path in (CHART / "rules").glob("*.yaml")]
    return [
        rule for document in documents for group in document["groups"] for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    return [rule for rule in rules() if "alert" in rule]


def metric_names(expression: str) -> set[str]:
    """Metrics of this program and recorded ones that PromQL names."""
    return set(re.findall(r"\bantiphon(?:_\w+|:[\w:]+)", expression))


def _filled(expression: str, values: dict[str, str]) -> str:
    filled = re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)
    assert "$" not in filled, expression
    return filled
