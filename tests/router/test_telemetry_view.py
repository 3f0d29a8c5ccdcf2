import pytest
from msgspec.structs import replace

from antiphon.block_hash import hash_blocks
from antiphon.errors import TelemetryGapError
from antiphon.messages import Role
from antiphon.router.telemetry_view import ClusterView

TOKENS = list(range(64))
HASHES = hash_blocks(TOKENS, 16)


def joined(cluster, **card) -> ClusterView:
    view = ClusterView()
    view.join(cluster.card("d0", Role.DECODE, **card))
    return view


def confirmed(view: ClusterView, now: float = 0.0) -> dict[str, int]:
    return view.match(view.hash_prompt(TOKENS), now).confirmed


def test_a_worker_is_offered_from_its_first_snapshot_on(cluster):
    view = joined(cluster)
    assert view.decode_workers == ()
    assert view.get("d0") is None
    view.apply("d0", cluster.snapshot(), now=0.0)
    assert [worker.card.incarnation for worker in view.decode_workers] == ["d0"]
    assert view.prefill_workers == ()
    view.check()


def test_roles_are_grouped(cluster):
    view = cluster.view(prefill=2, decode=1, colocated=1)
    assert [worker.card.incarnation for worker in view.prefill_workers] == ["p0", "p1"]
    assert [worker.card.incarnation for worker in view.decode_workers] == ["d0", "c0"]
    view.leave("p0")
    view.leave("p0")
    assert [worker.card.incarnation for worker in view.prefill_workers] == ["p1"]
    view.check()


def test_deltas_change_blocks_and_load(cluster):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(stored=HASHES[:2]), now=0.0)
    busy = replace(cluster.idle, num_running=3)
    view.apply("d0", cluster.delta(1, busy, stored=HASHES[2:], removed=HASHES[1:2]), now=2.0)
    assert confirmed(view) == {"d0": 1}
    view.apply("d0", cluster.delta(2, busy, stored=HASHES[1:2]), now=2.5)
    assert confirmed(view) == {"d0": 4}
    worker = view.get("d0")
    assert worker is not None
    assert worker.load.num_running == 3
    assert worker.age_seconds(now=4.0) == 1.5
    view.check()


@pytest.mark.parametrize("sequence", [0, 1, 3, 99])
def test_any_sequence_but_the_next_drops_the_view(cluster, sequence):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(stored=HASHES), now=0.0)
    view.apply("d0", cluster.delta(1), now=0.0)
    with pytest.raises(TelemetryGapError, match=f"expected message 2, got message {sequence};"):
        view.apply("d0", cluster.delta(sequence), now=0.0)
    assert view.decode_workers == ()
    assert view.cards == {}
    view.check()
    with pytest.raises(TelemetryGapError, match="expected a snapshot"):
        view.apply("d0", cluster.delta(2), now=0.0)


def test_a_delta_before_the_snapshot_is_a_gap(cluster):
    view = joined(cluster)
    with pytest.raises(TelemetryGapError, match="expected a snapshot"):
        view.apply("d0", cluster.delta(0, stored=HASHES), now=0.0)


def test_reconnecting_after_a_gap_starts_from_the_snapshot_alone(cluster):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(stored=HASHES), now=0.0)
    with pytest.raises(TelemetryGapError):
        view.apply("d0", cluster.delta(5), now=0.0)
    view.join(cluster.card("d0", Role.DECODE))
    view.apply("d0", cluster.snapshot(stored=HASHES[:1], sequence=9), now=1.0)
    assert confirmed(view) == {"d0": 1}
    view.apply("d0", cluster.delta(10), now=1.0)
    view.check()


def test_a_snapshot_replaces_what_was_known_and_expected(cluster):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(stored=HASHES[:1]), now=0.0)
    prompt = view.hash_prompt(TOKENS)
    view.expect(cluster.card("d0", Role.DECODE), prompt, 64, now=0.0)
    assert view.match(prompt, 0.0).expected == {"d0": 4}
    view.apply("d0", cluster.snapshot(stored=HASHES[:2], sequence=7), now=0.0)
    assert view.match(prompt, 0.0).expected == {"d0": 2}
    view.check()


def test_nothing_is_expected_of_a_worker_without_a_prefix_cache(cluster):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(), now=0.0)
    prompt = view.hash_prompt(TOKENS)
    card = replace(cluster.card("d0", Role.DECODE), caches_prefixes=False)
    view.expect(card, prompt, 64, now=0.0)
    assert view.match(prompt, 0.0).expected == {}


def test_a_new_incarnation_is_a_stranger(cluster):
    view = joined(cluster, incarnation="first")
    view.apply("first", cluster.snapshot(stored=HASHES), now=0.0)
    view.join(cluster.card("d0", Role.DECODE, incarnation="second"))
    assert view.decode_workers == ()
    view.apply("second", cluster.snapshot(), now=0.0)
    assert confirmed(view) == {}
    with pytest.raises(TelemetryGapError):  # the old session has not noticed yet
        view.apply("first", cluster.delta(1, stored=HASHES), now=0.0)
    with pytest.raises(TelemetryGapError):
        view.apply("first", cluster.snapshot(stored=HASHES), now=0.0)
    assert confirmed(view) == {}
    assert [worker.card.incarnation for worker in view.decode_workers] == ["second"]
    view.check()


def test_pools_with_different_block_sizes_are_matched_by_their_own_hashes(cluster):
    view = ClusterView()
    view.join(cluster.card("p0", Role.PREFILL, block_size=32))
    view.join(cluster.card("d0", Role.DECODE, block_size=16))
    view.apply("p0", cluster.snapshot(stored=hash_blocks(TOKENS, 32)[:1]), now=0.0)
    view.apply("d0", cluster.snapshot(stored=HASHES[:3]), now=0.0)
    assert confirmed(view) == {"p0": 1, "d0": 3}
    view.leave("p0")
    known = view.hash_prompt(TOKENS)
    assert set(known.hashes) == {16}
    assert view.hash_prompt(TOKENS, known) is known
    view.join(cluster.card("p1", Role.PREFILL, block_size=32))
    view.apply("p1", cluster.snapshot(), now=0.0)
    assert set(view.hash_prompt(TOKENS, known).hashes) == {16, 32}
    view.check()


def test_a_pool_that_joins_after_the_hashing_matches_nothing(cluster):
    view = joined(cluster)
    view.apply("d0", cluster.snapshot(stored=HASHES), now=0.0)
    prompt = view.hash_prompt(TOKENS)
    view.join(cluster.card("p0", Role.PREFILL, block_size=32))
    view.apply("p0", cluster.snapshot(stored=hash_blocks(TOKENS, 32)), now=0.0)
    assert view.match(prompt, 0.0).confirmed == {"d0": 4}


def test_expected_blocks_expire_with_the_time_of_the_match(cluster):
    view = cluster.view(decode=1)
    prompt = view.hash_prompt(TOKENS)
    view.expect(cluster.card("d0", Role.DECODE), prompt, 63, now=0.0)
    found = view.match(prompt, now=9.0)
    assert found.expected == {"d0": 3}
    assert found.confirmed == {}
    assert view.match(prompt, now=10.0).expected == {}


def test_nothing_is_expected_of_a_worker_that_has_left(cluster):
    view = cluster.view(decode=2)
    prompt = view.hash_prompt(TOKENS)
    view.leave("d0")
    view.expect(cluster.card("d0", Role.DECODE), prompt, 64, now=0.0)
    assert view.match(prompt, 0.0).expected == {}
    view.check()


def test_an_empty_prompt_is_refused(cluster):
    with pytest.raises(ValueError, match="no tokens"):
        cluster.view(decode=1).hash_prompt([])


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_draining_worker_is_not_offered_and_may_still_report(cluster, role):
    view = cluster.view(prefill=2, decode=2)
    name = f"{role[0]}0"
    draining = replace(cluster.idle, is_draining=True)
    view.apply(name, cluster.delta(1, load=draining), now=0.0)
    view.apply(name, cluster.delta(2, load=draining, stored=HASHES), now=0.0)
    offered = {w.card.incarnation for w in (*view.prefill_workers, *view.decode_workers)}
    assert offered == {"p0", "p1", "d0", "d1"} - {name}
    assert view.get(name) is not None
    view.check()
    view.leave(name)
    view.check()
