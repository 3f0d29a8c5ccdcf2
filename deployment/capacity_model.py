"""What one GPU holds and how long its steps take, by arithmetic; nothing here was measured.

    memory    weights, KV and activations divide a GPU as workers/memory_plan.py divides it
    decode    a step reads the weights and the KV of its batch once: bytes over bandwidth
    prefill   a prompt multiplies its tokens with the weights and attends to itself: FLOPs over peak

Each time is the longer of the two, bytes and FLOPs, as in a roofline, at a stated share of the data
sheet's peak. Attention is counted over the whole context, sliding windows or not. A batch reads the
routed experts that at least one of its tokens uses, if each token chooses them independently.
"""

import math
from dataclasses import dataclass

from antiphon.deployment.gpus import Gpu
from antiphon.errors import ConfigError
from antiphon.workers.model_shape import ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_QUANTISED = ("int8", "fp8")
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Formats:
    """Dtypes by name: of the weights, of K and V in the caches, and between the pools."""

    weights: str
    kv_cache: str
    wire: str


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the arithmetic cannot know. Change what you have measured.

    Attributes:
        compute_share: Of peak FLOPs that prefill reaches. Large matrix products in 16 bits usually
            reach 0.4 to 0.7.
        memory_share: Of peak bandwidth that decode reaches; usually 0.6 to 0.8.
        utilisation: Of a pool's and a link's throughput that is planned for; the rest is for
            bursts.
        step_overhead_seconds: Of every step, for what is not the GPU's work.
        request_overhead_seconds: Of every request, for ingress and sessions.
        runtime_bytes: Of the GPU's memory for the driver's context and libraries.
        kv_share: Of what is free after the weights that becomes KV cache; the rest is activations.
        link_bytes_per_second: What a worker can send, or receive, of KV.
        step_tokens: Prompt tokens of a step, after which KV is sent.
    """

    compute_share: float = 0.5
    memory_share: float = 0.7
    utilisation: float = 0.7
    step_overhead_seconds: float = 0.002
    request_overhead_seconds: float = 0.010
    runtime_bytes: float = 1.5e9
    kv_share: float = 0.85
    link_bytes_per_second: float = 1.5e9
    step_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class Memory:
    """How a GPU's memory is divided, in bytes, and the tokens that its KV cache holds."""

    total: float
    runtime: float
    weights: float
    activations: float
    kv_cache: float
    kv_per_token: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One worker on one GPU."""

    shape: ModelShape
    gpu: Gpu
    formats: Formats
    assumptions: Assumptions

    def memory(self) -> Memory:
        """Divide the GPU's memory.

        Raises:
            ConfigError: The weights do not fit.
        """
        total, runtime = self.gpu.memory_bytes, self.assumptions.runtime_bytes
        weights = float(self.shape.num_parameters * self._weight_bytes)
        free = total - runtime - weights
        if free <= 0:
            raise ConfigError(
                f"the model does not fit: its weights take {weights / 1e9:.1f} GB in "
                f"{self.formats.weights}, and {self.gpu.name} has {(total - runtime) / 1e9:.1f} GB "
                "for them. A worker is one GPU: choose one with more memory, --dtype bfloat16 for "
                "float32, or a smaller model"
            )
        kv_cache = free * self.assumptions.kv_share
        per_token = kv_bytes_per_token(self.shape, self.formats.kv_cache)
        return Memory(
            total,
            runtime,
            weights,
            free - kv_cache,
            kv_cache,
            per_token,
            int(kv_cache // per_token),
        )

    def decode_step_bytes(self, batch: float, context_tokens: float) -> float:
        """Bytes that a step reads for ``batch`` requests with so many tokens of context each."""
        shape = self.shape
        idle = shape.num_expert_parameters * math.pow(1 - shape.expert_share, batch)
        read = shape.num_parameters - shape.num_lookup_parameters - idle
        per_token = kv_bytes_per_token(shape, self.formats.kv_cache)
        return read * self._weight_bytes + batch * context_tokens * per_token

    def decode_step_seconds(self, batch: float, context_tokens: float) -> float:
        """Time of a step for ``batch`` requests with so many tokens of context each."""
        attention = context_tokens * self.shape.attention_flops_per_pair
        flops = batch * (2 * self.shape.num_active_parameters + attention)
        longer = max(
            self._read_seconds(self.decode_step_bytes(batch, context_tokens)),
            self._compute_seconds(flops),
        )
        return longer + self.assumptions.step_overhead_seconds

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations for KV of a prompt's tokens: no logits, and half of all pairs attend."""
        weights = self.shape.num_active_parameters - self.shape.num_output_parameters
        pairs = num_tokens**2 / 2
        return 2 * num_tokens * weights + pairs * self.shape.attention_flops_per_pair

    def prefill_seconds(self, num_tokens: int) -> float:
        """Time for KV of a prompt's tokens on a worker that computes nothing else."""
        num_steps = self.num_prefill_steps(num_tokens)
        weights = self.shape.num_parameters - self.shape.num_lookup_parameters
        longer = max(
            self._compute_seconds(self.prefill_flops(num_tokens)),
            self._read_seconds(num_steps * weights * self._weight_bytes),
        )
        return longer + num_steps * self.assumptions.step_overhead_seconds

    def num_prefill_steps(self, num_tokens: int) -> int:
        """Steps that a prompt's tokens take; KV is sent after each."""
        return max(1, math.ceil(num_tokens / self.assumptions.step_tokens))

    @property
    def flops_per_second(self) -> float:
        """Peak of the GPU in the dtype of the weights."""
        is_wide = self.formats.weights == "float32"
        return self.gpu.flops_32_bit if is_wide else self.gpu.flops_16_bit

    @property
    def _weight_bytes(self) -> int:
        return ITEM_BYTES[self.formats.weights]

    def _read_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.bytes_per_second * self.assumptions.memory_share)

    def _compute_seconds(self, flops: float) -> float:
        return flops / (self.flops_per_second * self.assumptions.compute_share)


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """K and V of all layers in a dtype, with scales if it is quantised."""
    scales = shape.num_kv_scales * _SCALE_BYTES if dtype in _QUANTISED else 0
    return shape.num_kv_elements * ITEM_BYTES[dtype] + scales
