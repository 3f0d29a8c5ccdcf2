"""For each alert the series that make it fire, and much the same ones that must not.

Series are in promtool's notation, one sample a minute. ``fires`` and ``quiet`` are two worlds; the
alert is looked for at ``minute`` in both. Durations are those of the rules as they are shipped.
"""

from dataclasses import dataclass, field

Series = dict[str, str]

_UP = 'up{job="a", pool="ingress", instance="i:1", worker="ingress#1", node="n"}'
_WORKER = 'job="a", instance="d:1", pool="decode", worker="d#1", role="decode"'
_INGRESS = 'job="a", instance="i:1", role="ingress"'
_REQUESTS = f"antiphon_requests_total{{{_INGRESS}, outcome=%s}}"
_BY_TARGET = f"antiphon_requests_by_target_total{{{_INGRESS}, met=%s}}"
_CLIENTS_FAULT = ("invalid", "unauthorized", "unknown_model", "context_length", "unsupported")
_NO_EVENTS = ("aborted", *_CLIENTS_FAULT)


@dataclass(frozen=True)
class AlertCase:
    """Two worlds, and the labels of the alert in the first; severity is one of them."""

    alert: str
    minute: int
    fires: Series
    quiet: Series
    labels: dict[str, str] = field(default_factory=dict)
    severity: str = "warning"


def _requests(**rates: str) -> Series:
    return {_REQUESTS % f'"{outcome}"': values for outcome, values in rates.items()}


def _targets(**rates: str) -> Series:
    return {_BY_TARGET % f'"{met}"': values for met, values in rates.items()}


def of_worker(name: str, values: str, labels: str = "") -> Series:
    return {f"{name}{{{_WORKER}{', ' + labels if labels else ''}}}": values}


def of_ingress(name: str, values: str, labels: str = "") -> Series:
    return {f"{name}{{{_INGRESS}{', ' + labels if labels else ''}}}": values}


def lives(*lives: str) -> Series:
    """Workers of one pool, each under an incarnation of its own."""
    info = 'antiphon_worker_info{job="a", pool="decode", '
    return {
        f'{info}instance="d:{i}", worker="d#{i}", incarnation="{i}"}}': values
        for i, values in enumerate(lives)
    }


D1 = {"job": "a", "pool": "decode", "worker": "d#1"}
D1_ALL = {**D1, "instance": "d:1", "role": "decode"}

SYMPTOMS = [
    AlertCase("AntiphonDown", 5, {_UP: "1 1 0x10"}, {_UP: "1 0 1x10"}, {"job": "a"}, "critical"),
    AlertCase(
        "AntiphonPoolGone",
        5,
        of_ingress("antiphon_router_workers", "2 2 0x10", 'pool="prefill"'),
        of_ingress("antiphon_router_workers", "2 2 1x10", 'pool="prefill"'),
        {"job": "a", "pool": "prefill"},
        "critical",
    ),
    AlertCase(
        "AntiphonNoProgress",
        10,
        of_ingress("antiphon_requests_in_progress", "3x10")
        | of_worker("antiphon_generation_tokens_total", "7x10")
        | of_worker("antiphon_prompt_tokens_total", "9x10"),
        # A prompt is being computed, and nothing is generated meanwhile.
        of_ingress("antiphon_requests_in_progress", "3x10")
        | of_worker("antiphon_generation_tokens_total", "7x10")
        | of_worker("antiphon_prompt_tokens_total", "0+9x10"),
        {"job": "a"},
        "critical",
    ),
    AlertCase(
        "AntiphonErrorBudgetBurn",
        70,
        _requests(stop="0+97x90", failed="0+2x90", busy="0+1x90"),
        # What clients end themselves or ask wrongly does not count.
        _requests(stop="0+97x90", failed="0x90", busy="0x90")
        | _requests(**dict.fromkeys(_NO_EVENTS, "0+20x90")),
        {"job": "a", "slo": "availability"},
        "critical",
    ),
    AlertCase(
        "AntiphonErrorBudgetSlowBurn",
        60,
        _requests(stop="0+998x70", failed="0+2x70"),
        _requests(stop="0+9995x70", failed="0+5x70"),
        {"job": "a", "slo": "availability"},
    ),
    AlertCase(
        "AntiphonTTFTBudgetBurn",
        70,
        _targets(both="0+80x90", ttft_missed="0+10x90", neither="0+10x90", itl_missed="0x90"),
        _targets(both="0+80x90", ttft_missed="0x90", neither="0x90", itl_missed="0+20x90"),
        {"job": "a", "slo": "ttft"},
        "critical",
    ),
    AlertCase(
        "AntiphonTTFTBudgetSlowBurn",
        60,
        _targets(both="0+98x70", ttft_missed="0+2x70", itl_missed="0x70"),
        _targets(both="0+995x70", ttft_missed="0+5x70", itl_missed="0x70"),
        {"job": "a", "slo": "ttft"},
    ),
    AlertCase(
        "AntiphonITLBudgetBurn",
        70,
        _targets(both="0+80x90", itl_missed="0+10x90", neither="0+10x90", ttft_missed="0x90"),
        # Two slow answers in an hour with three in all.
        _targets(both="0x90", itl_missed="0x30 1 2x90"),
        {"job": "a", "slo": "itl"},
        "critical",
    ),
    AlertCase(
        "AntiphonITLBudgetSlowBurn",
        420,
        _targets(both="0+98x480", itl_missed="0+2x480"),
        # It was long ago: three days are bad, six hours are not.
        _targets(both="0+98x480", itl_missed="0+10x30 300x450"),
        {"job": "a", "slo": "itl"},
    ),
    AlertCase(
        "AntiphonTargetDown",
        6,
        {f"up{{{_WORKER}}}": "1 0x10"},
        {f"up{{{_WORKER}}}": "1 0 0 1x10", 'up{job="b", instance="x"}': "0x10"},
        D1_ALL,
    ),
]

CAPACITY = [
    AlertCase(
        "AntiphonRefusing",
        15,
        _requests(stop="0+90x20", busy="0+10x20"),
        _requests(stop="0+98x20", busy="0+2x20"),
        {"job": "a"},
    ),
    AlertCase(
        "AntiphonQueueGrowing",
        30,
        of_worker("antiphon_requests_waiting", "1+1x40")
        | of_worker("antiphon_requests_running", "8x40"),
        # Long, but it does not grow.
        of_worker("antiphon_requests_waiting", "20x40")
        | of_worker("antiphon_requests_running", "8x40"),
        {"job": "a", "pool": "decode"},
    ),
    AlertCase(
        "AntiphonKVCacheFull",
        15,
        of_worker("antiphon_kv_cache_usage_ratio", "0.99x20")
        | of_worker("antiphon_preemptions_total", "0+1x20"),
        # Full of long answers that all fit.
        of_worker("antiphon_kv_cache_usage_ratio", "0.99x20")
        | of_worker("antiphon_preemptions_total", "4x20"),
        D1_ALL,
    ),
]
