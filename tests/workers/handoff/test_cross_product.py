"""Pools that differ in everything they may: block size, cache dtype, kernels, dtype of the wire.

KV goes through a sender, a link and a receiver, and must equal what direct conversions give: from
the source's dtype to the wire's, from there to the target's.
"""

import itertools
import queue
import random
import uuid
from collections.abc import Iterator

import pytest
import torch
from memory_transport import MemoryNetwork, MemoryTransport
from torch import Tensor

from antiphon.kernels.kernel_set import KernelSet
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, dequantise, quantise
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.nccl import NcclParts, NcclTransport
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.handoff.wire import WireFormat
from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout

CPU = torch.device("cpu")
LAYERS = (LayerLayout(2, 16, 16), LayerLayout(1, 16, 16), LayerLayout(2, 16, 32))
BLOCK_SIZES = (8, 16, 32)
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
START = 5  # not the first of a block
MANY, FEW = 75, 13  # tokens, the last not the last of a block; few for the interpreter
SEGMENT_TOKENS = 20
MODEL_DTYPE = torch.float32  # what ``auto`` means
WIRE_DTYPES = {
    "auto": MODEL_DTYPE,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Through one dtype and back to float32; of a quantised one each row has a scale."""
    if dtype in QUANTISED_LIMITS:
        return dequantise(*quantise(x, dtype), torch.float32)
    return x.to(dtype).float()


def step(dtype: torch.dtype) -> float:
    """Largest error of a conversion, as a part of the largest element."""
    return {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.int8: 0.5 / 127}.get(dtype, 2**-4)


class End:
    """A cache with a table of scattered blocks."""

    def __init__(
        self,
        dtypes: tuple[torch.dtype, torch.dtype],
        block_size: int,
        kernels: KernelSet,
        end: int,
        device: torch.device = CPU,
    ) -> None:
        self.end = end
        num_blocks = -(-end // block_size)
        layout = KVLayout(LAYERS, *dtypes)
        self.cache = KVCache(layout, num_blocks + 3, block_size, device, kernels)
        self.table = random.Random(block_size).sample(range(num_blocks + 3), num_blocks)
        positions = torch.arange(end)
        blocks = torch.tensor(self.table)[positions // block_size]
        self.slots = (blocks * block_size + positions % block_size).to(device)

    def write(self) -> list[Tensor]:
        """Fill with random KV; returns it in float32, K and V of each layer in turn."""
        written = []
        for layer in self.cache.layers:
            key, value = (
                torch.randn(self.end, *cache.shape[2:]) for cache in (layer.keys, layer.values)
            )
            on_device = [side.to(self.slots.device) for side in (key, key, value)]
            TorchKernels().write_kv(*on_device, layer, self.slots)
            written += [key, value]
        return written

    def read(self) -> Iterator[Tensor]:
        for layer in self.cache.layers:
            sides = ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
            for cache, scales in sides:
                rows = cache.float().flatten(0, 1)[self.slots]
                if scales is not None:
                    by_slot = scales.transpose(1, 2).reshape(-1, cache.shape[2])
                    rows = rows * by_slot[self.slots][..., None]
                yield rows.cpu()


def in_memory() -> tuple[Transport, Transport]:
    """Of the sender and of the receiver."""
    network = MemoryNetwork()
    return MemoryTransport(network, "p"), MemoryTransport(network, "d")


def hand_off(source: End, target: End, transports: tuple[Transport, Transport]) -> None:
    """Move tokens from START on through a sender, a link and a receiver."""
    completed = queue.Queue()
    wire = WireFormat("model", (), str(source.cache.layout.wire_dtype))
    limits = SenderLimits(segment_bytes=SEGMENT_TOKENS * source.cache.num_bytes_per_token)
    sender = HandoffSender(
        Endpoint(transports[0], source.cache, "p", wire), limits, lambda *_: None
    )
    receiver = HandoffReceiver(
        Endpoint(transports[1], target.cache, "d", wire),
        ReceiverLimits(timeout_seconds=30),
        lambda *report: completed.put(report),
    )
    transfer_id, offer = uuid.uuid4().hex, receiver.offer("p")
    receiver.expect(transfer_id, offer.link_id, target.table, START, source.end)
    sender.open(transfer_id, offer, START)
    sender.push(transfer_id, source.table, START, source.end // 2)
    sender.push(transfer_id, source.table, source.end // 2, source.end)
    sender.finish(transfer_id)
    assert completed.get(timeout=30) == (transfer_id, source.end - START, None)
    sender.close()
    receiver.close()


def check(source: End, target: End, transports: tuple[Transport, Transport] | None = None) -> None:
    """Hand off, and compare with what converting directly gives."""
    wire = source.cache.layout.wire_dtype
    written = source.write()
    hand_off(source, target, transports or in_memory())
    # A conversion that meets a tie may fall on either side of it; the bound is one step of each
    # dtype that rounds after the first, and nothing if none of them does.
    dtypes = (source.cache.layout.dtype, wire, target.cache.layout.dtype)
    for original, arrived in zip(written, target.read(), strict=True):
        expected = original
        for dtype in dtypes:
            expected = convert(expected, dtype)
        largest = original.abs().amax(-1, keepdim=True)
        error = ((arrived - expected).abs() / largest)[START:]
        assert error.max() <= (2 * step(dtypes[2]) if len(set(dtypes)) > 1 else 1e-6)
        wrong = (error > 1e-5).float().mean()
        assert wrong < 0.02, f"{wrong:.1%} of the elements differ from a direct conversion"


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("block_sizes", list(itertools.product(BLOCK_SIZES, BLOCK_SIZES)), ids=str)
def test_every_pair_of_caches_over_every_wire(block_sizes: tuple[int, int], wire: str) -> None:
    torch.manual_seed(0)
    for dtypes in itertools.product(CACHE_DTYPES, CACHE_DTYPES):
        ends = [
            End((dtype, WIRE_DTYPES[wire]), size, TorchKernels(), MANY)
            for dtype, size in zip(dtypes, block_sizes, strict=True)
        ]
        check(*ends)


@pytest.mark.interpreter
@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("dtypes", list(itertools.product(CACHE_DTYPES, CACHE_DTYPES)), ids=str)
def test_kernel_sets_may_differ(dtypes: tuple[torch.dtype, torch.dtype], wire: str) -> None:
    """One end runs the Triton kernels, the other torch's, with other blocks; by turns."""
    from antiphon.kernels.triton_kernels import TritonKernels
    from antiphon.kernels.tuning import tuning_for

    if torch.cuda.is_available():
        pytest.skip("the two ends are on the CPU here; kernels/test_gather_kv.py has the GPU")
    torch.manual_seed(1)
    kernels: list[KernelSet] = [TritonKernels(tuning_for("sm_90", "prefill"), 2), TorchKernels()]
    turn = list(WIRE_DTYPES).index(wire) + sum(map(CACHE_DTYPES.index, dtypes))
    source, target = kernels if turn % 2 else reversed(kernels)
    check(
        End((dtypes[0], WIRE_DTYPES[wire]), 8, source, FEW),
        End((dtypes[1], WIRE_DTYPES[wire]), 32, target, FEW),
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL joins two GPUs, and this machine has fewer"
)
def test_the_caches_of_two_gpus_over_nccl() -> None:
    from antiphon.kernels.triton_kernels import make_triton_kernels

    torch.manual_seed(2)
    devices = [torch.device("cuda", index) for index in range(2)]
    kernels = [
        make_triton_kernels(devices[0], "prefill"),
        make_triton_kernels(devices[1], "decode"),
    ]
    host = "127.0.0.1"
    # The process of a worker sees one GPU; this one sees both.
    second = NcclParts(current_device=lambda: 1)
    for dtypes in itertools.product(CACHE_DTYPES, CACHE_DTYPES):
        for wire in WIRE_DTYPES.values():
            source, target = (
                End((dtype, wire), size, ops, MANY, device)
                for dtype, size, ops, device in zip(dtypes, (8, 32), kernels, devices, strict=True)
            )
            check(source, target, (NcclTransport(host), NcclTransport(host, second)))
