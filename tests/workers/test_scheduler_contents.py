"""Whatever the scheduler does with blocks, every token is computed over the KV of its own prefix.

A simulated cache: what a token's KV depends on is the tokens up to it, so a slot holds their hash.
Steps, hand-offs in both directions, aborts and preemption go on at random. A step must find every
earlier token of its requests in place, a transfer all that was pushed, and streams must give what
they would have given alone.
"""

import random
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from scheduling import make

from antiphon.messages import SamplingParams
from antiphon.workers.batch import Batch
from antiphon.workers.request import PrefillPath, Request, RequestStatus


def kv(tokens: list[int]) -> list[int]:
    """What each token leaves in its slot."""
    return list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]


def oracle(prompt: list[int], num_outputs: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_outputs):
        tokens.append(kv(tokens)[-1] % 3)
    return tokens[len(prompt) :]


def _num_tokens(request: Request) -> int:
    """With all that it may generate."""
    max_tokens = request.sampling.max_tokens if request.sampling else 0
    return len(request.prompt_token_ids) + max_tokens


@dataclass
class Transfer:
    """Tokens of a request that are read from blocks, or written to them."""

    request: Request
    block_table: list[int]
    num_tokens: int  # pushed, or landed


@dataclass
class World:
    rng: random.Random
    prefix_cache: bool
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    sent: dict[str, Transfer] = field(default_factory=dict)
    received: dict[str, Transfer] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        rng = self.rng
        stems = [rng.choices(range(3), k=24) for _ in range(2)]
        self.requests = [self._request(str(i), rng.choice(stems)) for i in range(12)]
        self.waiting = list(self.requests)
        self.block_size = rng.choice([1, 2, 4, 4])
        largest = max(_num_tokens(request) for request in self.requests)
        spare = rng.choice([0, 8, 24, 56])  # the largest may need the whole pool
        self.scheduler = make(
            num_blocks=-(-(largest + spare) // self.block_size),
            block_size=self.block_size,
            max_batch_tokens=rng.choice([1, 3, 4, 9, 16, 64]),
            max_num_requests=rng.randint(1, 8),
            max_awaiting_kv=rng.randint(1, 3),
            prefix_cache=self.prefix_cache,
        )

    def _request(self, name: str, stem: list[int]) -> Request:
        rng = self.rng
        tail = rng.choices(range(3), k=rng.choice([0, 0, 1, 5, 9]))
        prompt = stem[: rng.choice([5, 12, 17, 24])] + tail
        if rng.random() < 0.4:
            return Request(name, prompt, None)
        path = rng.choice([PrefillPath.LOCAL, PrefillPath.REMOTE])
        return Request(name, prompt, SamplingParams(max_tokens=rng.randint(1, 20)), path)

    def place(self, block_table: list[int], position: int) -> tuple[int, int]:
        return block_table[position // self.block_size], position % self.block_size

    def check_slots(self, tokens: list[int], block_table: list[int], num_tokens: int) -> None:
        for position, content in enumerate(kv(tokens[:num_tokens])):
            assert self.slots.get(self.place(block_table, position)) == content, position

    def write(self, tokens: list[int], block_table: list[int], start: int, end: int) -> None:
        for position, content in enumerate(kv(tokens[:end])):
            if position >= start:
                self.slots[self.place(block_table, position)] = content

    def step(self) -> None:
        batch = self.scheduler.schedule()
        for request in self.scheduler.take_reserved():
            table, first_token = list(request.block_table), request.num_computed_tokens
            self.received[request.request_id] = Transfer(request, table, first_token)
        self.push()
        if batch is not None:
            self.compute(batch)
            self.push()
        self.scheduler.check()

    def compute(self, batch: Batch) -> None:
        sampled = []
        for chunk in batch.chunks:
            request = chunk.request
            tokens = request.tokens(0, request.num_tokens)
            assert chunk.start == request.num_computed_tokens
            self.check_slots(tokens, request.block_table, chunk.start)
            if chunk.samples:
                sampled.append(kv(tokens)[-1] % 3)
        for chunk in batch.chunks:
            tokens = chunk.request.tokens(0, chunk.request.num_tokens)
            end = chunk.start + chunk.num_tokens
            self.write(tokens, chunk.request.block_table, chunk.start, end)
        self.scheduler.complete(batch, sampled, now=0.0)

    def push(self) -> None:
        for request in self.scheduler.take_progressed():
            name, table = request.request_id, list(request.block_table)
            if before := self.sent.get(name):  # segments of it may still be read
                kept = -(-before.num_tokens // self.block_size)
                assert table[:kept] == before.block_table[:kept]
            self.sent[name] = Transfer(request, table, request.num_computed_tokens)
        for sent in self.sent.values():
            self.check_slots(sent.request.prompt_token_ids, sent.block_table, sent.num_tokens)

    def land(self) -> None:
        """Some KV from elsewhere arrives; all of it, or the rest is to be computed here."""
        name = self.rng.choice(list(self.received))
        transfer = self.received[name]
        prompt = transfer.request.prompt_token_ids
        end = min(transfer.num_tokens + self.rng.randint(1, 9), len(prompt) - 1)
        self.write(prompt, transfer.block_table, transfer.num_tokens, end)
        transfer.num_tokens = end
        is_all = end == len(prompt) - 1
        if is_all or self.rng.random() < 0.2:
            path = PrefillPath.REMOTE if is_all else PrefillPath.FALLBACK
            self.scheduler.kv_arrived(name, end, path, now=0.0)
            del self.received[name]

    def abort(self, request: Request) -> None:
        name = request.request_id
        self.aborted.add(name)
        self.received.pop(name, None)
        if request.is_prefill_only and request.status is not RequestStatus.WAITING:
            self.scheduler.abort(name, keep_blocks=True)
            self.sent.setdefault(name, Transfer(request, list(request.block_table), 0))
        else:
            self.scheduler.abort(name)

    def end_sending(self) -> None:
        done = [t for t in self.sent.values() if t.request.status is RequestStatus.SENDING]
        if done:
            name = self.rng.choice(done).request.request_id
            del self.sent[name]
            self.scheduler.abort(name)

    def run(self) -> None:
        rng = self.rng
        for _ in range(3000):
            if not self.waiting and not self.scheduler.queues:
                return
            for _ in range(rng.randint(0, 3)):
                if self.waiting:
                    self.scheduler.add(self.waiting.pop())
            self.step()
            if self.received and rng.random() < 0.6:
                self.land()
            if rng.random() < 0.5:
                self.end_sending()
            if rng.random() < 0.04 and (running := list(self.scheduler.queues)):
                self.abort(rng.choice(running))
        raise AssertionError("somebody waits for ever")


@pytest.mark.parametrize("seed", range(80))
def test_every_token_is_computed_over_its_own_prefix(seed: int) -> None:
    world = World(random.Random(seed), prefix_cache=seed % 6 != 0)
    world.run()
    assert world.scheduler.pool.num_free == world.scheduler.pool.num_blocks
    for request in world.requests:
        outputs = request.output_token_ids
        assert outputs == oracle(request.prompt_token_ids, len(outputs))
        if request.sampling is not None and request.request_id not in world.aborted:
            assert len(outputs) == request.sampling.max_tokens
