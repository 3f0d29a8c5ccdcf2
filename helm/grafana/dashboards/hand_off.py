"""Hand-off: KV between the pools, every rung of the ladder, and what was thrown away."""

from dashboards.board import Board, Section
from dashboards.panels import RED, YELLOW, Chart
from dashboards.queries import (
    JOB,
    WORKERS,
    quantile,
    quantiles,
    rate,
    share,
    total,
)

_PART = "antiphon_time_to_first_token_part_seconds"
_TTFT = "antiphon_time_to_first_token_seconds"

_TRANSFERS = Section(
    "Transfers",
    [
        Chart(
            "KV sent and received",
            "Bytes per second by pool: what prefill workers send, decode workers receive.",
            "Bps",
            [("{{pool}}", rate("antiphon_handoff_bytes_total", by="pool", where=WORKERS))],
        ).lines(),
        Chart(
            "Whole transfers",
            "From a transfer's first segment to all KV being in place; most of it goes on while "
            "the prompt is computed.",
            "s",
            quantiles("antiphon_handoff_transfer_seconds", where=WORKERS),
        ).lines(),
        Chart(
            "First tokens wait for transfers",
            "Exposed transfer, from the prompt's last step to all KV being in place: as the "
            "ingress hears of it, and the mean by decode worker.",
            "s",
            [
                ("90 %", quantile(0.9, _PART, where=f'{JOB}, part="transfer"')),
                (
                    "mean, {{worker}}",
                    share(
                        rate("antiphon_handoff_tail_seconds_total", by="worker", where=WORKERS),
                        rate("antiphon_handoff_transfer_seconds_count", by="worker", where=WORKERS),
                    ),
                ),
            ],
        ).lines(),
        Chart(
            "Share of the time to the first token",
            "Exposed transfer over the whole, where a prefill worker computed.",
            "percentunit",
            [
                (
                    "exposed transfer",
                    share(
                        rate(f"{_PART}_sum", where=f'{JOB}, part="transfer"'),
                        rate(f"{_TTFT}_sum", where=f'{JOB}, path="remote"'),
                    ),
                )
            ],
            steps=[(0.03, YELLOW), (0.2, RED)],
        ).lines(),
        Chart(
            "Rate of each link",
            "Bytes over the time in which they were on their way, without the copies at both ends, "
            "as the sender sees it. Compare it with router.link_bytes_per_second, by which the "
            "router plans.",
            "Bps",
            [
                (
                    "{{worker}} {{direction}} {{peer}}",
                    share(
                        rate(
                            "antiphon_handoff_link_bytes_total",
                            by="worker, direction, peer",
                            where=WORKERS,
                        ),
                        rate(
                            "antiphon_handoff_link_seconds_total",
                            by="worker, direction, peer",
                            where=WORKERS,
                        ),
                    ),
                )
            ],
            width=16,
        ).lines(),
    ],
)

_LADDER = Section(
    "The ladder: what happens when prefill fails",
    [
        Chart(
            "Attempts by outcome",
            "How prefill workers answered. All but complete are the next rung: another prefill "
            "worker, or the decode worker itself.",
            "reqps",
            [
                (
                    "{{outcome}}",
                    rate("antiphon_prefill_attempts_total", by="outcome", where=WORKERS),
                )
            ],
        ).areas(),
        Chart(
            "Prompts computed by decode workers instead",
            "By why the prefill pool did not. They slow down the streams that run there.",
            "reqps",
            [
                (
                    "{{reason}}",
                    rate("antiphon_prefill_fallbacks_total", by="reason", where=WORKERS),
                )
            ],
        ).areas(),
        Chart(
            "Messages thrown away",
            "By reason. checksum, size, range and kind are damage on the way; the others came late "
            "for transfers that had ended, which is harmless when it is rare.",
            "short",
            [
                (
                    "{{reason}}",
                    rate("antiphon_handoff_discarded_segments_total", by="reason", where=WORKERS),
                )
            ],
        ).lines(),
    ],
)

_LINKS = Section(
    "Links and memory",
    [
        Chart(
            "Links",
            "Offered, open or being made.",
            "short",
            [("{{worker}}", total("antiphon_handoff_links", by="worker", where=WORKERS))],
        ).lines(),
        Chart(
            "Made and broken",
            "Per second, with those that could not be prewarmed, and those whose ends do not go "
            "together. Links break when a worker ends; without that, look at the network.",
            "short",
            [
                (name, rate(f"antiphon_handoff_{metric}_total", where=WORKERS))
                for name, metric in (
                    ("made", "links_made"),
                    ("broken", "links_broken"),
                    ("refused", "links_refused"),
                    ("not prewarmed", "prewarm_failures"),
                )
            ],
        ).lines(),
        Chart(
            "Staging memory",
            "Where segments wait. Quarantined: of cancelled transfers that something may still "
            "write to; it should return to 0 within seconds.",
            "bytes",
            [
                (f"{{{{worker}}}}{suffix}", total(metric, by="worker", where=WORKERS))
                for suffix, metric in (
                    ("", "antiphon_handoff_staging_bytes"),
                    (" quarantined", "antiphon_handoff_quarantined_bytes"),
                )
            ],
        ).lines(),
    ],
)

HAND_OFF = Board(
    "hand-off",
    "hand-off",
    "KV between the pools, every rung of the ladder, and what was thrown away.",
    [_TRANSFERS, _LADDER, _LINKS],
    has_workers=True,
)
