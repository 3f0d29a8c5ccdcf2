"""A request's status and its place change together."""

import random

import pytest

from antiphon.messages import SamplingParams
from antiphon.workers.request import PrefillPath, Request, RequestStatus
from antiphon.workers.request_queues import RequestQueues


def request(name: str, num_prompt: int = 4, path: PrefillPath = PrefillPath.LOCAL) -> Request:
    return Request(name, [1] * num_prompt, SamplingParams(max_tokens=4), path)


def queues_of(*requests: Request) -> RequestQueues:
    queues = RequestQueues()
    for one in requests:
        queues.add(one)
    return queues


def names(requests: tuple[Request, ...]) -> str:
    return "".join(one.request_id for one in requests)


def test_first_come_is_first_and_who_is_put_back_goes_before() -> None:
    a, b, c = (request(name) for name in "abc")
    queues = queues_of(a, b, c)
    for one in (b, a):
        queues.move(one, RequestStatus.RUNNING)
    assert (names(queues.waiting), names(queues.running)) == ("c", "ba")
    queues.put_back(a)
    assert (names(queues.waiting), names(queues.running)) == ("ac", "b")
    assert names(tuple(queues)) == "abc"
    assert names(tuple(reversed(queues))) == "cba"


def test_what_is_finished_is_gone_and_its_id_is_free() -> None:
    a = request("a")
    queues = queues_of(a)
    with pytest.raises(ValueError, match="'a' is already in use"):
        queues.add(request("a"))
    queues.move(a, RequestStatus.FINISHED)
    assert not queues
    assert queues.get("a") is None
    queues.add(request("a"))


def test_counts_say_what_is_queued_where() -> None:
    prefill = Request("p", [1] * 8, None)
    remote, local, decoding = request("r", 5, PrefillPath.REMOTE), request("l", 3), request("d", 6)
    queues = queues_of(prefill, remote, local, decoding)
    assert queues.prompts == [prefill, local, decoding]  # a prefill worker computes the other one
    decoding.num_computed_tokens = 5
    queues.move(decoding, RequestStatus.RUNNING)
    queues.move(remote, RequestStatus.AWAITING_KV)
    counts = (queues.num_waiting, queues.num_awaiting_kv, queues.num_running, queues.num_decoding)
    assert counts == (2, 1, 1, 1)
    assert queues.prompts == [prefill, local]
    assert queues.num_streams == 3


def test_a_status_that_changes_without_its_place_is_noticed() -> None:
    a = request("a")
    queues = queues_of(a)
    a.status = RequestStatus.RUNNING
    with pytest.raises(KeyError):
        queues.check()


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_lose_nobody(seed: int) -> None:
    rng = random.Random(seed)
    queues = RequestQueues()
    alive: dict[str, Request] = {}
    for index in range(200):
        if not alive or rng.random() < 0.3:
            alive[str(index)] = request(str(index))
            queues.add(alive[str(index)])
        else:
            one = rng.choice(list(alive.values()))
            status = rng.choice(list(RequestStatus))
            queues.move(one, status)
            if status is RequestStatus.FINISHED:
                del alive[one.request_id]
        queues.check()
        assert list(queues) == list(alive.values())
