"""A gloo group that behaves as an NCCL one does where the difference matters."""

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from antiphon.workers.handoff.nccl import NcclParts, NcclTransport
from antiphon.workers.handoff.segment import HEADER_BYTES

MakeGroup = Callable[[Any, int, int], Any]


class Work:
    """Its ``wait`` is never called: the end is polled."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def exception(self) -> RuntimeError | None:
        return self._error

    def _run(self) -> None:
        try:
            self._work.wait(timedelta(seconds=30))
        except RuntimeError as error:
            self._error = error


class Group:
    """Sends and receives in order; ``abort`` ends both ends' works, as a broken NCCL pair does."""

    def __init__(self, store: Any, rank: int, device: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)
        options._devices, options._threads = [device], 1
        options._timeout = timedelta(seconds=10)
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._rank = rank

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return Work(self._group.send(tensors, peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return Work(self._group.recv(tensors, peer, tag))

    def abort(self) -> None:
        never = Tensor()
        with contextlib.suppress(RuntimeError):
            self._group.recv([never], 1 - self._rank, 7).wait(timedelta(milliseconds=1))


def stand_in_transport(host: str, make_group: MakeGroup = Group) -> NcclTransport:
    """An NCCL transport whose communicators are the above, or what a test says."""
    return NcclTransport(
        host,
        NcclParts(
            make_group=make_group,
            current_device=lambda: 0,
            make_byte=lambda: torch.empty(1, dtype=torch.uint8),
            is_control=lambda tensor: (
                tensor.numel() >= HEADER_BYTES
            ),  # others stand for those on a GPU
            make_stream=lambda: None,
            on_stream=lambda stream: contextlib.nullcontext(),
        ),
    )
