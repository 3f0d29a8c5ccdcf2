"""Overview: do users get what they should, and where does the time go?"""

from dashboards.board import Board, Section
from dashboards.panels import RED, YELLOW, Chart, PanelBuilder
from dashboards.queries import INGRESS, JOB, mean, quantiles, rate, share, total

TTFT = "antiphon_time_to_first_token_seconds"
ITL = "antiphon_inter_token_latency_seconds"
_REQUESTS = "antiphon_requests_total"
_BY_TARGET = "antiphon_requests_by_target_total"
_TARGET = 'max(antiphon_target_seconds{{job="$job", target="{}"}})'
_FAILING = share(
    rate(_REQUESTS, where=f'{INGRESS}, outcome=~"failed|busy"'),
    rate(_REQUESTS, where=f'{INGRESS}, outcome=~"stop|length|failed|busy"'),
)
_TIMES_ALLOWED = "times allowed"
_TIMES = (
    'max(antiphon:slo_errors:ratio_rate5m{{job="$job", slo=~"{}"}} / on (slo) group_left () '
    "(1 - antiphon:slo_objective:ratio))"
)
# In times of what the objective allows; the alerts of alerts.yaml compare with the same.
BURN_STEPS = ((1, YELLOW), (14.4, RED))
_MISSED = share(rate(_BY_TARGET, where=f'{JOB}, met!="both"'), rate(_BY_TARGET))


def ttft_by_part(width: int) -> Chart:
    """The stages of the time to the first token, which add up to its mean."""
    return Chart(
        "Where the time to the first token goes",
        "Mean by stage; together they are the whole. A queue says that its pool is too small, "
        "transfer that the network is too slow or that chunks are too long, prefill that prompts "
        "are long.",
        "s",
        [
            (
                "{{part}}",
                f"{rate('antiphon_time_to_first_token_part_seconds_sum', by='part')} / ignoring "
                f"(part) group_left () {rate(f'{TTFT}_count')}",
            )
        ],
        width=width,
    )


def requests_by_outcome(width: int) -> Chart:
    """How requests end, at the ingress."""
    return Chart(
        "Requests by outcome",
        "stop and length are answers; aborted: the client left; busy: 503; failed: 5xx, or an "
        "error in a stream. The others are 4xx: unauthorized, unknown_model, context_length: "
        "prompts too long, unsupported: a feature that is not served, invalid: anything else.",
        "reqps",
        [("{{outcome}}", rate(_REQUESTS, by="outcome", where=INGRESS))],
        width=width,
    )


def failing(description: str) -> PanelBuilder:
    """The share of requests that went wrong here, and how many times the objective that is."""
    return _budget("Fail or are refused", description, _FAILING, "availability")


def missing_a_target(description: str) -> PanelBuilder:
    """The share of choices that were slower than wanted, and how many times the objective."""
    return _budget("Miss a target", description, _MISSED, "ttft|itl")


def _budget(title: str, description: str, share_now: str, slos: str) -> PanelBuilder:
    """Colours are those of the multiple: objectives may change, what a multiple means does not."""
    return Chart(
        title,
        f"{description} Beside it: how many times what antiphon:slo_objective:ratio allows, in "
        "five minutes. Kept up, 1 uses a month's budget in a month, 14.4 in two days.",
        "percentunit",
        [("now", share_now), (_TIMES_ALLOWED, _TIMES.format(slos))],
        width=4,
        steps=BURN_STEPS,
    ).number(judged=_TIMES_ALLOWED)


_NOW = Section(
    "Now",
    [
        failing("Of the requests that clients neither ended nor got wrong."),
        missing_a_target(
            "Of the choices that ended, those outside router.target_ttft_seconds or "
            "router.target_itl_seconds. No data where neither is set."
        ),
        Chart(
            "Requests",
            "Arrivals that have ended, per second.",
            "reqps",
            [("", rate(_REQUESTS, where=INGRESS))],
            width=4,
        ).number(),
        Chart(
            "In progress",
            "Requests that clients wait for.",
            "short",
            [("", total("antiphon_requests_in_progress"))],
            width=4,
        ).number(),
        Chart(
            "Generated",
            "Tokens per second of all workers.",
            "short",
            [("", rate("antiphon_generation_tokens_total"))],
            width=4,
        ).number(),
        Chart(
            "Prompt tokens from caches",
            "Share of prompt tokens that were found in a prefix cache, of those and the "
            "computed ones.",
            "percentunit",
            [
                (
                    "",
                    share(
                        rate("antiphon_cached_tokens_total"),
                        f"({rate('antiphon_cached_tokens_total')}"
                        f" + {rate('antiphon_prompt_tokens_total')})",
                    ),
                )
            ],
            width=4,
        ).number(),
    ],
)

_USERS = Section(
    "What users feel",
    [
        requests_by_outcome(8).areas(),
        Chart(
            "Time to the first token",
            "From the arrival of the request to its first token leaving.",
            "s",
            [*quantiles(TTFT), ("target", _TARGET.format("ttft"))],
        ).lines(),
        Chart(
            "Between two tokens",
            "Of one choice, as they arrive at the ingress.",
            "s",
            [*quantiles(ITL), ("target", _TARGET.format("itl"))],
        ).lines(),
        ttft_by_part(8).areas(),
        Chart(
            "First token by path",
            "Mean. remote: a prefill worker computed the prompt; local: the decode worker was to; "
            "fallback: it had to.",
            "s",
            [("{{path}}", mean(TTFT, by="path"))],
        ).lines(),
        Chart(
            "Whole requests",
            "From arrival to end.",
            "s",
            quantiles("antiphon_e2e_request_latency_seconds"),
        ).lines(),
    ],
)

_BUDGET = Section(
    "Error budgets and load",
    [
        Chart(
            "How fast budgets burn",
            "Errors of the last hour over what the objective allows: at 1 a month's budget lasts a "
            "month, at 14.4 two days, and somebody is woken.",
            "short",
            [
                (
                    "{{slo}}",
                    'antiphon:slo_errors:ratio_rate1h{job="$job"} / on (slo) group_left () '
                    "(1 - antiphon:slo_objective:ratio)",
                )
            ],
            steps=BURN_STEPS,
        ).lines(),
        Chart(
            "Choices by target",
            "Those that ended with stop or length.",
            "reqps",
            [("{{met}}", rate(_BY_TARGET, by="met"))],
        ).lines(),
        Chart(
            "Lengths",
            "Tokens of prompts and of answers. A change here explains one in latency.",
            "short",
            [
                (f"{name}, {legend}", query)
                for name, histogram in (
                    ("prompt", "antiphon_request_prompt_tokens"),
                    ("answer", "antiphon_request_generation_tokens"),
                )
                for legend, query in quantiles(histogram)[:2]
            ],
        ).lines(),
    ],
)

OVERVIEW = Board(
    "overview",
    "overview",
    "Do users get what they should, and where does the time go?",
    [_NOW, _USERS, _BUDGET],
)
