"""The dashboards are what their source says, and say what a reader needs."""

from typing import Any

import pytest
from dashboard_queries import dashboards, metric_names, panel_queries, panels, rules
from listed_metrics import metric_labels

import dashboard_files

GRID_COLUMNS = 24
RUNBOOK_LINK = "${runbooks}#${__value.text}"


def test_the_files_are_what_the_source_makes() -> None:
    written = {path.name: path.read_text() for path in dashboard_files.FOLDER.glob("*")}
    assert written == dashboard_files.files(), "call `make dashboards`"


@pytest.mark.parametrize(("name", "panel"), panels(), ids=lambda value: str(value)[:20])
def test_every_panel_says_what_it_shows(name: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
    if len(panel["targets"]) > 1 and panel["type"] == "timeseries":
        assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("name", dashboards())
def test_rows_are_full_and_nothing_overlaps(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboards()[name]["panels"]:
        grid = panel["gridPos"]
        assert grid.get("x", 0) + grid["w"] <= GRID_COLUMNS, panel["title"]
        cells = {
            (grid.get("x", 0) + x, grid["y"] + y)
            for x in range(grid["w"])
            for y in range(grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", dashboards())
def test_dashboards_lead_to_each_other_and_to_the_runbooks(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["uid"] == f"antiphon-{name}"
    others, runbooks = dashboard["links"]
    assert others["tags"] == dashboard["tags"] == ["antiphon"]
    assert others["keepTime"]
    assert others["includeVars"]
    assert runbooks["url"] == "${runbooks}"
    assert {"datasource", "job", "runbooks"} <= {v["name"] for v in dashboard["templating"]["list"]}


@pytest.mark.parametrize(
    ("title", "slos"), [("Fail or are refused", "availability"), ("Miss a target", "ttft|itl")]
)
def test_colours_of_a_budget_follow_the_objective(title: str, slos: str) -> None:
    found = [(name, panel) for name, panel in panels() if panel["title"] == title]
    assert {name for name, _ in found} == {"overview", "on-call"}
    for _, panel in found:
        share, multiple = panel["targets"]
        assert f'slo=~"{slos}"' in multiple["expr"]
        assert multiple["expr"].endswith("(1 - antiphon:slo_objective:ratio))")
        (override,) = panel["fieldConfig"]["overrides"]
        assert override["matcher"]["options"] == multiple["legendFormat"] != share["legendFormat"]
        properties = {item["id"]: item["value"] for item in override["properties"]}
        assert [step["value"] for step in properties["thresholds"]["steps"]] == [None, 1, 14.4]
        assert properties["unit"] == "short"
        (plain,) = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert plain["value"] is None


def test_numbers_are_those_of_now_and_none_is_not_a_number() -> None:
    """The share of the last request of the evening, in red, all night: that is no number of now."""
    numbers = [panel for _, panel in panels() if panel["type"] == "stat"]
    assert numbers
    for panel in numbers:
        assert panel["options"]["reduceOptions"]["calcs"] == ["last"], panel["title"]
        assert all(t["instant"] and not t["range"] for t in panel["targets"]), panel["title"]
        (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
        assert mapping["options"] == {"match": "null+nan", "result": {"text": "none"}}


def test_a_firing_alert_leads_to_its_runbook() -> None:
    (table,) = [p for name, p in panels() if name == "on-call" and p["type"] == "table"]
    (override,) = table["fieldConfig"]["overrides"]
    assert override["matcher"]["options"] == "alertname"
    (link,) = override["properties"][0]["value"]
    assert link["url"] == RUNBOOK_LINK


def test_queries_name_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {name + suffix for name in metric_labels() for suffix in suffixes} | recorded
    expressions = {query.where: query.expression for query in panel_queries("a", "5m")}
    expressions |= {str(rule.get("alert", rule.get("record"))): rule["expr"] for rule in rules()}
    for where, expression in expressions.items():
        assert metric_names(expression) <= known, where
