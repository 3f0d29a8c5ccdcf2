"""Every alert leads to a section of docs/runbooks.md, which says what to do."""

import re

import pytest
from dashboard_queries import alerts, dashboards
from listed_metrics import metric_labels
from prometheus_binaries import ROOT

PAGE = (ROOT / "docs/runbooks.md").read_text()
PARTS = ("What it means.", "What users feel.", "Look.", "Do.", "It is over when")
SECTIONS = dict(
    re.findall(
        r'^<a id="(\w+)"></a>\n\n### \1\n(.*?)(?=^<a id|^## |\Z)', PAGE, re.MULTILINE | re.DOTALL
    )
)


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    assert SECTIONS.keys() == {rule["alert"] for rule in alerts()}
    assert len(re.findall("^### ", PAGE, re.MULTILINE)) == len(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_answers_the_questions_in_order(name: str) -> None:
    section = SECTIONS[name]
    positions = [section.find(f"**{part}") for part in PARTS]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_alerts_of_what_is_not_known_say_that_a_first_start_raises_them() -> None:
    absent = [str(rule["alert"]) for rule in alerts() if "absent" in str(rule["expr"])]
    assert absent
    for name in absent:
        assert "for the first time" in " ".join(SECTIONS[name].split())


def test_sections_name_panels_that_exist() -> None:
    titles = {p["title"] for dashboard in dashboards().values() for p in dashboard["panels"]}
    named = {" ".join(name.split()) for name in re.findall(r"“([^”]+)”", PAGE)}
    assert named
    assert named <= titles


def test_questions_to_ingresses_can_be_asked() -> None:
    """Through the proxy, with a key; the own port of an ingress serves its metrics alone."""
    questions = re.findall(r"^(curl .*?:8000(/\w+).*)$", PAGE, re.MULTILINE)
    assert questions
    for command, path in questions:
        assert path in ("/health", "/ready") or '-H "Authorization: Bearer $API_KEY"' in command
    assert "own port" not in PAGE


def test_pods_can_be_asked_from_outside() -> None:
    """They have no curl, and neither Ingress nor route leads to /workers."""
    assert "port-forward service/antiphon 8000" in PAGE.partition("\n## ")[0]


def test_sections_name_metrics_that_exist() -> None:
    named = set(re.findall(r"\bantiphon_[a-z_]+", PAGE))
    assert named
    assert named <= metric_labels().keys()


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_all_that_is_needed(rule: dict[str, object]) -> None:
    annotations = rule["annotations"]
    assert isinstance(annotations, dict)
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert annotations["summary"]
    assert "{{ $value" in annotations["description"] or rule["alert"] == "AntiphonDown"
    assert annotations["runbook_url"] == f"docs/runbooks.md#{rule['alert']}"
    assert annotations["dashboard"].removeprefix("antiphon-") in dashboards()
