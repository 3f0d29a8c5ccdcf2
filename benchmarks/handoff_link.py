"""The data path of a hand-off between two processes on a core each, beside bare gloo.

This process receives on core 0; the other one sends on core 1 and is told what to do over a pipe,
which costs both sides of every comparison the same. Both have a KV cache of SmolLM2's shape, and
every transfer goes from scattered blocks to scattered blocks.
"""

import multiprocessing
import os
import queue
import random
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.handoff.batch_thread import batch_threads
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.gloo import GlooLink, GlooTransport
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits
from antiphon.workers.handoff.wire import WireFormat
from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout

SEED = 0
HOST = "127.0.0.1"
BLOCK_SIZE = 16
NUM_BLOCKS = 512
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 30, 3, 64  # SmolLM2-135M
BYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
WIRE = WireFormat("benchmark", ((NUM_KV_HEADS, HEAD_DIM, HEAD_DIM),) * NUM_LAYERS, "float32")
WAIT_SECONDS = 30.0
TRANSFER_BYTES = 64 << 20


def make_cache() -> KVCache:
    """A cache whose pages are all in memory."""
    layers = (LayerLayout(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM),) * NUM_LAYERS
    layout = KVLayout(layers, torch.float32, torch.float32)
    cache = KVCache(layout, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"), TorchKernels())
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def use_core(core: int) -> None:
    """Stay on one core, with one thread for torch."""
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})
    torch.set_num_threads(1)
    torch.manual_seed(SEED)


def bare_links(port: int, rank: int) -> dict[str, GlooLink]:
    """Gloo groups without a hand-off: as torch makes them, and with a link's scheduling."""
    store = dist.TCPStore(HOST, port)
    links = {}
    for name, scheduling in {"stock": nullcontext, "link": batch_threads}.items():
        options = dist.ProcessGroupGloo._Options()
        with scheduling():
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        group = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, options)
        links[name] = GlooLink(group, 1 - rank)
    return links


# The other process.


def run_sender(pipe: Connection) -> None:
    """Do what comes over the pipe until it says stop."""
    use_core(1)
    cache = make_cache()
    senders: dict[str, HandoffSender] = {}
    done: queue.Queue[Any] = queue.Queue()
    bare: dict[str, GlooLink] = {}
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        if task[0] == "join":
            bare = bare_links(task[1], 1)
            continue
        if task[0] == "bare":
            _send_bare(bare[task[1]], *task[2:])
            continue
        _, name, piece_bytes, transfer_id, offer, chunks, pause = task
        if name not in senders:
            limits = SenderLimits(piece_bytes=piece_bytes)
            endpoint = Endpoint(GlooTransport(HOST), cache, name, WIRE)
            senders[name] = HandoffSender(endpoint, limits, lambda *report: done.put(report))
        _send(senders[name], transfer_id, offer, chunks, pause, pipe)
        done.get(timeout=WAIT_SECONDS)
    for sender in senders.values():
        sender.close()


def _send(
    sender: HandoffSender, transfer_id: str, offer: Any, chunks: Any, pause: float, pipe: Connection
) -> None:
    sender.open(transfer_id, offer, 0)
    start = 0
    table = random.Random(SEED).sample(range(NUM_BLOCKS), -(-sum(chunks) // BLOCK_SIZE))
    for num_tokens in chunks:
        time.sleep(pause)  # what computing the chunk takes
        sender.push(transfer_id, table, start, start + num_tokens)
        start += num_tokens
    computed_at = time.monotonic()
    sender.finish(transfer_id)
    if pause:
        pipe.send(computed_at)


def _send_bare(link: Any, num_bytes: int, count: int, depth: int) -> None:
    buffers = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(depth)]
    flights = []
    for index in range(count):
        if len(flights) == depth:
            flights.pop(0).wait(WAIT_SECONDS)
        flights.append(link.start_send([buffers[index % depth]]))
    for flight in flights:
        flight.wait(WAIT_SECONDS)


# This process.


@dataclass(slots=True)
class Other:
    """The sending process and what this one needs to receive from it."""

    pipe: Connection
    cache: KVCache
    bare: dict[str, GlooLink]


@contextmanager
def sending_process() -> Iterator[Other]:
    """Start the sender on its core, and move to the other."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_sender, args=(there,), daemon=True)
    process.start()
    use_core(0)
    cache = make_cache()
    assert here.recv() == "ready"
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    here.send(("join", store.port))
    try:
        yield Other(here, cache, bare_links(store.port, 0))
    finally:
        here.send(None)
        process.join(WAIT_SECONDS)
        process.kill()


class Pair:
    """A receiver here, with one sender's limits there."""

    def __init__(self, other: Other, piece_bytes: int = 0) -> None:
        self.name = uuid.uuid4().hex
        self._other = other
        self._piece_bytes = piece_bytes
        self._completed: queue.Queue[tuple[float, Any]] = queue.Queue()
        self._receiver = HandoffReceiver(
            Endpoint(GlooTransport(HOST), other.cache, f"decode-{self.name}", WIRE),
            ReceiverLimits(),
            lambda _, __, error: self._completed.put((time.monotonic(), error)),
        )

    def transfer(self, chunks: list[int], pause: float = 0.0) -> float:
        """Seconds from ``expect``, or with a pause from the last chunk, to ``on_complete``."""
        num_tokens = sum(chunks)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        table = random.Random(SEED + 1).sample(range(NUM_BLOCKS), num_blocks)
        transfer_id = uuid.uuid4().hex
        began = time.monotonic()
        offer = self._receiver.offer(self.name)
        self._receiver.expect(transfer_id, offer.link_id, table, 0, num_tokens)
        task = ("send", self.name, self._piece_bytes, transfer_id, offer, chunks, pause)
        self._other.pipe.send(task)
        ended, error = self._completed.get(timeout=WAIT_SECONDS)
        assert error is None, error
        if pause:
            began = self._other.pipe.recv()
        return ended - began

    def close(self) -> None:
        """Break the links."""
        self._receiver.close()


def bare_seconds(other: Other, name: str, num_bytes: int, count: int, depth: int) -> float:
    """Seconds for so many messages of bare gloo, ``depth`` at a time."""
    link = other.bare[name]
    buffers = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(depth)]
    began = time.monotonic()
    other.pipe.send(("bare", name, num_bytes, count, depth))
    flights = []
    for index in range(count):
        if len(flights) == depth:
            flights.pop(0).wait(WAIT_SECONDS)
        flights.append(link.start_recv(buffers[index % depth]))
    for flight in flights:
        flight.wait(WAIT_SECONDS)
    return time.monotonic() - began


BARE = {"bare": ("stock", 1), "bare_two_at_a_time": ("stock", 2), "bare_on_link": ("link", 1)}


def bandwidth(other: Other, message_bytes: int, pairs: int) -> dict[str, float]:
    """Bytes per second of hand-offs and of bare gloo, in turn, and the medians of their ratios.

    Bare gloo sends messages of that size; the hand-off is given as much at once, and cuts it.
    """
    num_tokens = message_bytes // BYTES_PER_TOKEN
    count = max(2, TRANSFER_BYTES // message_bytes)
    num_bytes = num_tokens * BYTES_PER_TOKEN
    pair = Pair(other)
    rows = []
    for index in range(pairs + 1):
        row = {"handoff": pair.transfer([num_tokens] * count)}
        for kind, (name, depth) in BARE.items():
            row[kind] = bare_seconds(other, name, num_bytes, count, depth)
        if index:  # the first round touches fresh memory
            rows.append(row)
    pair.close()
    figures = {"message_bytes": float(num_bytes)}
    for kind in rows[0]:
        seconds = statistics.median(row[kind] for row in rows)
        figures[f"{kind}_bytes_per_second"] = num_bytes * count / seconds
    for kind in BARE:
        name = kind.replace("bare", "ratio")
        figures[name] = statistics.median(row[kind] / row["handoff"] for row in rows)
    return figures


def fixed_seconds(other: Other, count: int = 40) -> float:
    """Median time of a transfer of one token over an open link."""
    pair = Pair(other)
    times = [pair.transfer([1]) for _ in range(count)]
    pair.close()
    return statistics.median(times[1:])


def first_contact_seconds(other: Other, fixed: float, count: int = 9) -> float:
    """Median of what the first transfer of a pair that has no link yet takes beyond ``fixed``."""
    times = []
    for _ in range(count):
        pair = Pair(other)
        times.append(pair.transfer([1]) - fixed)
        pair.close()
    return statistics.median(times)


def pieces(other: Other, num_tokens: int, pause: float, count: int = 5) -> dict[str, float]:
    """Exposed seconds of a prompt that is computed in chunks of 128 tokens.

    Args:
        other: The sending process.
        num_tokens: Of the prompt.
        pause: Seconds that a chunk is computed for.
        count: Transfers of each kind, in turn.
    """
    chunks = [128] * (num_tokens // 128) or [num_tokens]
    kinds = {"chunks": Pair(other), "one_piece": Pair(other, piece_bytes=1 << 40)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(count + 1):
        for name, pair in kinds.items():
            times[name].append(pair.transfer(chunks, pause))
    for pair in kinds.values():
        pair.close()
    return {name: statistics.median(values[1:]) for name, values in times.items()}
