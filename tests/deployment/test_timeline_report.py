"""How a timeline is drawn, held against docs/tracing.md."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml
from page_commands import blocks, check, commands

from antiphon.config_loading import parse_config
from antiphon.deployment.request_timeline import (
    AttemptTimeline,
    ChoiceTimeline,
    Found,
    RequestTimeline,
)
from antiphon.deployment.timeline_report import report
from antiphon.request_timing import FailedPrefill, RemotePrefill

PAGE = (Path(__file__).parents[2] / "docs/tracing.md").read_text()
ARRIVED_AT = datetime(2026, 11, 25, 15, tzinfo=UTC).timestamp()


def choice(**changes: Any) -> ChoiceTimeline:
    parts = dict(zip(
        ("route", "submit", "prefill_queue", "prefill", "transfer", "decode_queue", "first_step",
         "return"),
        (0.01, 0.0, 0.09, 0.3, 0.02, 0.03, 0.04, 0.01), strict=True,
    ))  # fmt: skip
    told = ChoiceTimeline(
        num_prompt_tokens=142, num_cached_tokens=16, num_output_tokens=11, finish_reason="length",
        path="remote", ttft_seconds=0.5, tpot_seconds=0.04, longest_gap_seconds=0.06,
        last_token_at=0.9, parts=parts,
        remote=RemotePrefill("p1", 0.01, 0.3, 0.05, 32, 125),
        failed_prefills=(FailedPrefill("p0", "stalled", 0.07),),
        attempts=[
            AttemptTimeline("d0", "decode", "n0", "remote", "p0", 0.4, 0.005, 0.006, "busy"),
            AttemptTimeline("d1", "decode", "n0", "remote", "p1", 0.45, 0.01, 0.95, None),
        ],
    )  # fmt: skip
    return msgspec.structs.replace(told, **changes)


def drawn(*choices: ChoiceTimeline) -> str:
    request = RequestTimeline(
        request_id="demo-17", ingress="i0", trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        path="/v1/chat/completions", arrived_at=ARRIVED_AT, seconds=1.0, outcome="length",
        choices=list(choices),
    )  # fmt: skip
    return "\n".join(report(Found([request], 1, 0)))


def test_a_timeline_is_drawn_as_on_its_page() -> None:
    (drawing,) = blocks(PAGE, "text")
    assert drawn(choice()) == drawing.rstrip()


def test_the_examples_of_the_page_are_valid() -> None:
    for words in commands(PAGE):
        check(words)
    for block in blocks(PAGE, "yaml"):
        assert parse_config(yaml.safe_load(block)).tracing.endpoint is not None


def test_what_has_not_happened_is_not_drawn() -> None:
    waiting = choice(
        path=None, ttft_seconds=None, tpot_seconds=None, last_token_at=None, parts={}, remote=None,
        failed_prefills=(), finish_reason=None, num_output_tokens=0, attempts=[],
    )  # fmt: skip
    text = drawn(waiting)
    assert "no token yet      1,000.0  100.0 %  ########################################" in text
    assert "first token" not in text
    assert text.endswith("whole             1,000.0  100.0 %\n")
