"""NCCL: refused by name where it can't work; payload between two GPUs where there are some."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from antiphon.config import HandoffConfig
from antiphon.errors import ConfigError, LinkBrokenError
from antiphon.workers.handoff import nccl
from antiphon.workers.handoff.nccl import NcclTransport
from antiphon.workers.handoff.segment import device_checksum
from antiphon.workers.handoff.transport import Link, Place

_skip_elsewhere = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL joins two GPUs, and this machine has fewer"
)


def needs_gpus(test: Callable[[], None]) -> Callable[[], None]:
    """What ``make test-gpu`` runs, and every other run skips aloud where there are no two GPUs."""
    return pytest.mark.gpu(_skip_elsewhere(test))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_by_name():
    assert HandoffConfig(transport="nccl").transport == "nccl"
    with pytest.raises(ConfigError, match=r"handoff\.transport: got 'nccl', but this worker sees"):
        NcclTransport("127.0.0.1")


def _join_on_gpus() -> tuple[Link, Link]:
    """(connecting end on GPU 0, accepting end on GPU 1)."""
    connecting, accepting = NcclTransport("127.0.0.1"), NcclTransport("127.0.0.1")
    accepted: list[Link] = []

    def accept() -> None:
        torch.cuda.set_device(1)
        accepted.append(accepting.accept("link", 30))

    thread = threading.Thread(target=accept)
    thread.start()
    torch.cuda.set_device(0)
    connected = connecting.connect(accepting.address, "link", 30)
    thread.join(60)
    return connected, accepted[0]


@needs_gpus
def test_payload_crosses_between_gpus_and_headers_beside_it():
    sender, receiver = _join_on_gpus()
    header = torch.arange(128, dtype=torch.uint8)
    payload = torch.arange(1 << 20, device="cuda:0").to(torch.uint8)
    sending = sender.start_send([header, payload])
    got_header = torch.empty(128, dtype=torch.uint8)
    got_payload = torch.empty(1 << 20, dtype=torch.uint8, device="cuda:1")
    receiver.recv(got_header, 10)
    receiver.recv(got_payload, 10)
    sending.wait(10)
    assert torch.equal(got_header, header)
    assert torch.equal(got_payload.cpu(), payload.cpu())
    assert device_checksum(got_payload) == device_checksum(payload.cpu())
    sender.close()
    receiver.close()


@needs_gpus
def test_a_receive_whose_peer_is_gone_ends():
    sender, receiver = _join_on_gpus()
    pending = receiver.start_recv(torch.empty(1 << 20, dtype=torch.uint8, device="cuda:1"))
    with pytest.raises(LinkBrokenError):
        pending.wait(0.2)
    with pytest.raises(LinkBrokenError):
        sender.send([torch.zeros(1, dtype=torch.uint8)] * 9, 5)


def test_gpu_machines_run_what_is_marked_for_them():
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    (recipe,) = re.findall(r"^test-gpu:.*\n(?:\t.*\n)+", makefile, re.MULTILINE)
    assert '-m "interpreter or gpu"' in recipe


class _Nccl:
    """Notes how a communicator is asked for."""

    made: "_Nccl"

    def __init__(self, store: object, rank: int, size: int, options: Any) -> None:
        self.ranks, self.options = (rank, size), options
        _Nccl.made = self

    @staticmethod
    def Options(is_high_priority_stream: bool) -> Any:
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=_Config())

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.device = device


class _Config(SimpleNamespace):
    """NCCL's own defaults: as many blocks of a kernel as it likes."""

    min_ctas = max_ctas = -1


def test_channels_are_capped_and_no_watchdog_ends_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nccl, "_c10d", SimpleNamespace(ProcessGroupNCCL=_Nccl))
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    names = ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING", "WAIT_TIMEOUT_DUMP_MILSEC")
    variables = [f"TORCH_NCCL_{name}" for name in names]
    for name in variables:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    group = nccl.make_nccl_group(object(), 1, 3)
    assert group is _Nccl.made
    assert chosen == [3]
    assert (group.ranks, group.device) == ((1, 2), torch.device("cuda", 3))
    config = group.options.config
    assert (config.min_ctas, config.max_ctas) == (1, 4)
    assert group.options._timeout.days >= 1
    assert [os.environ[name] for name in variables] == ["0", "0", "0"]


def test_its_payload_is_staged_beside_the_cache():
    assert NcclTransport.place is Place.DEVICE


def test_a_flipped_bit_or_a_moved_word_changes_the_checksum_of_a_gpu():
    generator = torch.Generator().manual_seed(0)
    payload = torch.randint(0, 256, (4099,), dtype=torch.uint8, generator=generator)
    expected = device_checksum(payload)
    for bit in range(0, 8 * payload.numel(), 61):
        payload[bit // 8] ^= 1 << bit % 8
        assert device_checksum(payload) != expected
        payload[bit // 8] ^= 1 << bit % 8
    swapped = torch.cat([payload[8:16], payload[:8], payload[16:]])
    assert device_checksum(swapped) != expected
    assert device_checksum(payload) == expected
