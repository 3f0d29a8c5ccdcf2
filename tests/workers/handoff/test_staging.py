"""The order of copies on a GPU, told by streams that only take notes; and what is counted."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from handoff_pair import BYTES_PER_TOKEN, FakeStore, wait_until

from antiphon.workers.handoff import staging as staging_module
from antiphon.workers.handoff.sender import SenderLimits
from antiphon.workers.handoff.staging import CudaStreams, NoStreams, Staging, streams_for
from antiphon.workers.handoff.transport import Place


class FakeCuda:
    """Stands in for ``torch.cuda``; every call is a line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.engine_stream = _Stream(self, "engine")
        self.num_streams = 0

    def Event(self) -> Any:
        return _Event(self)

    def Stream(self, device: torch.device) -> Any:
        self.num_streams += 1
        return _Stream(self, f"link-{self.num_streams}")

    def current_stream(self, device: torch.device) -> Any:
        return self.engine_stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.lines.append(f"enter {stream.name}")
        try:
            yield
        finally:
            self.lines.append(f"leave {stream.name}")


class _Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self, stream: Any) -> None:
        self._cuda.lines.append(f"record on {stream.name}")


class _Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda = cuda
        self.name = name

    def wait_event(self, event: _Event) -> None:
        self._cuda.lines.append(f"{self.name} waits for the event")

    def synchronize(self) -> None:
        self._cuda.lines.append(f"host waits for {self.name}")


class NotingStore(FakeStore):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def gather(self, *args: Any) -> None:
        self._lines.append("gather")
        super().gather(*args)

    def scatter(self, *args: Any) -> None:
        self._lines.append("scatter")
        super().scatter(*args)


def _staging(cuda: FakeCuda, place: Place = Place.HOST) -> Staging:
    streams = CudaStreams(torch.device("cuda"), cuda)
    return Staging(NotingStore(cuda.lines), place, lambda change: None, streams)


def _kv(num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens * BYTES_PER_TOKEN, dtype=torch.uint8)


def test_kv_is_read_after_the_engine_has_written_it_and_sent_after_it_was_read():
    cuda = FakeCuda()
    staging = _staging(cuda)
    mark = CudaStreams(torch.device("cuda"), cuda).mark()
    payload = staging.next_frame(4 * BYTES_PER_TOKEN).payload(4 * BYTES_PER_TOKEN)
    staging.gather([0], (0, 4), payload, mark)
    assert cuda.lines == [
        "record on engine",
        "enter link-1",
        "link-1 waits for the event",
        "gather",
        "leave link-1",
        "host waits for link-1",
    ]


def test_the_engine_is_never_waited_for_when_kv_is_written():
    cuda = FakeCuda()
    staging = _staging(cuda)
    for _ in range(2):
        staging.scatter([0], 0, 4, _kv(4))
    assert cuda.lines == ["enter link-1", "scatter", "leave link-1", "host waits for link-1"] * 2
    assert cuda.num_streams == 1


@pytest.mark.parametrize(
    "copy",
    [
        lambda staging: staging.gather([0], (0, 5), _kv(5), None),  # the table has four tokens
        lambda staging: staging.scatter([0], 0, 5, _kv(5)),
    ],
    ids=["gather", "scatter"],
)
def test_what_an_error_has_cut_short_is_over_when_it_is_raised(copy: Callable[[Staging], None]):
    """Some kernels were queued, and the blocks or the buffer are somebody else's from here on."""
    cuda = FakeCuda()
    with pytest.raises(IndexError):
        copy(_staging(cuda))
    assert cuda.lines[0] == "enter link-1"
    assert cuda.lines[2:] == ["leave link-1", "host waits for link-1"]


def test_a_checksum_does_not_wait_for_the_engine(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda()

    def noted(payload: torch.Tensor) -> int:
        cuda.lines.append("checksum")
        return 7

    monkeypatch.setattr(staging_module, "checksum", noted)
    assert _staging(cuda).checksum(_kv(4)) == 7
    assert cuda.lines == ["enter link-1", "checksum", "leave link-1", "host waits for link-1"]


def test_a_buffer_beside_the_cache_is_no_memory_of_the_engine_s_stream(
    monkeypatch: pytest.MonkeyPatch,
):
    cuda = FakeCuda()
    staging = _staging(cuda, Place.DEVICE)
    frame = staging_module.Frame

    def noted(*args: Any) -> Any:
        cuda.lines.append("allocate")
        return frame(*args)

    monkeypatch.setattr(staging_module, "Frame", noted)
    for _ in range(3):
        staging.next_frame(96)
    assert cuda.lines == ["enter link-1", "allocate", "leave link-1", "host waits for link-1"] * 2


def test_a_cpu_needs_no_streams():
    streams = streams_for(torch.device("cpu"))
    assert isinstance(streams, NoStreams)
    assert streams.mark() is None


def test_two_frames_take_turns_and_grow():
    changes: list[int] = []
    staging = Staging(FakeStore(), Place.HOST, changes.append)
    first, second = staging.next_frame(100), staging.next_frame(100)
    assert first is not second
    assert staging.next_frame(60) is first
    assert staging.next_frame(200) is not second
    assert sum(changes) == staging.num_bytes == first.num_bytes + first.num_bytes + 100
    staging.release()
    assert sum(changes) == 0


def test_a_buffer_that_was_put_back_is_the_next_one():
    staging = Staging(FakeStore(), Place.HOST, lambda change: None)
    on_the_wire, unused = staging.next_frame(100), staging.next_frame(100)
    assert staging.next_frame(100) is on_the_wire
    assert staging.next_frame(100) is unused
    staging.put_back()
    assert staging.next_frame(100) is unused
    assert staging.next_frame(100) is on_the_wire


def test_split_frames_keep_kv_beside_the_header():
    staging = Staging(FakeStore(), Place.DEVICE, lambda change: None)
    frame = staging.next_frame(96)
    frame.payload(96).fill_(7)
    header, payload = frame.tensors(bytes(128), 96)
    assert header.numel() == 128
    assert payload.eq(7).all()
    assert not frame.text(96).eq(7).all()


def test_staging_memory_is_counted_and_given_back(make_memory_pair):
    pair = make_memory_pair(sender_limits=SenderLimits(timeout_seconds=5))
    pair.transfer([0], [0], 0, 4)
    pair.next_completed()
    pair.next_done()
    assert pair.sender.counters().staging_bytes == 128 + 4 * BYTES_PER_TOKEN
    assert pair.receiver.counters().staging_bytes == 2 * (128 + pair.receiver.limits.segment_bytes)
    pair.sender.close()
    wait_until(lambda: pair.receiver.num_links == 0)
    assert pair.sender.counters().staging_bytes == 0
    assert pair.receiver.counters().staging_bytes == 0
