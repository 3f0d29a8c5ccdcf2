import threading

import msgspec
import pytest

from antiphon.messages import Role
from antiphon.router.discovery import WorkerDirectory, pack_card, unpack_card

POOL = ("app", "decode")


def test_a_card_survives_the_way_through_serve(cluster):
    card = cluster.card("d0", Role.DECODE)
    packed = pack_card(card)
    assert unpack_card(msgspec.json.decode(msgspec.json.encode(packed))) == card


@pytest.mark.parametrize("metadata", [{}, {"antiphon_worker_card": {"replica_id": "d0"}}])
def test_a_missing_or_foreign_card_is_refused(metadata):
    with pytest.raises(msgspec.ValidationError):
        unpack_card(metadata)


def test_listeners_hear_what_is_known_and_what_changes_but_nothing_twice(cluster):
    directory, heard = WorkerDirectory(), []
    directory.listen(POOL, heard.append)
    assert heard == []
    cards = {"d0": cluster.card("d0", Role.DECODE)}
    directory.publish(POOL, cards)
    directory.publish(POOL, dict(cards))
    directory.publish(("app", "prefill"), {})
    late = []
    directory.listen(POOL, late.append)
    directory.publish(POOL, {})
    assert heard == [cards, {}]
    assert late == [cards, {}]


def test_a_stopped_listener_hears_no_more(cluster):
    directory, heard = WorkerDirectory(), []
    stop = directory.listen(POOL, heard.append)
    stop()
    stop()
    directory.publish(POOL, {"d0": cluster.card("d0", Role.DECODE)})
    assert heard == []


def test_a_failing_listener_is_logged_and_the_others_still_hear(caplog):
    directory, heard = WorkerDirectory(), []

    def fail(cards):
        raise RuntimeError("the loop is closed")

    directory.listen(POOL, fail)
    directory.listen(POOL, heard.append)
    directory.publish(POOL, {})
    assert heard == [{}]
    assert "app/decode" in caplog.text
    assert "the loop is closed" in caplog.text


def test_news_from_many_threads_arrive_in_one_order(cluster):
    directory, first, second = WorkerDirectory(), [], []
    directory.listen(POOL, first.append)
    directory.listen(POOL, second.append)

    def publish(number):
        for i in range(50):
            name = f"{number}-{i}"
            directory.publish(POOL, {name: cluster.card(name, Role.DECODE)})

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(first) == 200
    assert first == second
