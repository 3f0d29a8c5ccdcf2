"""Writes the Grafana dashboards into the chart: ``python dashboard_files.py``."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.board import Board
from dashboards.hand_off import HAND_OFF
from dashboards.on_call import ON_CALL
from dashboards.overview import OVERVIEW
from dashboards.pools import POOLS
from dashboards.router import ROUTER

FOLDER = Path(__file__).parents[1] / "antiphon/dashboards"
BOARDS = (OVERVIEW, POOLS, HAND_OFF, ROUTER, ON_CALL)


def render(board: Board) -> str:
    """The JSON that Grafana imports."""
    return json.dumps(board.build(), cls=JSONEncoder, indent=2) + "\n"


def files() -> dict[str, str]:
    """Contents by file name."""
    return {f"{board.name}.json": render(board) for board in BOARDS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)
