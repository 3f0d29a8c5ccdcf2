"""Router: what it knows, what it decides, and how right it was."""

from dashboards.board import Board, Section
from dashboards.panels import RED, YELLOW, Chart
from dashboards.queries import JOB, quantile, quantiles, rate, share, total

_PREDICTED = "antiphon_router_predicted_time_to_first_token_seconds_total"
_ACTUAL = "antiphon_router_actual_time_to_first_token_seconds_total"
_KEY_FILE_FAILURES = "antiphon_api_key_file_failures_total"

_DECISIONS = Section(
    "Decisions",
    [
        Chart(
            "Why there",
            "remote: a pair; short: too little to compute for a hand-off; no_prefill: no prefill "
            "worker; decode_alone and prefill_alone: to keep the targets.",
            "reqps",
            [("{{reason}}", rate("antiphon_router_decisions_total", by="reason"))],
        ).areas(),
        Chart(
            "Time of a decision",
            "It runs on the ingress' event loop: a millisecond is too much.",
            "s",
            quantiles("antiphon_router_decision_seconds"),
            steps=[(0.001, RED)],
        ).lines(),
        Chart(
            "Not served at once",
            "Refusals by workers, and requests that lost their worker, by what became of them.",
            "reqps",
            [
                ("refused: {{reason}}", rate("antiphon_refusals_total", by="reason")),
                ("{{reason}}: {{outcome}}", rate("antiphon_replays_total", by="reason, outcome")),
            ],
        ).lines(),
    ],
)

_PREDICTIONS = Section(
    "Predictions",
    [
        Chart(
            "Actual over predicted",
            "Time to the first token, by decision. Above 1 workers are slower than the router "
            "thinks; far from 1 it chooses badly.",
            "short",
            [
                (
                    "{{reason}}",
                    share(rate(_ACTUAL, by="reason"), rate(_PREDICTED, by="reason")),
                )
            ],
            steps=[(1.5, YELLOW), (2, RED)],
        ).lines(),
        Chart(
            "Spread of that ratio",
            "Quantiles over requests; a wide spread is noise that the model does not know.",
            "short",
            [
                (legend, quantile(q, "antiphon_router_time_to_first_token_ratio"))
                for legend, q in (("10 %", 0.1), ("median", 0.5), ("90 %", 0.9))
            ],
        ).lines(),
        Chart(
            "Prompt tokens found in caches",
            "Of those found and computed; what prefix-aware routing is for.",
            "percentunit",
            [
                (
                    "{{pool}}",
                    share(
                        rate("antiphon_cached_tokens_total", by="pool"),
                        f"({rate('antiphon_cached_tokens_total', by='pool')} + "
                        f"{rate('antiphon_prompt_tokens_total', by='pool')})",
                    ),
                )
            ],
        ).lines(),
    ],
)

_KNOWLEDGE = Section(
    "Knowledge",
    [
        Chart(
            "Connected workers",
            "The fewest that any ingress has sessions with, and those that answer Prometheus: a "
            "difference is an ingress that does not reach some.",
            "short",
            [
                (
                    "{{pool}}, connected",
                    f"min by (pool) (antiphon_router_workers{{{JOB}}})",
                ),
                ("{{pool}}, scraped", f"count by (pool) (antiphon_worker_info{{{JOB}}})"),
            ],
        ).lines(),
        Chart(
            "Age of the last telemetry",
            "The oldest of all ingresses, by worker. Workers send when something changes, so "
            "idle ones are old.",
            "s",
            [
                (
                    "{{worker}}",
                    f"max by (worker) (antiphon_router_view_age_seconds{{{JOB}}})",
                )
            ],
        ).lines(),
        Chart(
            "Index",
            "Blocks that a router knows of, by worker.",
            "short",
            [
                (
                    "{{worker}}",
                    f"max by (worker) (antiphon_router_index_blocks{{{JOB}}})",
                )
            ],
        ).lines(),
        Chart(
            "Sessions lost",
            "Per second: they ended while Serve lists the worker.",
            "short",
            [("{{pool}}", rate("antiphon_router_sessions_lost_total", by="pool"))],
        ).lines(),
        Chart(
            "Requests in progress",
            "By ingress. Serve's proxy spreads them evenly.",
            "short",
            [("{{instance}}", total("antiphon_requests_in_progress", by="instance"))],
        ).lines(),
        Chart(
            "API keys",
            "Per second: requests without a valid key, and looks at a file of keys that is of no "
            "use, while the last keys stay valid.",
            "short",
            [
                ("key {{reason}}", rate("antiphon_unauthorized_total", by="reason")),
                ("bad file, {{instance}}", rate(_KEY_FILE_FAILURES, by="instance")),
            ],
        ).lines(),
    ],
)

ROUTER = Board(
    "router",
    "router",
    "What the router knows, what it decides, and how right it was.",
    [_DECISIONS, _PREDICTIONS, _KNOWLEDGE],
)
