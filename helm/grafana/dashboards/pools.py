"""Pools: what each worker does, how full it is, and which one is unlike the others."""

from dashboards.board import Board, Section
from dashboards.panels import RED, YELLOW, Chart
from dashboards.queries import WORKERS, quantile, rate, total

_STEP = "antiphon_engine_step_seconds"


def _each(gauge: str) -> list[tuple[str, str]]:
    return [("{{worker}}", total(gauge, by="worker", where=WORKERS))]


_LOAD = Section(
    "Load",
    [
        Chart(
            "Running",
            "Requests in each worker's batch.",
            "short",
            _each("antiphon_requests_running"),
        ).lines(),
        Chart(
            "Waiting",
            "Requests in each worker's queue. One that grows alone is a slow worker; all that "
            "grow are a pool that is too small.",
            "short",
            _each("antiphon_requests_waiting"),
        ).lines(),
        Chart(
            "KV cache in use",
            "Blocks held by requests, of all. Near 100 % running requests are set back.",
            "percentunit",
            _each("antiphon_kv_cache_usage_ratio"),
            steps=[(0.85, YELLOW), (0.95, RED)],
        ).lines(),
        Chart(
            "KV cache by state",
            "Blocks of the chosen workers: held by requests, kept for their prefix, free.",
            "short",
            [("{{state}}", total("antiphon_kv_cache_blocks", by="state", where=WORKERS))],
        ).areas(),
        Chart(
            "Set back",
            "Preemptions per second: requests that lost their blocks and are computed again.",
            "short",
            [("{{worker}}", rate("antiphon_preemptions_total", by="worker", where=WORKERS))],
        ).lines(),
        Chart(
            "Requests by how they ended here",
            "At the workers; refused and moved are not errors, another worker took them.",
            "reqps",
            [
                (
                    "{{pool}} {{outcome}}",
                    rate("antiphon_worker_requests_total", by="pool, outcome", where=WORKERS),
                )
            ],
        ).lines(),
    ],
)

_WORK = Section(
    "Work",
    [
        Chart(
            "Prompt tokens",
            "Per second: computed, found in the prefix cache, received over a link.",
            "short",
            [
                (name, rate(f"antiphon_{metric}_tokens_total", where=WORKERS))
                for name, metric in (
                    ("computed", "prompt"),
                    ("cached", "cached"),
                    ("received", "received"),
                )
            ],
        ).areas(),
        Chart(
            "Generated",
            "Tokens per second of each worker.",
            "short",
            [
                (
                    "{{worker}}",
                    rate("antiphon_generation_tokens_total", by="worker", where=WORKERS),
                )
            ],
        ).lines(),
        Chart(
            "Prefill rate",
            "Prompt tokens per second while a worker computes them; the router plans with it.",
            "short",
            _each("antiphon_prefill_tokens_per_second"),
        ).lines(),
        Chart(
            "Steps",
            "Duration by kind, 90th percentile: mixed steps hold prompt tokens beside running "
            "streams, which wait for them.",
            "s",
            [("{{kind}}", quantile(0.9, _STEP, by="kind", where=WORKERS))],
        ).lines(),
        Chart(
            "Decode step",
            "A worker's own measure, smoothed. One that is slower than its like has a slow "
            "machine, or shares it.",
            "s",
            _each("antiphon_decode_step_seconds"),
        ).lines(),
        Chart(
            "Steps per second",
            "By worker. None beside waiting requests is an engine that hangs.",
            "short",
            [("{{worker}}", rate("antiphon_engine_steps_total", by="worker", where=WORKERS))],
        ).lines(),
    ],
)

_HEALTH = Section(
    "Health",
    [
        Chart(
            "Since the last step",
            "Seconds, while there is work; a minute is an engine that hangs.",
            "s",
            _each("antiphon_engine_last_step_age_seconds"),
            steps=[(60, RED)],
        ).lines(),
        Chart(
            "Failed steps",
            "Per second; the requests in them fail or are replayed. Three in a row and Serve "
            "replaces the worker.",
            "short",
            [
                (
                    "{{worker}}",
                    rate("antiphon_engine_step_failures_total", by="worker", where=WORKERS),
                )
            ],
        ).lines(),
        Chart(
            "Draining", "1 while it takes nothing new.", "short", _each("antiphon_draining")
        ).lines(),
        Chart(
            "Workers",
            "Which life of which worker runs where.",
            "none",
            [("", f"antiphon_worker_info{{{WORKERS}}}")],
            width=24,
        ).rows(["worker", "pool", "node", "instance", "model", "version", "incarnation"]),
    ],
)

POOLS = Board(
    "pools",
    "pools",
    "What each worker does, how full it is, and which one is unlike the others.",
    [_LOAD, _WORK, _HEALTH],
    has_workers=True,
)
