"""Prometheus' promtool checks the rules, and makes each alert fire and stay quiet.

All worlds of all cases are one test to promtool, since each test of its own would cost it a quarter
of a second: a world's series are those of a scrape job of its own.
"""

import subprocess
from pathlib import Path
from typing import Any

import yaml
from alert_cases import AlertCase
from alert_cause_cases import CASES
from prometheus_binaries import ROOT, binary

RULES = sorted((ROOT / "helm/antiphon/rules").glob("*.yaml"))
_SECONDS = 120


def promtool(*arguments: str | Path) -> None:
    answer = subprocess.run(
        [binary("promtool"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "helm/antiphon/rules/alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


class World:
    """One of a case's two sets of series, and what is expected of it."""

    def __init__(self, case: AlertCase, is_firing: bool) -> None:
        self._case, self._is_firing = case, is_firing
        self._job = f"{case.alert}-{'fires' if is_firing else 'is-quiet'}"

    def series(self) -> list[dict[str, str]]:
        world = self._case.fires if self._is_firing else self._case.quiet
        return [
            {"series": name.replace('job="a"', f'job="{self._job}"'), "values": values}
            for name, values in world.items()
        ]

    def expectation(self) -> dict[str, Any]:
        """The synthetic metric ALERTS says what fires; templates of annotations stay out of it."""
        case = self._case
        firing = {"alertname": case.alert, "severity": case.severity, "alertstate": "firing"}
        labels = {**firing, **case.labels, "job": self._job}
        sample = {"labels": f"ALERTS{{{_pairs(labels)}}}", "value": 1}
        return {
            "expr": f"ALERTS{{{_pairs({**firing, 'job': self._job})}}}",
            "eval_time": f"{case.minute}m",
            "exp_samples": [sample] if self._is_firing else [],
        }


def _pairs(labels: dict[str, str]) -> str:
    return ", ".join(f'{name}="{value}"' for name, value in labels.items())


def document(*tests: dict[str, Any]) -> str:
    return yaml.safe_dump(
        {
            "rule_files": [str(path) for path in RULES],
            "evaluation_interval": "1m",
            "tests": [{"interval": "1m", **test} for test in tests],
        }
    )


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    worlds = [World(case, is_firing) for case in CASES for is_firing in (True, False)]
    test = {
        "input_series": [series for world in worlds for series in world.series()],
        "promql_expr_test": [world.expectation() for world in worlds],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(document(test))
    promtool("test", "rules", path)


def test_an_alert_fires_where_nothing_is_scraped(tmp_path: Path) -> None:
    labels = '{alertname="AntiphonDown", alertstate="firing", pool="ingress", severity="critical"}'
    expected = {
        "expr": 'ALERTS{alertstate="firing"}',
        "eval_time": "5m",
        "exp_samples": [{"labels": f"ALERTS{labels}", "value": 1}],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(document({"input_series": [], "promql_expr_test": [expected]}))
    promtool("test", "rules", path)


def test_every_alert_has_a_name_and_a_case_of_its_own() -> None:
    written = {(rule["alert"], rule["labels"]["severity"]) for rule in alerts()}
    assert {(case.alert, case.severity) for case in CASES} == written
    assert len(CASES) == len({rule["alert"] for rule in alerts()}) == len(alerts())
