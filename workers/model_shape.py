"""What a model costs in memory, arithmetic and KV; plain numbers, see ``shape_reader``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Attention of one layer."""

    num_q_heads: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts of parameters and shapes of KV.

    Attributes:
        family: transformers' ``model_type``.
        dtype: That config.json names for the weights, such as bfloat16; None if it names none.
        max_context_tokens: Prompt plus output at most.
        num_parameters: All; tied ones count once.
        num_lookup_parameters: Those of the input embedding, of which a token reads one row; 0 if
            the output uses the same ones.
        num_output_parameters: Those that make logits of hidden states.
        num_expert_parameters: Those of routed experts, all experts of all layers together.
        expert_share: Part of them that one token uses; 1 if there are none.
        layers: Attention of each layer.
    """

    family: str
    dtype: str | None
    max_context_tokens: int
    num_parameters: int
    num_lookup_parameters: int
    num_output_parameters: int
    num_expert_parameters: int
    expert_share: float
    layers: tuple[LayerShape, ...]

    @property
    def num_active_parameters(self) -> float:
        """Those that one token of output is multiplied with."""
        idle = self.num_expert_parameters * (1 - self.expert_share)
        return self.num_parameters - self.num_lookup_parameters - idle

    @property
    def num_kv_elements(self) -> int:
        """K and V elements per token."""
        return sum(x.num_kv_heads * (x.k_head_dim + x.v_head_dim) for x in self.layers)

    @property
    def num_kv_scales(self) -> int:
        """Scales per token, if K and V are quantised: one for each head of each."""
        return sum(2 * x.num_kv_heads for x in self.layers)

    @property
    def attention_flops_per_pair(self) -> int:
        """Operations for one token to attend to one other: a product with its K, one with its V."""
        return sum(2 * x.num_q_heads * (x.k_head_dim + x.v_head_dim) for x in self.layers)
