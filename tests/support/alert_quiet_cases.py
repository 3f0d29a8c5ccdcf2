"""More worlds in which an alert must stay quiet: little happens, or somebody else is in trouble.

As in ``alert_cases``, but with a sample every 15 s, as the documented configuration scrapes.
"""

from dataclasses import dataclass

from alert_cases import Series, lives, of_ingress, of_worker
from alert_cause_cases import predictions

MINUTES = range(2, 61, 2)  # at which it is looked for


@dataclass(frozen=True)
class QuietCase:
    """A world, and the alert that it does not raise."""

    alert: str
    why: str
    world: Series


def _attempts(outcome: str, values: str) -> Series:
    return of_worker("antiphon_prefill_attempts_total", values, f'outcome="{outcome}"')


QUIET = [
    QuietCase(
        "AntiphonTelemetryStale",
        "it is asked one short thing every half minute, and has nothing to tell in between",
        of_ingress("antiphon_router_view_age_seconds", "12 27 " * 121, 'worker="d#1"')
        | of_worker("antiphon_requests_running", "0x241")
        | of_worker("antiphon_engine_steps_total", " ".join(str(i // 2) for i in range(242))),
    ),
    QuietCase(
        "AntiphonPrefillFallbacks",
        "one of eleven prompts",
        of_worker("antiphon_prefill_fallbacks_total", "0x80 1x160", 'reason="busy"')
        | _attempts("complete", "0+0.25x240"),
    ),
    QuietCase(
        "AntiphonPrefillAttemptsFailing",
        "two of twelve attempts, for want of room in an update",
        _attempts("draining", "0x80 2x160") | _attempts("complete", "0+0.25x240"),
    ),
    QuietCase(
        "AntiphonPredictionBias",
        "one of thirty prompts stalled for 35 s",
        predictions(
            "0+0.125x240",
            "0+0.125x120 50+0.125x119",
            "0+0.25x120 30x3 30+0.25x116",
            "0+0.25x240",
        ),
    ),
    QuietCase(
        "AntiphonPoolShort",
        "a worker is lost, and its successor needs ten minutes to load",
        lives("1x240", "1x80 stale", "_x121 1x119")
        | of_ingress("antiphon_workers_wanted", "2x240", 'pool="decode"')
        | of_ingress("antiphon_router_workers", "2x80 1x39 2x119", 'pool="decode"'),
    ),
]
