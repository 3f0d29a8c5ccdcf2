"""Hand-offs over gloo between processes, one of which is killed or leaves without closing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import handoff_pair
import msgspec
import pytest
from handoff_pair import Pair, wait_until

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.receiver import ReceiverLimits

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]
SENDER = """
import json, sys
from handoff_pair import WIRE, FakeStore
from antiphon.messages import LinkOffer
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits

store = FakeStore()
store.fill_random(7)
endpoint = Endpoint(GlooTransport("127.0.0.1"), store, "prefill-2", WIRE)
sender = HandoffSender(endpoint, SenderLimits(piece_bytes=0), lambda *report: None)
for line in sys.stdin:
    transfer_id, offer, table, end = json.loads(line)
    sender.open(transfer_id, LinkOffer(**offer), 0)
    sender.push(transfer_id, table, 0, end)
"""


@pytest.fixture
def remote() -> Iterator[subprocess.Popen[str]]:
    folders = [str(Path(handoff_pair.__file__).parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.kill()
    process.wait(10)
    for stream in (process.stdin, process.stderr):
        stream.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    # Starting the other process, with torch, takes a while on a busy machine.
    limits = ReceiverLimits(timeout_seconds=60)
    transports = GlooTransport("127.0.0.1"), GlooTransport("127.0.0.1")
    pair = Pair(*transports, receiver_limits=limits)
    yield pair
    pair.close()


def _send_part(pair: Pair, remote: subprocess.Popen[str]) -> str:
    """Let the other process send 8 of 20 tokens of a transfer."""
    transfer_id = "2" * 32
    offer = pair.receiver.offer("prefill-2")
    pair.receiver.expect(transfer_id, offer.link_id, TARGET, 0, 20)
    remote.stdin.write(json.dumps([transfer_id, msgspec.to_builtins(offer), SOURCE, 8]) + "\n")
    remote.stdin.flush()
    wait_until(lambda: pair.arrived(SOURCE, TARGET, 0, 8), wait_seconds=60)
    return transfer_id


def test_a_killed_sender_is_noticed_at_once_and_harms_nobody_else(pair, remote):
    mine = pair.begin([20], [40], 0, 4)
    transfer_id = _send_part(pair, remote)
    began = time.monotonic()
    remote.kill()
    completed_id, num_tokens, error = pair.next_completed()
    assert time.monotonic() - began < 2
    assert (completed_id, num_tokens) == (transfer_id, 8)
    assert isinstance(error, LinkBrokenError)
    pair.send_all(mine, [20], 0, 4)
    assert pair.next_completed() == (mine, 4, None)


def test_a_process_may_exit_without_closing(pair, remote):
    _send_part(pair, remote)
    remote.stdin.close()
    assert remote.wait(10) == 0
    assert isinstance(pair.next_completed()[2], LinkBrokenError)
    assert remote.stderr.read() == ""
