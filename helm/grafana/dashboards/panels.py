"""The kinds of panels, each made from a ``Chart``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
PanelBuilder = Builder[models.Panel]
_Panel = TypeVar("_Panel", stat.Panel, statetimeline.Panel, table.Panel, timeseries.Panel)
_HEIGHT = 8
_STAT_HEIGHT = 4
GREEN, YELLOW, RED = "green", "yellow", "red"
_NOTHING = models.SpecialValueMap(
    models.DashboardSpecialValueMapOptions(
        models.SpecialValueMatch.NULL_AND_NAN, models.ValueMappingResult("none")
    )
)


@dataclass(frozen=True)
class Chart:
    """What a panel shows; a method for each way to show it.

    Attributes:
        description: What to make of it.
        unit: One of Grafana's, such as ``s``, ``percentunit`` or ``reqps``.
        queries: Legend and PromQL; a legend may name labels, as ``{{pool}}``.
        width: In columns, of 24.
        steps: Values from which on another colour applies; below the first one it is green.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    width: int = 8
    steps: Sequence[tuple[float, str]] = ()

    def lines(self, *, is_stacked: bool = False) -> PanelBuilder:
        """Lines over time, or areas on top of each other."""
        stacking = (
            common_models.StackingMode.NORMAL if is_stacked else common_models.StackingMode.NONE
        )
        limits = (
            common_models.GraphTresholdsStyleMode.DASHED
            if self.steps
            else common_models.GraphTresholdsStyleMode.OFF
        )
        panel = timeseries.Panel().min(0).line_width(1).fill_opacity(30 if is_stacked else 5)
        panel.show_points(common_models.VisibilityMode.NEVER)
        panel.legend(
            common.VizLegendOptions()
            .show_legend(True)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
        panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        panel.stacking(common.StackingConfig().mode(stacking))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(limits))
        return self._dressed(panel, _HEIGHT)

    def areas(self) -> PanelBuilder:
        """Parts of a whole over time."""
        return self.lines(is_stacked=True)

    def number(self, judged: str = "") -> PanelBuilder:
        """The values now, in the colours that they deserve.

        Of this instant: a series that has ended, or a share of nothing, which is NaN, has a number
        hours ago, and a range would show that one.

        Args:
            judged: Legend of the only one that has colours; it is a multiple, without a unit.
        """
        panel = stat.Panel().no_value("none").graph_mode(common_models.BigValueGraphMode.NONE)
        panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        panel.reduce_options(common.ReduceDataOptions().calcs(["last"])).mappings([_NOTHING])
        if not judged:
            return self._dressed(panel, _STAT_HEIGHT)
        values = {"thresholds": _thresholds(self.steps).build(), "unit": "short", "decimals": 1}
        properties = [models.DynamicConfigValue(name, value) for name, value in values.items()]
        panel.override_by_name(judged, properties)
        return replace(self, steps=())._dressed(panel, _STAT_HEIGHT)

    def states(self) -> PanelBuilder:
        """A bar for each series, coloured while it has a value: what was wrong, and since when."""
        panel = statetimeline.Panel().no_value("nothing")
        panel.show_value(common_models.VisibilityMode.NEVER)
        panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        return self._dressed(panel, _HEIGHT)

    def rows(self, columns: Sequence[str], link: str = "") -> PanelBuilder:
        """A table of the series that there are now; of a chart with one query.

        Args:
            columns: Labels to show before the value.
            link: Where the first column leads; may use ``${__value.text}``.
        """
        names = {"names": [*columns, "Value"]}
        shown = models.DataTransformerConfig("filterFieldsByName", options={"include": names})
        panel = table.Panel().no_value("none").with_transformation(shown)
        if link:
            links = [{"title": "runbook", "url": link, "targetBlank": True}]
            panel.override_by_name(columns[0], [models.DynamicConfigValue("links", links)])
        return self._dressed(panel, _HEIGHT)

    def _dressed(self, panel: _Panel, height: int) -> _Panel:
        """Give a panel what all kinds have."""
        panel.title(self.title).description(self.description).datasource(DATASOURCE)
        panel.unit(self.unit).span(self.width).height(height).thresholds(_thresholds(self.steps))
        for position, (legend, expression) in enumerate(self.queries):
            query = prometheus.Dataquery().ref_id(chr(ord("A") + position)).expr(expression)
            query.legend_format(legend).datasource(DATASOURCE)
            if isinstance(panel, table.Panel):
                query.format(prometheus_models.PromQueryFormat.TABLE)
            if isinstance(panel, table.Panel | stat.Panel):
                query.instant()
            else:
                query.range()
            panel.with_target(query)
        return panel


def _thresholds(steps: Sequence[tuple[float, str]]) -> dashboard.ThresholdsConfig:
    levels = [models.Threshold(None, GREEN), *(models.Threshold(*step) for step in steps)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(levels)
