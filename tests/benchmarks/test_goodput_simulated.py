"""What two pools are worth where only the router and the engines decide it."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "goodput_simulated.py"


def test_two_pools_win_under_a_tight_target_and_lose_nothing_where_outputs_are_long(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--requests", "40", "--json", str(path)]
    subprocess.run(command, check=True, timeout=200)
    ratios = {name: row["ratio"] for name, row in json.loads(path.read_text())["workloads"].items()}
    assert ratios["prompt_heavy_tight"] > 2
    assert ratios["decode_heavy"] > 0.95
