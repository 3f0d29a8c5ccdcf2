"""Attainment against rate, a panel for each workload; needs matplotlib, of the extra ``bench``."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from goodput_search import WANTED_ATTAINMENT

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

_STYLES = {
    "two_pools": ("two pools", "tab:blue", "o-"),
    "colocated_plain": ("colocated, whole prompts", "tab:orange", "s--"),
    "colocated_chunked": ("colocated, chunks by target", "tab:green", "^--"),
    "colocated_chunked_64": ("colocated, chunks of 64", "tab:olive", "v:"),
}
_COLUMNS = 3


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the curves of a report as the file type that the path names.

    A measurement that ended early is drawn hollow, at its upper bound.
    """
    workloads = report["workloads"]
    num_rows = math.ceil(len(workloads) / _COLUMNS)
    size = (4.2 * min(_COLUMNS, len(workloads)), 3.2 * num_rows)
    figure, panels = pyplot.subplots(
        num_rows, min(_COLUMNS, len(workloads)), figsize=size, squeeze=False, sharey=True
    )
    for panel in panels.flat[len(workloads) :]:
        panel.axis("off")
    for panel, (name, workload) in zip(panels.flat, workloads.items(), strict=False):
        _draw_panel(panel, name, workload)
    panels.flat[0].legend(fontsize=7, loc="lower left")
    figure.supxlabel("requests per second")
    figure.supylabel("requests inside both targets")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(panel: Axes, name: str, workload: dict[str, Any]) -> None:
    for system, rows in workload["curve"].items():
        label, color, style = _STYLES[system]
        rows = sorted(rows, key=lambda row: row["rate"])
        rates = [row["rate"] for row in rows]
        reached = [row["attainment"] for row in rows]
        panel.plot(rates, reached, style, color=color, label=label, markersize=4, mfc="none")
        whole = [row for row in rows if not row["ended_early"]]
        panel.plot(
            [row["rate"] for row in whole],
            [row["attainment"] for row in whole],
            style[0],
            color=color,
            markersize=4,
        )
    panel.axhline(WANTED_ATTAINMENT, color="gray", linewidth=0.8)
    targets = workload["targets"]
    title = f"{name}\n{targets['ttft_seconds']:.1f} s, {targets['tpot_seconds'] * 1e3:.0f} ms"
    panel.set_title(title, fontsize=8)
    panel.set_ylim(0.4, 1.02)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    panel.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    panel.tick_params(axis="x", which="both", labelsize=6, rotation=45)
