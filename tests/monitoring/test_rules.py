"""Prometheus' promtool checks the rules, and makes each alert fire and stay quiet.

All worlds of all cases are one test to promtool, since each test of its own would cost it a quarter
of a second: a world's series are those of a scrape job of its own.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml
from alert_cases import AlertCase
from alert_cause_cases import CASES
from alert_quiet_cases import MINUTES, QUIET, QuietCase
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


def silence(case: QuietCase, number: int) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The series of a world in which an alert is never heard, and that expectation."""
    job = f"quiet-{number}"
    series = [
        {"series": name.replace('job="a"', f'job="{job}"'), "values": values}
        for name, values in case.world.items()
    ]
    firing = f"ALERTS{{{_pairs({'alertname': case.alert, 'alertstate': 'firing', 'job': job})}}}"
    expected = [
        {"expr": firing, "eval_time": f"{minute}m", "exp_samples": []} for minute in MINUTES
    ]
    return series, expected


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


def test_alerts_stay_quiet_where_little_happens(tmp_path: Path) -> None:
    worlds = [silence(case, number) for number, case in enumerate(QUIET)]
    test = {
        "interval": "15s",
        "input_series": [one for series, _ in worlds for one in series],
        "promql_expr_test": [one for _, expected in worlds for one in expected],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(document(test))
    promtool("test", "rules", path)


def test_a_deployment_without_targets_is_down_beside_one_that_is_up(tmp_path: Path) -> None:
    """As after a restart of Prometheus while no ingress answers: it has no list of targets."""
    labels = 'alertname="AntiphonDown", alertstate="firing", job="lost", severity="critical"'
    up = 'up{{job="{}", pool="ingress", instance="i"}}'
    test = {
        "input_series": [
            {"series": up.format("lost"), "values": "1x5 stale"},
            {"series": up.format("well"), "values": "1x400"},
        ],
        "promql_expr_test": [
            {"expr": 'ALERTS{alertstate="firing"}', "eval_time": when, "exp_samples": samples}
            for when, samples in (
                ("5m", []),
                ("10m", [{"labels": f"ALERTS{{{labels}}}", "value": 1}]),
                ("6h", [{"labels": f"ALERTS{{{labels}}}", "value": 1}]),
                ("6h30m", []),  # removed on purpose, by then
            )
        ],
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


def test_one_deployment_that_is_down_silences_no_other() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    (block,) = re.findall(
        r"^```yaml\n# alertmanager.yml.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL
    )
    rules = yaml.safe_load(block)["inhibit_rules"]
    assert rules
    for rule in rules:
        assert rule.get("equal") == ["job"] or 'job=""' in rule["source_matchers"], rule


def test_every_alert_has_a_name_and_a_case_of_its_own() -> None:
    written = {(rule["alert"], rule["labels"]["severity"]) for rule in alerts()}
    assert {(case.alert, case.severity) for case in CASES} == written
    assert len(CASES) == len({rule["alert"] for rule in alerts()}) == len(alerts())
