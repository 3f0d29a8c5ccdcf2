import random
from collections import Counter

import pytest
from msgspec.structs import replace

from antiphon.block_hash import hash_blocks
from antiphon.config import RouterConfig
from antiphon.errors import NoWorkerError
from antiphon.messages import Role
from antiphon.router.decision import Reason
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView

LONG = list(range(1000))
LONG_HASHES = hash_blocks(LONG, 16)
SHORT = list(range(32))


@pytest.fixture
def policy() -> Policy:
    return Policy(RouterConfig(local_prefill_max_tokens=64))


def set_load(cluster, view, name, now=0.0, stored=(), **changes):
    message = cluster.delta(
        view.get(name).sequence + 1, replace(cluster.idle, **changes), stored=stored
    )
    view.apply(name, message, now)


def choose(policy, view, tokens=LONG, now=0.0, exclude=()):
    return policy.choose(view, view.hash_prompt(tokens), now, frozenset(exclude))


def send(policy, view, tokens=LONG, now=0.0):
    decision = choose(policy, view, tokens, now)
    policy.on_sent(view, decision)
    return decision


def test_a_long_prompt_crosses(cluster, policy):
    decision = choose(policy, cluster.view(prefill=1, decode=1))
    assert decision.decode.incarnation == "d0"
    assert decision.prefill is not None
    assert decision.prefill.incarnation == "p0"
    assert decision.reason is Reason.REMOTE
    # 999 tokens at 1000/s, 10 ms + 999 x 46,080 B at 1.5 GB/s, one step of 50 ms
    assert decision.predicted_ttft_seconds == pytest.approx(0.999 + 0.0407 + 0.05, abs=1e-3)


def test_a_short_prompt_stays_on_decode(cluster, policy):
    decision = choose(policy, cluster.view(prefill=1, decode=1), SHORT)
    assert decision.prefill is None
    assert decision.reason is Reason.SHORT
    assert decision.predicted_ttft_seconds == pytest.approx(0.031 + 0.05)


@pytest.mark.parametrize(("num_tokens", "crosses"), [(1, False), (65, False), (66, True)])
def test_the_threshold_counts_the_tokens_that_need_computing(cluster, num_tokens, crosses):
    view = cluster.view(prefill=1, decode=1)
    # A slow decode worker would rather not compute: only the threshold decides what it may.
    policy = Policy(RouterConfig(local_prefill_max_tokens=64))
    decision = choose(policy, view, list(range(num_tokens)))
    assert (decision.prefill is not None) is crosses


def test_a_cached_long_prompt_stays_on_decode(cluster, policy):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "d1", stored=LONG_HASHES)
    decision = choose(policy, view)
    assert decision.decode.incarnation == "d1"
    assert decision.reason is Reason.SHORT
    assert decision.num_cached_tokens_decode == 992
    assert decision.predicted_ttft_seconds == pytest.approx(0.007 + 0.05)


def test_a_prompt_of_whole_blocks_lacks_its_last_one_wherever_it_is_cached(cluster, policy):
    view = ClusterView()
    for role in (Role.PREFILL, Role.DECODE):
        view.join(cluster.card(role.value, role, block_size=256))
        view.apply(role.value, cluster.snapshot(), 0.0)
    prompt = LONG[:512]
    set_load(cluster, view, "decode", stored=hash_blocks(prompt, 256))
    decision = choose(policy, view, prompt)
    assert decision.num_cached_tokens_decode == 256
    assert decision.reason is Reason.REMOTE  # 255 tokens


def test_a_short_prompt_crosses_when_it_would_stall_many_streams(cluster, policy):
    view = cluster.view(prefill=1, decode=1)
    set_load(cluster, view, "d0", num_running=32)
    decision = choose(policy, view, list(range(60)))
    assert decision.reason is Reason.REMOTE


def test_without_prefill_workers_decode_computes(cluster, policy):
    decision = choose(policy, cluster.view(decode=1))
    assert decision.prefill is None
    assert decision.reason is Reason.NO_PREFILL


def test_excluding_all_prefill_workers_is_the_last_rung_but_one(cluster, policy):
    view = cluster.view(prefill=2, decode=1)
    first = choose(policy, view)
    assert first.prefill is not None
    second = choose(policy, view, exclude={first.prefill.incarnation})
    assert second.prefill is not None
    assert second.prefill.incarnation != first.prefill.incarnation
    third = choose(policy, view, exclude={"p0", "p1"})
    assert third.reason is Reason.NO_PREFILL


def test_colocated_workers_compute_their_own_prompts(cluster, policy):
    decision = choose(policy, cluster.view(prefill=1, colocated=1))
    assert decision.decode.role is Role.COLOCATED
    assert decision.prefill is None
    assert decision.reason is Reason.COLOCATED


def test_colocated_and_pairs_compete(cluster, policy):
    view = cluster.view(prefill=1, decode=1, colocated=1)
    set_load(cluster, view, "c0", num_queued_tokens=5000)
    assert choose(policy, view).reason is Reason.REMOTE
    set_load(cluster, view, "c0")
    set_load(cluster, view, "p0", num_queued_tokens=5000)
    assert choose(policy, view).reason is Reason.COLOCATED


def test_no_worker_is_an_error_that_names_the_role(cluster, policy):
    with pytest.raises(NoWorkerError, match="no decode or colocated worker is connected"):
        choose(policy, cluster.view(prefill=1))
    with pytest.raises(NoWorkerError, match="all 2 decode and colocated workers"):
        choose(policy, cluster.view(prefill=1, decode=2), exclude={"d0", "d1"})


def test_asking_again_for_a_decode_worker_looks_nothing_up(cluster, policy, monkeypatch):
    view = cluster.view(prefill=2, decode=1)
    prompt = view.hash_prompt(LONG)
    monkeypatch.setattr(view, "match", None)
    for _ in range(3):
        with pytest.raises(NoWorkerError):
            policy.choose(view, prompt, 0.0, frozenset({"d0"}))


def test_a_prefill_worker_with_less_context_than_the_prompt_is_not_asked(cluster, policy):
    view = cluster.view(decode=1)
    for name, max_context_tokens in (("p0", 998), ("p1", 999), ("p2", 500)):
        card = replace(cluster.card(name, Role.PREFILL), max_context_tokens=max_context_tokens)
        view.join(card)
        view.apply(name, cluster.snapshot(), 0.0)
    set_load(cluster, view, "p1", num_queued_tokens=5000)
    decision = choose(policy, view)  # 999 tokens of KV
    assert decision.prefill is not None
    assert decision.prefill.incarnation == "p1"
    assert decision.alternates == ()
    assert choose(policy, view, exclude={"p1"}).reason is Reason.NO_PREFILL
    assert choose(policy, view, LONG[:600]).prefill.incarnation == "p0"


def test_excluded_decode_workers_are_not_chosen(cluster, policy):
    view = cluster.view(decode=3)
    chosen = {choose(policy, view, exclude={"d1"}).decode.incarnation for _ in range(6)}
    assert chosen == {"d0", "d2"}


def test_the_prefill_queue_and_rate_count(cluster, policy):
    view = cluster.view(prefill=3, decode=1)
    set_load(cluster, view, "p0", num_queued_tokens=2000)
    set_load(cluster, view, "p1", prefill_tokens_per_second=500.0)
    assert choose(policy, view).prefill.incarnation == "p2"


def test_unmeasured_rates_have_a_default(cluster, policy):
    view = cluster.view(prefill=1, decode=1)
    for name in ("p0", "d0"):
        set_load(cluster, view, name, prefill_tokens_per_second=0.0, decode_step_seconds=0.0)
    assert 0 < choose(policy, view).predicted_ttft_seconds < 10


def test_prefix_affinity_yields_to_load(cluster, policy):
    view = cluster.view(prefill=2, decode=1)
    set_load(cluster, view, "p1", stored=LONG_HASHES[:40])
    decision = choose(policy, view)
    assert decision.prefill.incarnation == "p1"
    assert decision.num_cached_tokens_prefill == 640
    set_load(cluster, view, "p1", num_queued_tokens=400)
    assert choose(policy, view).prefill.incarnation == "p1"  # 400 + 359 < 999
    set_load(cluster, view, "p1", num_queued_tokens=1000)
    assert choose(policy, view).prefill.incarnation == "p0"  # 1000 + 359 > 999


@pytest.mark.parametrize(
    "trouble", [{"num_free_blocks": 10}, {"num_waiting": 20}, {"num_running": 30}]
)
def test_a_full_or_busy_decode_worker_is_avoided_but_not_dropped(cluster, policy, trouble):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "d0", **trouble)
    assert choose(policy, view).decode.incarnation == "d1"
    assert choose(policy, view, exclude={"d1"}).decode.incarnation == "d0"


@pytest.mark.parametrize("num_waiting", [0, 1])
def test_free_blocks_are_no_room_behind_a_request_that_found_none(cluster, policy, num_waiting):
    view = cluster.view(prefill=1, decode=2)
    blocked = {"num_running": 10, "num_waiting": num_waiting, "num_free_blocks": 300}
    set_load(cluster, view, "d0", **blocked)
    set_load(cluster, view, "d1", num_running=20)
    decision = choose(policy, view, LONG[:500])  # 32 blocks
    assert decision.decode.incarnation == ("d1" if num_waiting else "d0")


@pytest.mark.parametrize(("num_free_blocks", "chosen"), [(73, "d0"), (72, "d1")])
def test_cached_blocks_of_a_prompt_are_no_room_for_the_rest(
    cluster, policy, num_free_blocks, chosen
):
    view = cluster.view(prefill=1, decode=2)
    crowded = {"num_running": 10, "num_free_blocks": num_free_blocks}
    set_load(cluster, view, "d0", **crowded, stored=LONG_HASHES[:50])  # of 63 blocks
    set_load(cluster, view, "d1", num_running=20)
    decision = choose(policy, view)
    assert decision.decode.incarnation == chosen
    assert decision.num_cached_tokens_decode == (800 if chosen == "d0" else 0)
    assert decision.predicted_ttft_seconds < 2  # charges are no part of predictions


def test_an_idle_pool_is_spread_evenly_by_turns(cluster, policy):
    view = cluster.view(prefill=3, decode=4)
    for name, step in (("d0", 0.050), ("d1", 0.051), ("d2", 0.049), ("d3", 0.052)):
        set_load(cluster, view, name, decode_step_seconds=step)  # noise of measurement
    decisions = [choose(policy, view) for _ in range(120)]
    assert set(Counter(d.decode.incarnation for d in decisions).values()) == {30}
    assert set(Counter(d.prefill.incarnation for d in decisions).values()) == {40}


def test_a_burst_between_two_reports_is_spread(cluster, policy):
    view = cluster.view(prefill=2, decode=4)
    prompts = [[i, *LONG] for i in range(16)]
    decisions = [send(policy, view, prompt) for prompt in prompts]
    assert set(Counter(d.decode.incarnation for d in decisions).values()) == {4}
    assert set(Counter(d.prefill.incarnation for d in decisions).values()) == {8}


def test_a_burst_fills_free_blocks_only_once(cluster, policy):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "d0", num_free_blocks=100)
    set_load(cluster, view, "d1", num_free_blocks=1000, num_running=10)  # busy but roomy
    assert send(policy, view, [1, *LONG]).decode.incarnation == "d0"
    assert send(policy, view, [2, *LONG]).decode.incarnation == "d1"


def test_a_burst_with_one_prefix_goes_to_one_prefill_worker(cluster, policy):
    view = cluster.view(prefill=3, decode=3)
    decisions = [send(policy, view, [*LONG, 5000 + i]) for i in range(3)]
    assert len({d.prefill.incarnation for d in decisions}) == 1
    assert decisions[1].num_cached_tokens_prefill == 992
    # Nothing has arrived on a decode worker yet, so none may be left to compute the prompt.
    assert all(d.reason is Reason.REMOTE for d in decisions)
    assert len({d.decode.incarnation for d in decisions}) == 3


def test_reports_take_over_from_the_ledger(cluster, policy):
    view = cluster.view(prefill=2, decode=1)
    first = send(policy, view, [1, *LONG], now=1.0)
    busy, idle = ("p0", "p1") if first.prefill.incarnation == "p0" else ("p1", "p0")
    set_load(cluster, view, busy, now=1.01)  # too early to include the prompt
    assert choose(policy, view, now=1.01).prefill.incarnation == idle
    set_load(cluster, view, busy, now=1.1)  # includes it: the prompt is done
    set_load(cluster, view, idle, now=1.1, num_queued_tokens=500)
    assert choose(policy, view, now=1.1).prefill.incarnation == busy


def test_a_report_speaks_only_for_the_requests_that_it_counts(cluster, policy):
    view = cluster.view(colocated=1)
    for i in range(3):  # the first one wakes the worker, the others come during its step
        send(policy, view, [i, *LONG], now=0.001 * i)
    set_load(cluster, view, "c0", now=0.056, num_running=1, num_queued_tokens=1000)
    assert choose(policy, view, [9, *LONG], now=0.06).predicted_ttft_seconds > 4.0
    set_load(cluster, view, "c0", now=0.6, num_running=3, num_queued_tokens=1000)
    assert choose(policy, view, [9, *LONG], now=0.6).predicted_ttft_seconds < 2.5


def test_the_first_token_frees_the_prefill_worker_and_the_end_both(cluster, policy):
    view = cluster.view(prefill=1, decode=1)
    decision = send(policy, view)
    assert policy.num_outstanding("p0") == policy.num_outstanding("d0") == 1
    policy.on_first_token(decision)
    assert policy.num_outstanding("p0") == 0
    assert policy.num_outstanding("d0") == 1
    policy.on_finished(decision)
    policy.on_finished(decision)
    assert policy.num_outstanding("d0") == 0


def test_a_failed_attempt_frees_both(cluster, policy):
    view = cluster.view(prefill=1, decode=1)
    untouched = choose(policy, view).predicted_ttft_seconds
    decision = send(policy, view)
    assert choose(policy, view, [7, *LONG]).predicted_ttft_seconds > untouched + 0.9
    policy.on_finished(decision)
    assert choose(policy, view, [7, *LONG]).predicted_ttft_seconds < untouched + 0.1


@pytest.mark.parametrize("seed", range(30))
def test_random_traffic_keeps_the_rules(cluster, seed):
    rng = random.Random(seed)
    policy = Policy(RouterConfig(local_prefill_max_tokens=rng.choice([0, 64, 500])))
    view = cluster.view(rng.randint(0, 3), rng.randint(0, 3), rng.randint(0, 2))
    names, running, now = list(view.cards), [], 0.0
    for _ in range(60):
        now += rng.choice([0.0, 0.01, 0.2])
        tokens = [rng.randint(0, 2)] * rng.randint(1, 300)
        exclude = frozenset(rng.sample(names, rng.randint(0, len(names) // 2)))
        try:
            decision = policy.choose(view, view.hash_prompt(tokens), now, exclude)
        except NoWorkerError:
            assert all(w.card.incarnation in exclude for w in view.decode_workers)
            continue
        assert decision.decode.incarnation not in exclude
        assert decision.decode.role is not Role.PREFILL
        assert (decision.prefill is not None) is (decision.reason is Reason.REMOTE)
        if decision.prefill:
            assert decision.prefill.incarnation not in exclude
            assert decision.decode.role is Role.DECODE
        assert 0 <= decision.num_cached_tokens_decode <= len(tokens) - 1
        assert 0 <= decision.num_cached_tokens_prefill <= len(tokens) - 1
        assert decision.predicted_ttft_seconds > 0
        policy.on_sent(view, decision)
        running.append(decision)
        if rng.random() < 0.5:
            policy.on_first_token(rng.choice(running))
        if rng.random() < 0.5:
            policy.on_finished(running.pop(rng.randrange(len(running))))
        if rng.random() < 0.3:
            stored = hash_blocks(tokens, 16)
            set_load(cluster, view, rng.choice(names), now, stored, num_running=rng.randint(0, 9))
        view.check()
    for decision in running:
        policy.on_finished(decision)
    assert all(policy.num_outstanding(name) == 0 for name in names)


def test_alternates_are_the_next_best_prefill_workers(cluster, policy):
    view = cluster.view(prefill=5, decode=1)
    for index, num_queued_tokens in enumerate((4000, 3000, 0, 2000, 1000)):
        set_load(cluster, view, f"p{index}", num_queued_tokens=num_queued_tokens)
    decision = choose(policy, view)
    assert decision.prefill is not None
    assert decision.prefill.incarnation == "p2"
    assert [card.incarnation for card in decision.alternates] == ["p4", "p3"]


def test_only_a_pair_has_alternates_and_never_the_excluded(cluster, policy):
    view = cluster.view(prefill=2, decode=1)
    assert choose(policy, view, list(range(20))).alternates == ()
    assert choose(policy, view, exclude={"p1"}).alternates == ()
    assert len(choose(policy, view).alternates) == 1
