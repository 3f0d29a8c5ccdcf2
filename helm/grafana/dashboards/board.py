"""What all dashboards share: variables, links to each other and to runbooks, marks for alerts."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import DATASOURCE, PanelBuilder

TAG = "antiphon"
RUNBOOKS = "docs/runbooks.md"  # replaced by whoever publishes that page
_VariableBuilder = Builder[models.VariableModel]


@dataclass(frozen=True)
class Section:
    """Panels under a heading; those in one row of the grid have 24 columns together."""

    title: str
    panels: Sequence[PanelBuilder]


@dataclass(frozen=True)
class Board:
    """A dashboard.

    Attributes:
        name: Of its file; its uid is ``antiphon-<name>``.
        has_workers: Whether pools and workers can be chosen.
    """

    name: str
    title: str
    description: str
    sections: Sequence[Section]
    has_workers: bool = False

    def build(self) -> models.Dashboard:
        """Make Grafana's model of it."""
        built = (
            dashboard.Dashboard(f"Antiphon: {self.title}")
            .uid(f"antiphon-{self.name}")
            .description(self.description)
            .tags([TAG])
            .readonly()
            .time("now-3h", "now")
            .refresh("30s")
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .variables(_variables(self.has_workers))
            .annotation(_alerts())
            .link(_other_dashboards())
            .link(_runbooks())
        )
        for section in self.sections:
            built.with_row(dashboard.Row(section.title))
            for panel in section.panels:
                built.with_panel(panel)
        return _numbered(built.build())


def _numbered(built: models.Dashboard) -> models.Dashboard:
    """Give panels ids, by which they can be linked to."""
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def _variables(has_workers: bool) -> list[_VariableBuilder]:
    chosen: list[_VariableBuilder] = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        _query("job", "Deployment", "label_values(antiphon_requests_in_progress, job)"),
    ]
    if has_workers:
        workers = 'antiphon_worker_info{job="$job"'
        chosen += [
            _several("pool", "Pool", f"label_values({workers}}}, pool)"),
            _several("worker", "Worker", f'label_values({workers}, pool=~"$pool"}}, worker)'),
        ]
    runbooks = dashboard.ConstantVariable("runbooks").label("Address of the runbooks")
    return [*chosen, runbooks.value(RUNBOOKS)]


def _query(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def _several(name: str, label: str, query: str) -> dashboard.QueryVariable:
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = _query(name, label, query).multi(True).include_all(True)
    return variable.all_value(".*").current(everything)


def _alerts() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("critical alerts")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("red")
        .expr(
            'ALERTS{job="$job", alertname=~"Antiphon.*", alertstate="firing", severity="critical"}'
        )
    )


def _other_dashboards() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("Dashboards").type(models.DashboardLinkType.DASHBOARDS)
    return link.tags([TAG]).include_vars(True).keep_time(True)


def _runbooks() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("Runbooks").type(models.DashboardLinkType.LINK)
    return link.icon("doc").url("${runbooks}").target_blank(True)
