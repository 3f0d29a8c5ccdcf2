"""Launches of every kernel on the shapes of Llama 3 8B, to compile or to time.

Heads 32 and 8, blocks of 16 tokens, bf16 activations; a cache of 32 bits goes with float32
activations. Tensors are empty: nothing here depends on their values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from antiphon.kernels.attention_batch import (
    AttentionBatch,
    AttentionFeatures,
    DecodePlan,
    KernelPlan,
    PrefillPlan,
)
from antiphon.kernels.decode_attention import decode_attention
from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode
from antiphon.kernels.gather_kv import gather_kv, make_side_tables
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, Rotary, WireKV
from antiphon.kernels.prefill_attention import prefill_attention
from antiphon.kernels.prefill_plan import plan_prefill
from antiphon.kernels.rms_norm import add_rms_norm, rms_norm
from antiphon.kernels.scatter_kv import scatter_kv
from antiphon.kernels.silu_and_mul import silu_and_mul
from antiphon.kernels.tuning import (
    FLOAT32_OVER_LESS,
    AttentionConfigs,
    DecodeConfig,
    PrefillConfig,
    Tuning,
)
from antiphon.kernels.write_kv import write_kv

Q_HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 16
HIDDEN_SIZE, INTERMEDIATE_SIZE = 4096, 14336
CPU = torch.device("cpu")
CACHE_DTYPES = {8: torch.int8, 16: torch.bfloat16, 32: torch.float32}
QUERY_DTYPES = {8: torch.bfloat16, 16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, and what it stands for.

    Attributes:
        op: Its public name.
        config: Of the table, in words; "-" where nothing is tuned.
        shape: Head width and dtypes.
        run: Launches it.
        min_ctas_per_sm: Occupancy that the configuration names.
        has_dot: Tensor cores are expected.
        role: The pool, for attention.
    """

    op: str
    config: str
    shape: str
    run: Callable[[], object]
    min_ctas_per_sm: int = 1
    has_dot: bool = False
    role: str = "both"


def launches(prefill: Tuning, decode: Tuning, *, fp8: bool) -> Iterator[Launch]:
    """Every kernel in every configuration of one architecture's two rows, each once."""
    seen = set()
    for tuning in (prefill, decode):
        for head_dim, bits in tuning.prefill_attention:
            configs, dtypes = (
                tuning.attention((head_dim, bits)),
                (QUERY_DTYPES[bits], CACHE_DTYPES[bits]),
            )
            for launch in _attention(tuning.role, configs, head_dim, dtypes, PLAIN):
                key = (launch.op, launch.config, launch.shape)
                if key not in seen:
                    seen.add(key)
                    yield launch
    yield from _attention("both", FLOAT32_OVER_LESS, 64, (torch.float32, torch.int8), PLAIN)
    bf16, wide = torch.bfloat16, decode.attention((128, 16))
    for head_dim in (80, 96):
        yield from _attention("decode", wide, head_dim, (bf16, bf16), PLAIN)
    yield from _attention("decode", wide, 128, (bf16, bf16), _all_features())
    if fp8:
        configs = decode.attention((128, 8))
        yield from _attention("decode", configs, 128, (bf16, torch.float8_e4m3fn), PLAIN)
    yield from _cache_ops(fp8=fp8)
    yield from _layer_ops()


PLAIN = AttentionFeatures(0.0883)


def _all_features() -> AttentionFeatures:
    return AttentionFeatures(0.0883, 4096, 8192, 50.0, torch.empty(Q_HEADS, dtype=torch.bfloat16))


def _attention(
    role: str,
    configs: AttentionConfigs,
    head_dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    features: AttentionFeatures,
) -> Iterator[Launch]:
    query_dtype, dtype = dtypes
    kv = make_kv(dtype, head_dim)
    shape = f"{head_dim} {short(query_dtype)}/{short(dtype)}"
    if features is not PLAIN:
        shape += " all features"
    has_dot = query_dtype != torch.float32
    prompt = torch.empty(256, Q_HEADS, head_dim, dtype=query_dtype)
    yield Launch(
        "prefill_attention",
        describe(configs.prefill),
        shape,
        lambda: prefill_attention(
            prompt, kv, prefill_batch(configs.prefill), features, configs.prefill
        ),
        configs.prefill.min_ctas_per_sm,
        has_dot,
        role,
    )
    tokens = torch.empty(2, Q_HEADS, head_dim, dtype=query_dtype)
    yield Launch(
        "decode_attention",
        f"{describe(configs.decode)}; shared {describe(configs.shared_prefix)}",
        shape,
        lambda: decode_attention(
            tokens,
            kv,
            decode_batch(configs.decode, configs.shared_prefix),
            features,
            configs.decode,
            configs.shared_prefix,
        ),
        configs.decode.min_ctas_per_sm,
        has_dot,
    )


def _cache_ops(*, fp8: bool) -> Iterator[Launch]:
    quantised = (torch.int8, torch.float8_e4m3fn) if fp8 else (torch.int8,)
    tokens = torch.empty(4, Q_HEADS, 128, dtype=torch.bfloat16)
    key = torch.empty(4, KV_HEADS, 128, dtype=torch.bfloat16)
    angles = torch.empty(4, 128, dtype=torch.bfloat16)
    slots = torch.empty(4, dtype=torch.int64)
    for dtype in (torch.bfloat16, *quantised):
        kv = make_kv(dtype, 128)
        yield Launch(
            "write_kv",
            "-",
            f"128 bf16/{short(dtype)}",
            lambda kv=kv: write_kv(tokens, key, key, kv, slots, Rotary(angles, angles)),
        )
        layers = [kv, kv]
        tables = make_side_tables(layers)
        for wire_dtype in (torch.bfloat16, dtype) if dtype != torch.bfloat16 else (dtype,):
            wire = make_wire(wire_dtype, 4, len(layers))
            for name, op in (("gather_kv", gather_kv), ("scatter_kv", scatter_kv)):
                yield Launch(
                    name,
                    "-",
                    f"128 cache {short(dtype)}, wire {short(wire_dtype)}",
                    lambda op=op, layers=layers, wire=wire, tables=tables: op(
                        layers, slots, wire, tables
                    ),
                )


def _layer_ops() -> Iterator[Launch]:
    x = torch.empty(4, HIDDEN_SIZE, dtype=torch.bfloat16)
    weight = torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16)
    gate_up = torch.empty(4, 2 * INTERMEDIATE_SIZE, dtype=torch.bfloat16)
    yield Launch("rms_norm", "-", f"{HIDDEN_SIZE} bf16", lambda: rms_norm(x, weight, 1e-5))
    yield Launch(
        "rms_norm", "-", f"{HIDDEN_SIZE} bf16, added", lambda: add_rms_norm(x, x, weight, 1e-5)
    )
    yield Launch("silu_and_mul", "-", f"{INTERMEDIATE_SIZE} bf16", lambda: silu_and_mul(gate_up))


def make_kv(dtype: torch.dtype, head_dim: int, num_blocks: int = 64) -> PagedKV:
    """An empty cache of one layer."""
    keys = torch.empty(num_blocks, BLOCK_SIZE, KV_HEADS, head_dim, dtype=dtype)
    if dtype not in QUANTISED_LIMITS:
        return PagedKV(keys, torch.empty_like(keys))
    scales = torch.empty(num_blocks, KV_HEADS, BLOCK_SIZE)
    return PagedKV(keys, torch.empty_like(keys), scales, torch.empty_like(scales))


def make_wire(dtype: torch.dtype, num_tokens: int, num_layers: int) -> WireKV:
    """An empty wire of layers as ``make_kv`` makes them, 128 wide."""
    elements = torch.empty(num_tokens * num_layers * 2 * KV_HEADS * 128, dtype=dtype)
    if dtype not in QUANTISED_LIMITS:
        return WireKV(elements)
    return WireKV(elements, torch.empty(num_tokens * num_layers * 2 * KV_HEADS))


def prefill_batch(config: PrefillConfig) -> AttentionBatch:
    """One prompt of 256 tokens."""
    return _batch(0, prefill=plan_prefill([256], [256], 0, config.block_m, CPU))


def decode_batch(config: DecodeConfig, shared: PrefillConfig) -> AttentionBatch:
    """Two requests of 100 tokens."""
    members = max(1, shared.block_m * KV_HEADS // Q_HEADS)
    capacity = DecodeCapacity(16, config.block_n, members, 512)
    tables = [list(range(7)), list(range(7, 14))]
    return _batch(2, decode=plan_decode([100, 100], tables, BLOCK_SIZE, capacity, CPU))


def _batch(
    num_decode: int, prefill: PrefillPlan | None = None, decode: DecodePlan | None = None
) -> AttentionBatch:
    def int32(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    plan = KernelPlan(int32(2), int32(3), prefill, decode)
    slots = torch.empty(0, dtype=torch.int64)
    return AttentionBatch(num_decode, (), (), int32(2, 64), (), slots, plan=plan)


def describe(config: PrefillConfig | DecodeConfig) -> str:
    """A configuration in a few characters: tile, warps, stages."""
    tile = f"{config.block_m}x" if isinstance(config, PrefillConfig) else ""
    return f"{tile}{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def short(dtype: torch.dtype) -> str:
    """bf16 and the like."""
    return {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.int8: "int8",
        torch.float8_e4m3fn: "fp8",
    }[dtype]
