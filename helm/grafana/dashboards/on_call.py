"""On call: is it us, which pool, since when, and which runbook."""

from dashboards.board import Board, Section
from dashboards.overview import (
    failing,
    missing_a_target,
    requests_by_outcome,
    ttft_by_part,
)
from dashboards.panels import RED, YELLOW, Chart
from dashboards.queries import JOB, rate, total

# An alert about everything that is gone has no job.
_OURS = 'alertname=~"Antiphon.*", job=~"$job|"'
_FIRING = f'ALERTS{{{_OURS}, alertstate="firing"'
_POOLS = 'pool=~"ingress|prefill|decode|colocated"'


def _firing(severity: str, colour: str) -> Chart:
    return Chart(
        f"Firing: {severity}",
        "critical: users feel it now. warning: a cause, or a slow loss.",
        "short",
        [("", f'count({_FIRING}, severity="{severity}"}}) or vector(0)')],
        width=4,
        steps=[(1, colour)],
    )


_IS_IT_US = Section(
    "Is it us?",
    [
        _firing("critical", RED).number(),
        _firing("warning", YELLOW).number(),
        failing("Nothing here and complaints: look in front of the ingress."),
        missing_a_target("Slow, but answered."),
        Chart(
            "Requests",
            "Per second. Far fewer than usual: they do not reach us.",
            "reqps",
            [("", rate("antiphon_requests_total", where=f'{JOB}, role="ingress"'))],
            width=4,
        ).number(),
        Chart(
            "Processes that do not answer",
            "Ingresses and workers that Serve lists and Prometheus cannot reach.",
            "short",
            [("", f"count(up{{{JOB}, {_POOLS}}} == 0) or vector(0)")],
            width=4,
            steps=[(1, RED)],
        ).number(),
    ],
)

_SINCE_WHEN = Section(
    "What, and since when",
    [
        Chart(
            "Firing alerts",
            "Click a name for its runbook. Value is when its condition began to hold.",
            "dateTimeFromNow",
            [
                (
                    "",
                    f"1000 * (ALERTS_FOR_STATE{{{_OURS}}} and ignoring (alertstate) {_FIRING}}})",
                )
            ],
            width=12,
        ).rows(
            ["alertname", "severity", "pool", "worker", "slo", "reason", "outcome"],
            link="${runbooks}#${__value.text}",
        ),
        Chart(
            "Alerts over time",
            "The first bar is often the cause.",
            "short",
            [("{{alertname}}", f"max by (alertname) ({_FIRING}}})")],
            width=12,
            steps=[(1, RED)],
        ).states(),
    ],
)

_WHICH_POOL = Section(
    "Which pool?",
    [
        Chart(
            "Connected workers",
            "By pool, as the best informed ingress sees them, and how many Serve is to run. A step "
            "down is a worker that was lost or is being replaced.",
            "short",
            [
                ("{{pool}}", f"max by (pool) (antiphon_router_workers{{{JOB}}})"),
                ("{{pool}}, wanted", f"max by (pool) (antiphon_workers_wanted{{{JOB}}})"),
            ],
        ).lines(),
        ttft_by_part(8).areas(),
        requests_by_outcome(8).areas(),
        Chart(
            "Waiting",
            "Requests in the queues of each pool.",
            "short",
            [("{{pool}}", total("antiphon_requests_waiting", by="pool"))],
        ).lines(),
        Chart(
            "Fullest KV cache",
            "Of each pool, held by requests.",
            "percentunit",
            [("{{pool}}", f"max by (pool) (antiphon_kv_cache_usage_ratio{{{JOB}}})")],
            steps=[(0.95, RED)],
        ).lines(),
        Chart(
            "What is being made up for",
            "Per second: prompts that decode workers compute because prefill failed, streams that "
            "changed workers, sessions that broke, steps that failed.",
            "short",
            [
                ("prefill fallbacks", rate("antiphon_prefill_fallbacks_total")),
                ("replays", rate("antiphon_replays_total", where=f'{JOB}, outcome="resumed"')),
                ("sessions lost", rate("antiphon_router_sessions_lost_total")),
                ("failed steps", rate("antiphon_engine_step_failures_total")),
            ],
        ).lines(),
    ],
)

_DID_WE = Section(
    "Did we change something?",
    [
        Chart(
            "Workers by version",
            "Two versions are an update under way.",
            "short",
            [
                (
                    "{{pool}} {{version}}",
                    f"count by (pool, version) (antiphon_worker_info{{{JOB}}})",
                )
            ],
            width=12,
        ).areas(),
        Chart(
            "Workers that began within ten minutes",
            "By pool. With no update under way they restart by themselves.",
            "short",
            [
                (
                    "{{pool}}",
                    f"count by (pool) (antiphon_worker_info{{{JOB}}}) - (count by (pool) "
                    f"(antiphon_worker_info{{{JOB}}} and on (incarnation) "
                    f"antiphon_worker_info{{{JOB}}} offset 10m) or 0 * count by (pool) "
                    f"(antiphon_worker_info{{{JOB}}}))",
                ),
                ("{{pool}}, draining", total("antiphon_draining", by="pool")),
            ],
            width=12,
        ).lines(),
    ],
)

ON_CALL = Board(
    "on-call",
    "on call",
    "Is it us, which pool, since when, and which runbook.",
    [_IS_IT_US, _SINCE_WHEN, _WHICH_POOL, _DID_WE],
)
