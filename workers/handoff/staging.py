"""Where payload waits between the KV cache and the wire, and the order of copies on a GPU.

Two buffers for each end of a link: one is on the wire while the other is filled or emptied. On a
GPU the copies run on a stream of the link's own, so that the engine's stream never waits for them:

    engine's stream   ... write KV ─ mark ─ next step ...
                                       └──▶ link's stream   gather ─ copy to the host ─┐
    link's thread                                                    waits for that ◀──┘  send

``mark`` is what keeps the wire from reading KV before it is written. The other way round there are
two orders to keep, and neither needs a mark. The engine reads KV after it was told of it, which is
after the link's thread has waited for its scatter. And a scatter writes to blocks after every step
that may have used them before, since the engine waits for the steps that it has queued before it
gives blocks to a hand-off (``ModelRunner.settle``).

Checksums are computed on the link's stream too, and buffers beside the cache come from its memory:
what the engine's stream has freed may still be in use by kernels that are queued there.

No GPU has run this. The order is tested with streams that only take notes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from antiphon.workers.handoff.endpoint import KVStore
from antiphon.workers.handoff.segment import HEADER_BYTES, checksum
from antiphon.workers.handoff.transport import Place

_MAX_TEXT_BYTES = 4096  # of a message that is not KV
_EMPTY = torch.empty(0, dtype=torch.uint8)


class Streams(Protocol):
    """Orders copies with the engine's work."""

    def mark(self) -> Any:
        """On the engine's thread: what it has queued so far, for ``copying``."""

    def copying(self, after: Any) -> contextlib.AbstractContextManager[None]:
        """Run what is inside after a mark, or after nothing if it is None.

        Done on exit, also of what an error has cut short.
        """


class NoStreams:
    """On a CPU whatever returned is done."""

    def mark(self) -> None:
        """Nothing is queued."""

    def copying(self, after: Any) -> contextlib.AbstractContextManager[None]:
        """Run what is inside."""
        return contextlib.nullcontext()


class CudaStreams:
    """One stream for the copies of one end of a link.

    Args:
        device: Of the KV cache.
        cuda: ``torch.cuda``, or what stands in for it in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream: Any = None

    def mark(self) -> Any:
        """Record an event on the calling thread's stream."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event

    @contextlib.contextmanager
    def copying(self, after: Any) -> Iterator[None]:
        """Queue what is inside on the link's stream, then wait for that stream alone."""
        if self._stream is None:  # a link that is only prewarmed may need none
            self._stream = self._cuda.Stream(self._device)
        try:
            with self._cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                yield
        finally:  # after an error, too, blocks and buffers go to others
            self._stream.synchronize()


def streams_for(device: torch.device) -> Streams:
    """What orders copies on a device."""
    return CudaStreams(device) if device.type == "cuda" else NoStreams()


class Frame:
    """One staging buffer: a header with its payload behind it, or beside it on a GPU.

    Args:
        num_bytes: Of payload, at most.
        beside: Device of the payload, if it does not lie behind its header.
        is_pinned: Whether the memory of the host is.
    """

    def __init__(self, num_bytes: int, beside: torch.device | None, is_pinned: bool) -> None:
        self.capacity = num_bytes
        on_host = _MAX_TEXT_BYTES if beside is not None else num_bytes
        self.message = torch.empty(HEADER_BYTES + on_host, dtype=torch.uint8, pin_memory=is_pinned)
        self._header = self.message[:HEADER_BYTES].numpy().data
        self._beside: Tensor | None = None
        if beside is not None:
            self._beside = torch.empty(num_bytes, dtype=torch.uint8, device=beside)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.message.numel() + (0 if self._beside is None else self._beside.numel())

    @property
    def text_capacity(self) -> int:
        """Bytes of a payload that lies on the host."""
        return self.message.numel() - HEADER_BYTES

    @property
    def is_split(self) -> bool:
        """Whether KV comes apart from its header."""
        return self._beside is not None

    @property
    def header(self) -> bytes:
        """A copy of what lies before the payload."""
        return self._header.tobytes()

    def payload(self, num_bytes: int) -> Tensor:
        """Where KV is."""
        return self.text(num_bytes) if self._beside is None else self._beside[:num_bytes]

    def text(self, num_bytes: int) -> Tensor:
        """Where a payload is that always lies on the host."""
        return self.message[HEADER_BYTES : HEADER_BYTES + num_bytes]

    def tensors(self, header: bytes, num_bytes: int) -> list[Tensor]:
        """What to send, with the header put before KV of so many bytes."""
        self._header[:] = header
        if self._beside is None:
            return [self.message[: HEADER_BYTES + num_bytes]]
        return [self.message[:HEADER_BYTES], self._beside[:num_bytes]]


class Staging:
    """The buffers of one end of a link, and the cache behind them; for the link's thread alone.

    Args:
        store: The cache.
        place: Where the transport wants payload.
        on_resized: Told by how many bytes the memory held here has changed.
        streams: Of this end.
    """

    def __init__(
        self,
        store: KVStore,
        place: Place,
        on_resized: Callable[[int], None],
        streams: Streams | None = None,
    ) -> None:
        self.num_bytes_per_token = store.num_bytes_per_token
        self.device = store.device
        self._store = store
        self._streams = streams or streams_for(store.device)
        self._is_pinned = store.device.type == "cuda" and place is Place.HOST
        self._beside = store.device if place is Place.DEVICE else None
        self._on_resized = on_resized
        self._frames: list[Frame | None] = [None, None]
        self._scratch = _EMPTY  # beside the cache, where payload is elsewhere
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        frames = sum(frame.num_bytes for frame in self._frames if frame is not None)
        return frames + self._scratch.numel()

    def next_frame(self, num_bytes: int) -> Frame:
        """The buffer that was not used last, with room for so many bytes of KV."""
        turn = 1 - self._turn
        frame = self._frames[turn]
        if frame is None or frame.capacity < num_bytes:
            before = self.num_bytes
            frame = self._frames[turn] = self._new_frame(num_bytes)
            self._on_resized(self.num_bytes - before)
        self._turn = turn
        return frame

    def put_back(self) -> None:
        """Take the buffer of the last ``next_frame`` as unused: nothing was sent from it."""
        self._turn = 1 - self._turn

    def gather(
        self, block_table: Sequence[int], span: tuple[int, int], out: Tensor, after: Any
    ) -> None:
        """Copy KV of tokens ``span`` to a payload buffer, after a mark of the engine's."""
        with self._streams.copying(after):
            beside_cache = self._beside_cache(out)
            self._store.gather(block_table, *span, beside_cache)
            if beside_cache is not out:
                out.copy_(beside_cache, non_blocking=True)

    def scatter(self, block_table: Sequence[int], start: int, end: int, segment: Tensor) -> None:
        """Copy a payload buffer to the cache; done on return."""
        with self._streams.copying(None):
            beside_cache = self._beside_cache(segment)
            if beside_cache is not segment:
                beside_cache.copy_(segment, non_blocking=True)
            self._store.scatter(block_table, start, end, beside_cache)

    def checksum(self, payload: Tensor) -> int:
        """Of a payload buffer; see ``segment.checksum``."""
        with self._streams.copying(None):
            return checksum(payload)

    def release(self) -> None:
        """Let go of the memory."""
        self._on_resized(-self.num_bytes)
        self._frames, self._scratch = [None, None], _EMPTY

    def _new_frame(self, num_bytes: int) -> Frame:
        if self._beside is None:
            return Frame(num_bytes, None, self._is_pinned)
        with self._streams.copying(None):
            return Frame(num_bytes, self._beside, self._is_pinned)

    def _beside_cache(self, payload: Tensor) -> Tensor:
        if payload.device.type == self.device.type:
            return payload
        if payload.numel() > self._scratch.numel():
            self._on_resized(payload.numel() - self._scratch.numel())
            self._scratch = torch.empty(payload.numel(), dtype=torch.uint8, device=self.device)
        return self._scratch[: payload.numel()]
