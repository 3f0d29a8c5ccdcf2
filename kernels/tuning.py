"""The tuned configurations: one table, by architecture and pool; nothing is tuned while serving.

A row exists only if the compile tests have shown that it neither spills nor asks for more shared
memory than its target has, and that its registers allow the occupancy it names. ``head_dim`` is
the padded one (64, 128, 256) and ``bits`` the width of a cache element.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from antiphon.errors import ConfigError

Role = Literal["prefill", "decode", "colocated"]


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """One program computes ``block_m`` query rows of one head against tiles of ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_ctas_per_sm: int = 1  # the occupancy that registers and shared memory must allow


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One program computes the query heads of one KV head against a part of one context."""

    block_n: int
    num_warps: int
    num_stages: int
    min_ctas_per_sm: int = 2


@dataclass(frozen=True, slots=True)
class AttentionConfigs:
    """What the attention of one model takes."""

    prefill: PrefillConfig
    decode: DecodeConfig
    shared_prefix: PrefillConfig


@dataclass(frozen=True, slots=True)
class Tuning:
    """What one pool's workers run on one architecture.

    Attributes:
        target: sm_80, sm_90, sm_100 or gfx942.
        role: The pool; colocated workers take each op from the pool that lives on it.
        prefill_attention: By ``(head_dim, bits)``.
        decode_attention: By ``(head_dim, bits)``.
        shared_prefix_attention: By ``(head_dim, bits)``; ``block_m`` is its most query rows.
        shared_prefix_min_tokens: Shorter common prefixes are not worth a launch of their own.
    """

    target: str
    role: Role
    prefill_attention: Mapping[tuple[int, int], PrefillConfig]
    decode_attention: Mapping[tuple[int, int], DecodeConfig]
    shared_prefix_attention: Mapping[tuple[int, int], PrefillConfig]
    shared_prefix_min_tokens: int = 512

    def attention(self, key: tuple[int, int]) -> AttentionConfigs:
        """Look up ``(head_dim, bits)``.

        Raises:
            ConfigError: The table has no such row.
        """
        tables = (self.prefill_attention, self.decode_attention, self.shared_prefix_attention)
        if any(key not in table for table in tables):
            widest = max(head_dim for head_dim, _ in self.decode_attention)
            raise ConfigError(
                f"no attention is tuned on {self.target} for heads of {key[0]} and elements of "
                f"{key[1]} bits, only for heads of up to {widest}; engine.device: cpu does without"
            )
        return AttentionConfigs(*(table[key] for table in tables))  # type: ignore[arg-type]


# Float32 products run on ordinary lanes; larger tiles spill everywhere.
_PREFILL_32_BIT = {
    (64, 32): PrefillConfig(32, 32, 4, 2),
    (128, 32): PrefillConfig(16, 16, 4, 2),
    (256, 32): PrefillConfig(16, 16, 4, 2),
}
_DECODE_32_BIT = {
    (64, 32): DecodeConfig(32, 4, 2, 3),
    (128, 32): DecodeConfig(16, 4, 2, 3),
    (256, 32): DecodeConfig(16, 4, 2, 1),
}

# Float32 queries over a cache of another dtype, heads of 64, on every architecture: the conversion
# takes registers. With wider heads even these tiles spill, so there is none.
FLOAT32_OVER_LESS = AttentionConfigs(
    PrefillConfig(16, 16, 4, 2), DecodeConfig(16, 4, 2, 2), PrefillConfig(16, 16, 4, 2)
)

# There the tiles above spill a few bytes.
_PREFILL_32_BIT_SM_80 = {**_PREFILL_32_BIT, (128, 32): PrefillConfig(16, 32, 4, 2)}
_SHARED_32_BIT_SM_80 = {**_PREFILL_32_BIT, (256, 32): PrefillConfig(16, 32, 8, 2)}

# Each architecture: prefill_attention of the prefill pool, of the decode pool, decode_attention,
# shared_prefix_attention; by (head_dim, bits).
_SM_80 = (
    {
        **_PREFILL_32_BIT_SM_80,
        (64, 16): PrefillConfig(128, 128, 8, 2),
        (128, 16): PrefillConfig(128, 32, 8, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(128, 128, 8, 2),
        (128, 8): PrefillConfig(64, 64, 4, 2, 2),
        (256, 8): PrefillConfig(64, 64, 8, 2),
    },
    {
        **_PREFILL_32_BIT_SM_80,
        (64, 16): PrefillConfig(64, 64, 4, 3, 2),
        (128, 16): PrefillConfig(64, 32, 4, 2, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3, 2),
        (128, 8): PrefillConfig(64, 64, 4, 3, 2),
        (256, 8): PrefillConfig(64, 64, 8, 2),
    },
    {
        (64, 16): DecodeConfig(64, 4, 4, 4),
        (128, 16): DecodeConfig(64, 4, 4, 4),
        (256, 16): DecodeConfig(32, 4, 4, 2),
        (64, 8): DecodeConfig(64, 4, 4, 3),
        (128, 8): DecodeConfig(64, 4, 4, 2),
        (256, 8): DecodeConfig(32, 4, 4, 2),
    },
    {
        **_SHARED_32_BIT_SM_80,
        (64, 16): PrefillConfig(64, 64, 4, 3),
        (128, 16): PrefillConfig(64, 32, 4, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3),
        (128, 8): PrefillConfig(64, 32, 4, 2),
        (256, 8): PrefillConfig(64, 32, 8, 2),
    },
)
_SM_90 = (
    {
        (64, 16): PrefillConfig(128, 128, 8, 2),
        (128, 16): PrefillConfig(128, 128, 8, 2),
        (256, 16): PrefillConfig(64, 64, 8, 2),
        (64, 8): PrefillConfig(128, 128, 8, 2),
        (128, 8): PrefillConfig(128, 128, 8, 2),
        (256, 8): PrefillConfig(64, 64, 8, 2),
    },
    {
        (64, 16): PrefillConfig(64, 64, 4, 3, 2),
        (128, 16): PrefillConfig(64, 64, 4, 3, 2),
        (256, 16): PrefillConfig(64, 32, 4, 2, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3, 2),
        (128, 8): PrefillConfig(64, 64, 4, 3, 2),
        (256, 8): PrefillConfig(64, 32, 4, 2, 2),
    },
    {
        (64, 16): DecodeConfig(64, 4, 4, 4),
        (128, 16): DecodeConfig(64, 4, 4, 4),
        (256, 16): DecodeConfig(32, 4, 4, 2),
        (64, 8): DecodeConfig(64, 4, 4, 3),
        (128, 8): DecodeConfig(64, 4, 4, 2),
        (256, 8): DecodeConfig(32, 4, 4, 2),
    },
    {
        (64, 16): PrefillConfig(64, 64, 4, 3),
        (128, 16): PrefillConfig(64, 64, 4, 3),
        (256, 16): PrefillConfig(64, 64, 8, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3),
        (128, 8): PrefillConfig(64, 64, 4, 3),
        (256, 8): PrefillConfig(64, 32, 8, 2),
    },
)
_SM_100 = (
    {
        (64, 16): PrefillConfig(128, 128, 8, 2),
        (128, 16): PrefillConfig(128, 128, 8, 2),
        (256, 16): PrefillConfig(128, 64, 8, 2),
        (64, 8): PrefillConfig(128, 128, 8, 2),
        (128, 8): PrefillConfig(128, 128, 8, 2),
        (256, 8): PrefillConfig(64, 64, 8, 2),
    },
    {
        (64, 16): PrefillConfig(64, 64, 4, 3, 2),
        (128, 16): PrefillConfig(64, 64, 4, 2, 2),
        (256, 16): PrefillConfig(64, 32, 4, 2, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3, 2),
        (128, 8): PrefillConfig(64, 32, 4, 2, 2),
        (256, 8): PrefillConfig(64, 32, 4, 2, 2),
    },
    _SM_90[2],
    {
        (64, 16): PrefillConfig(64, 64, 4, 3),
        (128, 16): PrefillConfig(64, 64, 4, 3),
        (256, 16): PrefillConfig(64, 64, 8, 2),
        (64, 8): PrefillConfig(64, 64, 4, 3),
        (128, 8): PrefillConfig(64, 64, 4, 3),
        (256, 8): PrefillConfig(64, 64, 8, 2),
    },
)
_GFX942 = (
    {
        (64, 16): PrefillConfig(128, 64, 8, 2),
        (128, 16): PrefillConfig(128, 64, 8, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(128, 64, 4, 2),
        (128, 8): PrefillConfig(128, 64, 4, 2),
        (256, 8): PrefillConfig(64, 32, 4, 2),
    },
    {
        (64, 16): PrefillConfig(64, 64, 4, 2, 2),
        (128, 16): PrefillConfig(64, 32, 4, 2, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(64, 32, 4, 2, 2),
        (128, 8): PrefillConfig(64, 32, 4, 2, 2),
        (256, 8): PrefillConfig(64, 32, 4, 2),
    },
    {
        (64, 16): DecodeConfig(64, 8, 2, 2),
        (128, 16): DecodeConfig(32, 4, 2, 3),
        (256, 16): DecodeConfig(32, 4, 1, 3),
        (64, 8): DecodeConfig(64, 4, 2, 2),
        (128, 8): DecodeConfig(32, 4, 2, 4),
        (256, 8): DecodeConfig(32, 4, 2, 2),
    },
    {
        (64, 16): PrefillConfig(64, 64, 4, 2),
        (128, 16): PrefillConfig(64, 64, 4, 2),
        (256, 16): PrefillConfig(64, 32, 8, 2),
        (64, 8): PrefillConfig(64, 64, 4, 2),
        (128, 8): PrefillConfig(64, 32, 4, 2),
        (256, 8): PrefillConfig(64, 32, 4, 2),
    },
)
_ROLES: tuple[Role, Role] = ("prefill", "decode")
_ARCHITECTURES = {"sm_80": _SM_80, "sm_90": _SM_90, "sm_100": _SM_100, "gfx942": _GFX942}

TABLE: tuple[Tuning, ...] = tuple(
    Tuning(
        target,
        role,
        {**_PREFILL_32_BIT, **prefill},
        {**_DECODE_32_BIT, **decode},
        {**_PREFILL_32_BIT, **shared},
    )
    for target, (large, small, decode, shared) in _ARCHITECTURES.items()
    for role, prefill in zip(_ROLES, (large, small), strict=True)
)


def tuning_for(target: str, role: Role) -> Tuning:
    """Look up a pool's configurations.

    Raises:
        ConfigError: The table has no row for the architecture; names those it has.
    """
    if role == "colocated":
        prefill = tuning_for(target, "prefill").prefill_attention
        return replace(tuning_for(target, "decode"), role=role, prefill_attention=prefill)
    for tuning in TABLE:
        if (tuning.target, tuning.role) == (target, role):
            return tuning
    known = ", ".join(sorted({tuning.target for tuning in TABLE}))
    raise ConfigError(
        f"no kernels are tuned for {target}; the table has {known}; engine.device: cpu does without"
    )
