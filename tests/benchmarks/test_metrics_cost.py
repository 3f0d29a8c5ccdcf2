"""The calls whose cost the benchmark of metrics adds up are those that the product has."""

import subprocess
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_EACH_ONCE = """
import metrics_cost as cost

ingress = cost.IngressMetrics(cost.RouterConfig(target_ttft_seconds=1.0, target_itl_seconds=0.5))
for work in (
    cost.worker_step(),
    cost.worker_request(),
    cost.ingress_step(ingress),
    cost.ingress_request(ingress),
):
    work()
assert b"antiphon_requests_total" in ingress.render()
"""


def test_everything_that_is_timed_can_be_called() -> None:
    # In a process of its own: the folder must not be on the path of the others.
    command = [sys.executable, "-c", _EACH_ONCE]
    subprocess.run(command, cwd=_BENCHMARKS, check=True, timeout=120)
