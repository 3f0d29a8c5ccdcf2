"""With targets a request may leave the pair: each rule, where it does and where it does not."""

import random
import time

import pytest
from msgspec.structs import replace

from antiphon.config import RouterConfig
from antiphon.messages import Load, Role
from antiphon.router.decision import Reason
from antiphon.router.policy import Policy

PROMPT = list(range(401))  # 0.4 s at the 1000 tokens/s of the idle workers in conftest.py
SHORT = list(range(40))
MEASURED = {"decode_base_seconds": 0.04, "decode_stream_seconds": 0.005}


def policy(ttft: float | None = 2.0, itl: float | None = 0.1) -> Policy:
    return Policy(RouterConfig(target_ttft_seconds=ttft, target_itl_seconds=itl))


def set_load(cluster, view, name, **changes):
    load = replace(cluster.idle, **{**MEASURED, **changes})
    view.apply(name, cluster.delta(view.get(name).sequence + 1, load), 0.0)


def pair(cluster, prefill=None, decode=None):
    """A prefill and a decode worker, measured, with these changes to their loads."""
    view = cluster.view(prefill=1, decode=1)
    set_load(cluster, view, "p0", **(prefill or {}))
    set_load(cluster, view, "d0", **(decode or {}))
    return view


def streams(number: int, full_step: float = 0.09) -> dict[str, float]:
    """A load of streams that decode, and what a step full of prompt makes of them."""
    step = 0.04 + 0.005 * number
    return {
        "num_running": number,
        "num_streams": number,
        "num_decoding": number,
        "prompt_gap_seconds": max(full_step, step + 0.016),
        "prompt_gap_tokens": 16,
    }


def choose(chooser, view, tokens=PROMPT):
    return chooser.choose(view, view.hash_prompt(tokens), 0.0)


# A decode worker alone: prefill's queue would miss the target, and its own streams can bear it.


def test_decode_computes_a_prompt_that_would_wait_too_long_for_prefill(cluster):
    view = pair(cluster, prefill={"num_queued_tokens": 3000})
    decision = choose(policy(), view)
    assert decision.reason is Reason.DECODE_ALONE
    assert decision.prefill is None
    assert decision.decode.role is Role.DECODE
    assert decision.predicted_ttft_seconds == pytest.approx(0.4 + 1.5 * 0.045)


def test_a_short_queue_is_no_reason_to_leave_the_pair(cluster):
    assert choose(policy(), pair(cluster, {"num_queued_tokens": 100})).reason is Reason.REMOTE


def test_decode_with_a_queue_of_its_own_is_no_way_out(cluster):
    view = pair(cluster, {"num_queued_tokens": 3000}, {"num_queued_tokens": 3500})
    assert choose(policy(), view).reason is Reason.REMOTE


def test_streams_that_a_prompt_would_hold_up_keep_it_away(cluster):
    queued = {"num_queued_tokens": 1000}
    # 1.4 s of 2 at the pair. Alone: 25 steps of 90 ms beside 2 streams, and 0.9 of their target.
    assert choose(policy(), pair(cluster, queued, streams(2))).reason is Reason.REMOTE
    # With 10 s to the first token that is soon enough, and the pair would miss.
    queued = {"num_queued_tokens": 12_000}
    assert choose(policy(10.0), pair(cluster, queued, streams(2))).reason is Reason.DECODE_ALONE


@pytest.mark.parametrize(("full_step", "reason"), [(0.09, "decode_alone"), (0.099, "remote")])
def test_prompts_that_no_step_lets_break_the_target_go_where_they_come_sooner(
    cluster, full_step, reason
):
    # 7.4 s of 10 at the pair. Alone 2.3 s, in which every step is full.
    view = pair(cluster, {"num_queued_tokens": 7000}, streams(2, full_step))
    assert choose(policy(10.0), view).reason == reason


def test_where_all_miss_the_least_miss_wins(cluster):
    view = pair(cluster, {"num_queued_tokens": 9000}, {"num_queued_tokens": 5000})
    assert choose(policy(), view).reason is Reason.DECODE_ALONE
    view = pair(cluster, {"num_queued_tokens": 5000}, {"num_queued_tokens": 9000})
    assert choose(policy(), view).reason is Reason.REMOTE


# A prefill worker alone: decode has as many streams as its target bears, and prefill has time.


def test_prefill_keeps_a_request_that_decode_has_no_room_for(cluster):
    view = pair(cluster, decode=streams(14))  # 110 ms
    decision = choose(policy(), view)
    assert decision.reason is Reason.PREFILL_ALONE
    assert decision.decode.incarnation == "p0"
    assert decision.prefill is None
    assert choose(policy(), view, SHORT).reason is Reason.PREFILL_ALONE


def test_decode_within_the_target_keeps_its_requests(cluster):
    full_enough = pair(cluster, decode=streams(5))  # 70 ms
    assert choose(policy(itl=0.15), full_enough).reason is Reason.REMOTE
    assert choose(policy(itl=0.1), full_enough).reason is Reason.PREFILL_ALONE
    assert choose(policy(), pair(cluster), SHORT).reason is Reason.SHORT


@pytest.mark.parametrize(("share", "reason"), [(0.2, "prefill_alone"), (0.7, "remote")])
def test_prefill_that_spends_its_time_on_prompts_cannot_generate(cluster, share, reason):
    # 45 ms a step at prefill, of which prompts take a share: 56 ms or 150 ms; 115 ms at decode.
    view = pair(cluster, {"prompt_share": share}, streams(14))
    assert choose(policy(), view).reason == reason


def test_prefill_takes_streams_until_it_is_as_full(cluster):
    view = pair(cluster, decode=streams(14))
    chooser, reasons = policy(), []
    for _ in range(30):
        decision = choose(chooser, view, SHORT)
        chooser.on_sent(view, decision)
        reasons.append(decision.reason)
    on_prefill = reasons.count(Reason.PREFILL_ALONE)
    assert reasons[:10] == [Reason.PREFILL_ALONE] * 10
    # 44 streams on two workers whose steps are equally long.
    assert 44 - on_prefill - 5 < on_prefill < 44 - on_prefill + 5


def test_a_prefill_worker_that_never_decoded_is_taken_for_the_like_of_decode(cluster):
    view = pair(cluster, {"prompt_share": 0.7}, streams(14))
    unmeasured = {"decode_base_seconds": 0.0, "decode_step_seconds": 0.001, "prompt_share": 0.7}
    set_load(cluster, view, "p0", **unmeasured)
    assert choose(policy(), view).reason is Reason.REMOTE
    set_load(cluster, view, "p0", **{**unmeasured, "prompt_share": 0.2})
    assert choose(policy(), view).reason is Reason.PREFILL_ALONE


def test_an_excluded_prefill_worker_keeps_nothing(cluster):
    view = pair(cluster, decode=streams(14))
    prompt = view.hash_prompt(PROMPT)
    decision = policy().choose(view, prompt, 0.0, frozenset({"p0"}))
    assert decision.reason is Reason.NO_PREFILL


def test_a_prefill_worker_with_less_context_generates_nothing(cluster):
    view = pair(cluster, decode=streams(14))
    small = replace(cluster.card("p0", Role.PREFILL, "p1"), max_context_tokens=4096)
    view.join(small)
    view.apply("p1", cluster.snapshot(replace(cluster.idle, **MEASURED)), 0.0)
    assert choose(policy(), view).reason is Reason.REMOTE


# Room.


@pytest.mark.parametrize("trouble", [{"num_free_blocks": 10}, {"num_waiting": 1}])  # 26 blocks
def test_nobody_leaves_a_worker_with_room_for_one_without(cluster, trouble):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "p0", prompt_share=0.9)
    set_load(cluster, view, "d0", **streams(5))  # 70 ms of 100
    set_load(cluster, view, "d1", **streams(1), **trouble)
    for target_ttft in (2.0, None):
        assert choose(policy(target_ttft), view).decode.incarnation == "d0"
    set_load(cluster, view, "d1", **streams(1))
    assert choose(policy(), view).decode.incarnation == "d1"


def test_where_decode_has_no_room_prefill_keeps_the_request(cluster):
    view = pair(cluster, decode={**streams(1), "num_free_blocks": 10})
    assert choose(policy(), view).reason is Reason.PREFILL_ALONE
    set_load(cluster, view, "p0", num_free_blocks=10)
    assert choose(policy(), view).reason is Reason.REMOTE


def test_what_prefill_computes_for_a_decode_worker_is_not_yet_cached_there(cluster):
    busy = {"prompt_share": 0.9}
    view = pair(cluster, busy, streams(3))
    chooser = policy(ttft=10.0)
    first = choose(chooser, view)
    assert first.reason is Reason.REMOTE
    chooser.on_sent(view, first)
    set_load(cluster, view, "p0", num_queued_tokens=4000, **busy)
    decision = choose(chooser, view, [*PROMPT, *range(5000, 5050)])
    assert decision.num_cached_tokens_decode == 0
    # 4.5 s at the pair. Alone, 450 tokens take 28 steps of 90 ms, and 50 of them would take 3.
    assert decision.predicted_ttft_seconds > 2.5


def test_a_decode_worker_that_computes_a_prompt_will_have_its_blocks(cluster):
    view = pair(cluster, {"num_queued_tokens": 6000})
    chooser = policy()
    first = choose(chooser, view)
    assert first.reason is Reason.DECODE_ALONE
    chooser.on_sent(view, first)
    second = choose(chooser, view, [*PROMPT, *range(5000, 5050)])
    assert second.reason is Reason.DECODE_ALONE
    assert second.num_cached_tokens_decode == 400


# What a prefill worker's streams cost it.


def test_a_prefill_worker_with_streams_is_slower_and_another_is_taken(cluster):
    view = cluster.view(prefill=2, decode=1)
    set_load(cluster, view, "d0", **MEASURED)
    set_load(cluster, view, "p0", **streams(4))  # 16 tokens in 90 ms
    set_load(cluster, view, "p1", num_queued_tokens=600)
    assert choose(policy(ttft=None), view).prefill.incarnation == "p1"
    assert choose(policy(None, None), view).prefill.incarnation == "p0"


def test_what_is_on_its_way_through_a_slow_decode_worker_is_not_forgotten(cluster):
    view = pair(cluster, decode={**streams(2, 0.5), "prompt_share": 0.9})
    chooser = policy(10.0, 1.0)
    chooser.on_sent(view, choose(chooser, view))
    # The prefill worker reports 100 ms later; the decode worker is still in the step before.
    view.apply("p0", cluster.delta(2, replace(cluster.idle, **MEASURED)), 0.1)
    decision = chooser.choose(view, view.hash_prompt([7, *PROMPT]), 0.1)
    assert decision.predicted_ttft_seconds > 0.8 + 0.4


# One target alone, and none.


def test_each_target_works_alone(cluster):
    late = pair(cluster, {"num_queued_tokens": 3000})
    assert choose(policy(itl=None), late).reason is Reason.DECODE_ALONE
    assert choose(policy(ttft=None), late).reason is Reason.REMOTE
    full = pair(cluster, decode=streams(14))
    assert choose(policy(ttft=None), full).reason is Reason.PREFILL_ALONE
    assert choose(policy(itl=None), full).reason is Reason.REMOTE


def test_prefill_generates_only_under_a_target_between_tokens(cluster):
    slow = pair(cluster, decode={"decode_base_seconds": 0.3, "decode_step_seconds": 0.3})
    assert choose(policy(1.0, 0.5), slow).reason is Reason.PREFILL_ALONE
    assert choose(policy(1.0, None), slow).reason is not Reason.PREFILL_ALONE


@pytest.mark.parametrize("seed", range(20))
def test_without_targets_what_they_need_changes_nothing(cluster, seed):
    """The measurements that came with targets are not looked at without them."""
    rng = random.Random(seed)
    plain, noisy = Policy(RouterConfig()), Policy(RouterConfig())
    counts = rng.randint(0, 3), rng.randint(1, 3), rng.randint(0, 2)
    views = cluster.view(*counts), cluster.view(*counts)
    for turn in range(40):
        name = rng.choice(list(views[0].cards))
        load = random_load(rng)
        extra = replace(
            load,
            num_streams=rng.randint(0, 40),
            num_decoding=rng.randint(0, 40),
            decode_base_seconds=rng.random(),
            decode_stream_seconds=rng.random(),
            prompt_gap_seconds=rng.random(),
            prompt_gap_tokens=rng.randint(0, 500),
            prompt_share=rng.random(),
        )
        now = 0.1 * turn
        for view, told in zip(views, (load, extra), strict=True):
            view.apply(name, cluster.delta(view.get(name).sequence + 1, told), now)
        tokens = [rng.randint(0, 2)] * rng.randint(1, 600)
        chosen = []
        for chooser, view in zip((plain, noisy), views, strict=True):
            decision = chooser.choose(view, view.hash_prompt(tokens), now)
            chooser.on_sent(view, decision)
            chosen.append(decision)
        assert chosen[0] == chosen[1]
        assert chosen[0].reason not in (Reason.DECODE_ALONE, Reason.PREFILL_ALONE)


def random_load(rng: random.Random) -> Load:
    return Load(
        num_running=rng.randint(0, 20),
        num_waiting=rng.randint(0, 3),
        num_free_blocks=rng.randint(0, 1000),
        num_queued_tokens=rng.randint(0, 4000),
        prefill_tokens_per_second=rng.choice([0.0, 500.0, 1000.0]),
        decode_step_seconds=rng.choice([0.0, 0.05, 0.2]),
    )


def test_leaving_the_pair_is_cheap(cluster):
    view = cluster.view(prefill=4, decode=4)
    for name in view.cards:
        set_load(cluster, view, name, **streams(14), num_queued_tokens=4000)
    chooser = policy()
    prompt = view.hash_prompt(PROMPT)
    durations = []
    for _ in range(50):
        began_at = time.perf_counter()
        chooser.choose(view, prompt, 0.0)
        durations.append(time.perf_counter() - began_at)
    assert min(durations) < 1e-3  # 60 us on a quiet machine
