"""Nobody starves for want of a measurement: whose rates are believed, and when others' are."""

from collections import Counter

import pytest
from msgspec.structs import replace

from antiphon.config import RouterConfig
from antiphon.router.decision import Reason
from antiphon.router.policy import Policy

LONG = list(range(1000))
SHORT = list(range(40))


@pytest.fixture
def policy() -> Policy:
    return Policy(RouterConfig(local_prefill_max_tokens=64))


def set_load(cluster, view, name, now=0.0, **changes):
    load = replace(cluster.idle, **changes)
    view.apply(name, cluster.delta(view.get(name).sequence + 1, load), now)


def choose(policy, view, tokens=LONG, now=0.0, exclude=()):
    return policy.choose(view, view.hash_prompt(tokens), now, frozenset(exclude))


@pytest.mark.parametrize("measured", [{}, {"num_running": 4}])
def test_who_has_not_worked_yet_is_believed_to_be_like_its_peers(cluster, policy, measured):
    """Both defaults are ten times slower than these peers: no newcomer would ever be tried."""
    view = cluster.view(prefill=2, decode=2)
    fast = {"prefill_tokens_per_second": 10_000.0, "decode_step_seconds": 0.005}
    never = {"prefill_tokens_per_second": 0.0, "decode_step_seconds": 0.0}
    for index, rates in enumerate((fast, never)):
        set_load(cluster, view, f"p{index}", **rates)
        set_load(cluster, view, f"d{index}", **rates, **(measured if rates is fast else {}))
    decisions = []
    for i in range(8):
        decisions.append(choose(policy, view, [i, *LONG], now=1.0))
        policy.on_sent(view, decisions[-1])
    chosen = Counter(d.prefill.incarnation for d in decisions)
    assert chosen == {"p0": 4, "p1": 4}
    chosen = Counter(d.decode.incarnation for d in decisions)
    assert chosen["d1"] == (6 if measured else 4)


@pytest.mark.parametrize("has_targets", [False, True])
def test_who_was_slow_once_is_tried_again(cluster, has_targets):
    """With targets, what steps are made of decides, not what the last one took."""
    targets = {"target_ttft_seconds": 30.0, "target_itl_seconds": 0.2} if has_targets else {}
    policy = Policy(RouterConfig(**targets))
    view = cluster.view(prefill=2, decode=2)

    def work(names: str, now: float, factor: float) -> None:
        for name in names.split():
            set_load(
                cluster,
                view,
                name,
                now=now,
                prefill_tokens_per_second=1000.0 / factor,
                decode_step_seconds=0.05 * factor,
                decode_base_seconds=0.045 * factor,
                decode_stream_seconds=0.005 * factor,
                prompt_gap_seconds=0.07 * factor,
                prompt_gap_tokens=16,
            )

    def chosen(now: float) -> set[str]:
        decisions = [choose(policy, view, now=now) for _ in range(4)]
        return {w.incarnation for d in decisions for w in (d.prefill, d.decode) if w}

    work("p0 d0", 1.0, 1.01)
    work("p1 d1", 1.0, 10.0)  # as in a first step
    assert chosen(2.0) == {"p0", "d0"}
    work("p0 d0", 20.0, 1.02)
    assert chosen(20.0) == {"p0", "p1", "d0", "d1"}
    work("p1 d1", 20.5, 9.0)  # it really is slow
    assert chosen(21.0) == {"p0", "d0"}
    work("p1 d1", 31.0, 1.0)
    assert chosen(31.0) == {"p0", "p1", "d0", "d1"}


def test_of_two_that_are_idle_the_slower_one_is_believed_to_be_like_the_other(cluster, policy):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "d0", decode_step_seconds=0.5)
    assert {choose(policy, view, now=5.0).decode.incarnation for _ in range(4)} == {"d1"}
    assert {choose(policy, view, now=60.0).decode.incarnation for _ in range(4)} == {"d0", "d1"}


def test_who_computes_prompts_and_measures_nothing_is_not_believed_to_be_quick(cluster, policy):
    view = cluster.view(prefill=2, decode=1)
    slow = {"prefill_tokens_per_second": 100.0, "num_running": 1}
    set_load(cluster, view, "p0", now=30.0, prefill_tokens_per_second=990.0, num_queued_tokens=500)
    set_load(cluster, view, "p1", **slow, num_queued_tokens=20)
    assert choose(policy, view, now=30.0).prefill.incarnation == "p0"
    set_load(cluster, view, "p1", **slow)  # it hands over what it has
    assert choose(policy, view, now=31.0).prefill.incarnation == "p1"


def test_streams_do_not_vouch_for_the_rate_of_prompts(cluster, policy):
    view = cluster.view(prefill=1, decode=2)
    set_load(cluster, view, "d0", prefill_tokens_per_second=100.0, num_running=1)
    set_load(cluster, view, "d1", now=20.0, prefill_tokens_per_second=1010.0)
    # 0.39 s there by its own word, and 0.1 s at the pair: no prompt would ever measure it again.
    decision = choose(policy, view, SHORT, now=20.0, exclude={"d1"})
    assert decision.reason is Reason.SHORT


def test_a_busy_worker_keeps_what_it_learned_of_steps_with_prompt_tokens(cluster):
    view = cluster.view(decode=2)
    learned = {"decode_base_seconds": 0.06, "prompt_gap_seconds": 0.09, "prompt_gap_tokens": 32}
    set_load(cluster, view, "d0", decode_step_seconds=0.0, num_running=3, **learned)
    view.assume_rates(1.0)
    believed = view.get("d0").believed
    assert believed.decode_step_seconds == 0.05  # of d1
    assert {name: getattr(believed, name) for name in learned} == learned
