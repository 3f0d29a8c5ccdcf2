"""The cases of ``alert_cases`` for what may be behind the symptoms, and all cases together."""

from alert_cases import (
    CAPACITY,
    D1,
    D1_ALL,
    SYMPTOMS,
    AlertCase,
    Series,
    lives,
    of_ingress,
    of_worker,
)

_DECODE = 'pool="decode"'
_CONNECTED = "antiphon_router_workers"


def _wanted(values: str) -> Series:
    return of_ingress("antiphon_workers_wanted", values, _DECODE)


LADDER = [
    AlertCase(
        "AntiphonPrefillFallbacks",
        20,
        of_worker("antiphon_prefill_fallbacks_total", "0+1x30", 'reason="stalled"')
        | of_worker("antiphon_prefill_attempts_total", "0+9x30", 'outcome="complete"'),
        of_worker("antiphon_prefill_fallbacks_total", "0+1x30", 'reason="stalled"')
        | of_worker("antiphon_prefill_attempts_total", "0+99x30", 'outcome="complete"'),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonPrefillAttemptsFailing",
        20,
        of_worker("antiphon_prefill_attempts_total", "0+2x30", 'outcome="unreachable"')
        | of_worker("antiphon_prefill_attempts_total", "0+8x30", 'outcome="complete"'),
        of_worker("antiphon_prefill_attempts_total", "0+1x30", 'outcome="unreachable"')
        | of_worker("antiphon_prefill_attempts_total", "0+19x30", 'outcome="complete"'),
        {"job": "a", "outcome": "unreachable"},
    ),
    AlertCase(
        "AntiphonPrefillShunned",
        12,
        of_worker("antiphon_prefill_fallbacks_total", "0 0 0 1+1x20", 'reason="shunned"'),
        of_worker("antiphon_prefill_fallbacks_total", "3x20", 'reason="shunned"'),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonReplays",
        20,
        of_ingress("antiphon_replays_total", "0x10 4x20", 'reason="lost", outcome="resumed"')
        | of_ingress("antiphon_replays_total", "0x10 4x20", 'reason="lost", outcome="failed"'),
        # Workers that are stopped in order hand over what they have.
        of_ingress("antiphon_replays_total", "0x10 8x20", 'reason="moved", outcome="resumed"'),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonSessionsLost",
        20,
        of_ingress("antiphon_router_sessions_lost_total", "0x8 1 2 3 4x20", 'pool="decode"'),
        of_ingress("antiphon_router_sessions_lost_total", "0x8 1x30", 'pool="decode"'),
        {"job": "a", "pool": "decode"},
    ),
    AlertCase(
        "AntiphonWorkersRestarting",
        40,
        lives("1x5 stale", "_x8 1x5 stale", "_x16 1x5 stale", "_x24 1x40"),
        # An update: all workers are replaced, and had lived long.
        lives("1x30 stale", "1x31 stale", "1x32 stale", "_x31 1x40", "_x32 1x40"),
        {"job": "a", "pool": "decode"},
    ),
    AlertCase(
        "AntiphonPoolShort",
        40,
        lives("1x60") | _wanted("2x60") | of_ingress(_CONNECTED, "2x5 1x60", _DECODE),
        # A long update: there is always one less, and always one that is new.
        lives("1x20 stale", "1x40 stale", "_x10 1x60", "_x21 1x60", "_x32 1x60", "_x43 1x60")
        | _wanted("5x60")
        | of_ingress(_CONNECTED, "5x5 4x60", _DECODE),
        {"job": "a", "pool": "decode"},
    ),
    AlertCase(
        "AntiphonWorkersUnreachable",
        10,
        lives("1x20", "1x20") | of_ingress(_CONNECTED, "2 1x20", _DECODE),
        # One is met late, and one drains, which an ingress that is younger does not know.
        lives("1x20", "1x20", "1x20")
        | {'antiphon_draining{job="a", instance="d:2", pool="decode"}': "1x20"}
        | of_ingress(_CONNECTED, "2 1 1 2x20", _DECODE),
        {"job": "a", "pool": "decode"},
    ),
]

_PART = 'part="transfer"'
_TTFT = "antiphon_time_to_first_token_seconds_sum"
_DISCARDED = "antiphon_handoff_discarded_segments_total"

HANDOFF = [
    AlertCase(
        "AntiphonHandoffSlow",
        25,
        of_ingress("antiphon_time_to_first_token_part_seconds_sum", "0+3x30", _PART)
        | of_ingress(_TTFT, "0+10x30", 'path="remote"'),
        of_ingress("antiphon_time_to_first_token_part_seconds_sum", "0+1x30", _PART)
        | of_ingress(_TTFT, "0+10x30", 'path="remote"'),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonLinksBreaking",
        20,
        of_worker("antiphon_handoff_links_broken_total", "0x10 2 4x20"),
        of_worker("antiphon_handoff_links_broken_total", "0x10 1x20"),
        D1,
    ),
    AlertCase(
        "AntiphonStagingQuarantined",
        20,
        of_worker("antiphon_handoff_quarantined_bytes", "0 4194304x30"),
        of_worker("antiphon_handoff_quarantined_bytes", "0 4194304x10 0 4194304x20"),
        D1_ALL,
    ),
    AlertCase(
        "AntiphonSegmentsCorrupt",
        12,
        of_worker(_DISCARDED, "0x10 1x20", 'reason="checksum"'),
        of_worker(_DISCARDED, "0x10 1x20", 'reason="unknown_transfer"'),
        {**D1, "reason": "checksum"},
    ),
    AlertCase(
        "AntiphonSegmentsDiscarded",
        20,
        of_worker(_DISCARDED, "0+10x30", 'reason="unknown_transfer"')
        | of_worker("antiphon_handoff_segments_total", "0+100x30"),
        # Clients leave while KV is on its way: many, and few of those that stay.
        of_worker(_DISCARDED, "0+10x30", 'reason="unknown_transfer"')
        | of_worker("antiphon_handoff_segments_total", "0+1000x30"),
        {**D1, "reason": "unknown_transfer"},
    ),
]

INGRESS = [
    AlertCase(
        "AntiphonApiKeyFileBad",
        16,
        of_ingress("antiphon_api_key_file_failures_total", "0x10 1 2 4x20"),
        # It was looked at while it was being written.
        of_ingress("antiphon_api_key_file_failures_total", "0x10 1x20"),
        {"job": "a", "instance": "i:1"},
    ),
]


def predictions(predicted: str, actual: str, right: str, all_of_them: str) -> Series:
    """Seconds, and numbers of first tokens: those that took up to twice as long, and all."""
    remote, name = 'reason="remote"', "antiphon_router_{}time_to_first_token_{}"
    return (
        of_ingress(name.format("predicted_", "seconds_total"), predicted, remote)
        | of_ingress(name.format("actual_", "seconds_total"), actual, remote)
        | of_ingress(name.format("", "ratio_bucket"), right, f'{remote}, le="2.0"')
        | of_ingress(name.format("", "ratio_bucket"), "0x240", f'{remote}, le="0.5"')
        | of_ingress(name.format("", "ratio_count"), all_of_them, remote)
    )


ROUTER_AND_ENGINE = [
    AlertCase(
        "AntiphonTelemetryStale",
        5,
        of_ingress("antiphon_router_view_age_seconds", "0 20+60x10", 'worker="d#1"')
        | of_worker("antiphon_requests_running", "3x10")
        | of_worker("antiphon_engine_steps_total", "0+100x10"),
        # A worker whose engine hangs has nothing to say; it has an alert of its own.
        of_ingress("antiphon_router_view_age_seconds", "0 20+60x10", 'worker="d#1"')
        | of_worker("antiphon_requests_running", "3x10")
        | of_worker("antiphon_engine_steps_total", "100x10"),
        {"job": "a", "instance": "i:1", "role": "ingress", "worker": "d#1"},
    ),
    AlertCase(
        "AntiphonPredictionBias",
        50,
        predictions("0+1x60", "0+3x60", "0x60", "0+1x60"),
        # All a little slower than predicted.
        predictions("0+2x60", "0+3x60", "0+1x60", "0+1x60"),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonEngineStuck",
        5,
        of_worker("antiphon_engine_last_step_age_seconds", "0 0 70+60x10"),
        of_worker("antiphon_engine_last_step_age_seconds", "0 0 40x10"),
        D1_ALL,
        "critical",
    ),
    AlertCase(
        "AntiphonStepFailures",
        12,
        of_worker("antiphon_engine_step_failures_total", "0x10 1x20"),
        of_worker("antiphon_engine_step_failures_total", "1x20"),
        D1,
    ),
]

CASES = SYMPTOMS + CAPACITY + LADDER + HANDOFF + INGRESS + ROUTER_AND_ENGINE
