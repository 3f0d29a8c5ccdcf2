"""Tiny random models of many transformers families, and the oracle they are held against."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDING = {"sliding_window": 12}

# Windows, chunks and scales are short, so that prompts of a few dozen tokens leave them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": _SLIDING,
    "gemma": {"head_dim": 16},
    "gemma2": {**_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": _SLIDING,
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, **_MOE},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **_MOE},
    "starcoder2": _SLIDING,
    "cohere": {},
    "cohere2": {**_SLIDING, "num_hidden_layers": 4},
    "smollm3": {},
    "gpt_oss": {**_SLIDING, "num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2},
    "glm4": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "stablelm": {},
    "llama4_text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "floor_scale": 8,
        "attn_scale": 0.5,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
    },
    "exaone4": {**_SLIDING, "num_hidden_layers": 4, "sliding_window_pattern": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "relu"},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **_MOE,
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "phimoe": {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SLIDING,
        "use_sliding_window": True,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        **_MOE,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        **_MOE,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model whose logits are spread enough for greedy decoding to have no ties."""
    torch.manual_seed(seed)
    options = {**_COMMON, **(FAMILIES | REFUSED)[family], **changes}
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # as initialised, most families repeat one token for ever
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 0.15)
            elif "sink" in name:
                parameter.normal_(0, 1)
    return model


def oracle(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' own generate() says, greedily, without stopping early."""
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()
